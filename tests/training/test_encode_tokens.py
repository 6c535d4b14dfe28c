"""Tokens of a frozen encoder: made by fit_source, stopped and started again, by two processes."""

import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from gmflow_core.source.files import load_source
from tests import forked
from tests.training.source_runs import config, write_images, write_prepared
from training.data.preparation import PreparationConfig, prepare
from training.data.shards import LatentDataset
from training.data.tokens import read_tokens, write_tokens
from training.encoders.encoder import ENCODERS
from training.source.fitting import fit


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture
def prepared(images, tmp_path):
    return write_prepared(images, tmp_path / "prepared")


TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "patch_size": 8,
    "image_size": 16,
}


def tiny_encoder(kind, folder):
    """Write a random encoder; return a function that makes its tokens with transformers alone.

    The function takes images (B, 3, H, W) in [-1, 1].
    """
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    if kind == "dinov2":
        network = transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(**TINY)
        )

        def tokens(x):
            return network(x).last_hidden_state[:, 0]
    elif kind == "siglip2":
        text = {
            "vocab_size": 16,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
        settings = transformers.SiglipConfig(
            text_config=text, vision_config={**TINY, "intermediate_size": 16}
        )
        network = transformers.SiglipModel(settings)
        mean = std = torch.full((3, 1, 1), 0.5)

        def tokens(x):
            return network.vision_model(x).pooler_output
    else:
        settings = transformers.ViTMAEConfig(**TINY, intermediate_size=16, mask_ratio=0.75)
        network = transformers.ViTMAEModel(settings)

        def tokens(x):
            network.config.mask_ratio = 0.0
            return network(x).last_hidden_state[:, 0]

    for parameter in network.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    network.eval().save_pretrained(folder)
    return lambda x: tokens(((x + 1) / 2 - mean) / std).detach()


@pytest.mark.parametrize("kind", ENCODERS)
def test_command_with_an_encoder(kind, images, prepared, tmp_path, capsys):
    exact = tiny_encoder(kind, tmp_path / "encoder")
    settings = {
        "encoder": str(tmp_path / "encoder"),
        "encoder_size": 16,
        "image_size": 16,
        "batch_size": 7,
    }
    source = fit(config(prepared, tmp_path / "out", modes=2, **settings))
    assert source.assigner.shape == (16,)
    files = [f for f in sorted(images.rglob("*.png")) if f.name != "15b.png"]
    pixels = np.stack([np.array(Image.open(file)) for file in files])
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    tokens = read_tokens(prepared)
    assert torch.allclose(tokens, exact(x), atol=1e-4)
    assert tokens.std(0).max() > 0.01
    assert list(prepared.glob("*.parts")) == []
    before = (prepared / "tokens.safetensors").stat().st_mtime_ns
    fit(config(prepared, tmp_path / "again", **settings))  # with other modes, on the same tokens
    assert (prepared / "tokens.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="holds other tokens"):
        fit(config(prepared, tmp_path / "other", **{**settings, "image_size": 8}))


def test_encoding_goes_on_where_it_was_stopped(images, tmp_path, monkeypatch):
    """Images without latents: the source is fitted to their tokens."""
    tiny_encoder("dinov2", tmp_path / "encoder")
    data = tmp_path / "images"
    for file in sorted(images.rglob("*.png")):
        if file.name != "15b.png":
            (data / file.parent.name).mkdir(parents=True, exist_ok=True)
            (data / file.parent.name / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr("training.data.encode_tokens.PART", 20)
    settings = {"encoder": str(tmp_path / "encoder"), "encoder_size": 16, "image_size": 16}
    good = (data / "right" / "20.png").read_bytes()
    (data / "right" / "20.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"20\.png cannot be read"):
        fit(config(data, tmp_path / "out", **settings))
    assert len(list((tmp_path / "out" / "tokens.parts").iterdir())) == 2
    (data / "right" / "20.png").write_bytes(good)
    for name in ("00009.safetensors", "mine.txt"):  # of an encoding of more images; of others
        (tmp_path / "out" / "tokens.parts" / name).write_bytes(b"")
    written = []

    def write(path, *arguments):
        written.append(path.name)
        write_tokens(path, *arguments)

    monkeypatch.setattr("training.data.encode_tokens.write_tokens", write)
    source = fit(config(data, tmp_path / "out", **settings))
    assert written == ["00002.safetensors", "tokens.safetensors"]
    assert [path.name for path in (tmp_path / "out" / "tokens.parts").iterdir()] == ["mine.txt"]
    assert (source.shape, source.is_spherical) == ((16,), False)


AVERAGES = """
import torch
from training import fit_source
from training.data import encode_tokens as tokens

class Average(torch.nn.Module):
    def forward(self, images):
        return images.mean(3).flatten(1)

    def token(self, hidden):
        return hidden

tokens.PART = 20
tokens.load_encoder = lambda *_: Average()
fit_source.main()
"""


def by_two(*options):
    """Run two processes without a launcher; return (stderr, exit status) of each."""
    more = ["--encoder", "average", "--image-size", "16", "--device", "cpu", "--workers", "0"]
    return [end[1:] for end in forked.run_ranks("-c", AVERAGES, *options, *more)]


def test_a_process_may_have_no_part(images, tmp_path):
    """With one image for two processes, one process encodes, fits and adds up nothing."""
    (tmp_path / "images" / "left").mkdir(parents=True)
    shutil.copy(images / "left" / "00.png", tmp_path / "images" / "left")
    settings = {"size": 16, "pixels": True, "workers": 0, "device": "cpu", "flip": False}
    prepare(PreparationConfig(data=tmp_path / "images", out=tmp_path / "prepared", **settings))
    for said, status in by_two(
        "--data", tmp_path / "prepared", "--out", tmp_path / "out", "--modes", "1"
    ):
        assert status == 0, said
    source, (x, _) = (
        load_source(tmp_path / "out"),
        LatentDataset(tmp_path / "prepared").__getitems__([0]),
    )
    assert torch.allclose(source.means, x)
    assert torch.allclose(source.assigner.means, x.mean(3).flatten(1), atol=1e-6)
    assert torch.equal(source.weights, torch.ones(1))


def test_an_error_of_one_process_ends_all(images, tmp_path):
    """Both end with its message; the broken file is in the part of the first one."""
    ends = by_two("--data", images, "--out", tmp_path / "out", "--modes", "2")
    for said, status in ends:
        assert status == 1, said
        assert re.search(r"15b\.png cannot be read", said), said
    assert "Traceback" not in "".join(said for said, _ in ends)
