"""Published models: folders and hub ids load as the model that was written; `gmflow convert`; errors that say what to do."""

import inspect
import json
import math
import pickle
import shutil
import sys
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from gmflow_core import load_checkpoint, read_metadata
from gmflow_core.cli import main
from gmflow_core.models import GMDiT
from gmflow_core.models.gmdit import GMDiTConfig
from tests.diffusers_folder import (
    change_json,
    random_model,
    write_json,
    write_published_folder,
    write_weights,
)
from tests.helpers import normal

LABELS = {"0": "tench, Tinca tinca", "2": "größer", "9": "toilet tissue"}
WEIGHTS = "diffusion_pytorch_model.bf16.safetensors"


@pytest.fixture
def model():
    return random_model()


@pytest.fixture
def folder(tmp_path, model):
    return write_published_folder(tmp_path / "published", model, labels=LABELS)


def same_model(loaded, model):
    """The same config, names and values, and the same output."""
    assert loaded.config == model.config
    expected, found = model.state_dict(), loaded.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name].to(found[name].dtype)) for name in expected)
    size, labels = model.config.latent_size, torch.tensor([0, model.config.num_classes])
    x, sigma = normal(2, model.config.channels, size, size), torch.tensor([0.9, 0.2])
    actual, wanted = (
        loaded(x, sigma, labels),
        model.to(next(loaded.parameters()).dtype)(x, sigma, labels),
    )
    return torch.equal(actual.means, wanted.means) and torch.equal(actual.log_std, wanted.log_std)


# Folders


@pytest.mark.parametrize("dtype", [None, torch.float32])
@pytest.mark.parametrize(
    ("underscore", "library"),
    [(True, "lib"), (False, "lib"), (True, "lakonlab"), (False, "lakonlab")],
)
def test_a_folder_loads_as_the_model_that_was_written(tmp_path, model, underscore, library, dtype):
    written = write_published_folder(tmp_path / "x", model, underscore=underscore, library=library)
    loaded, config = load_checkpoint(written, dtype=dtype)
    assert config == loaded.config
    assert {p.dtype for p in loaded.parameters()} == {dtype or torch.bfloat16}
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert same_model(loaded, model)


@pytest.mark.parametrize(
    "changes",
    [
        {"spectrum_layers": None},
        {"constant_log_std": 0.0, "num_components": 1},
        {"log_std_layers": 3, "patch_size": 1, "latent_size": 6, "channels": 3},
    ],
)
def test_other_configs_load_too(tmp_path, changes):
    model = random_model(**changes)
    assert same_model(
        load_checkpoint(write_published_folder(tmp_path / "x", model), dtype=None)[0], model
    )


@pytest.mark.parametrize("variant", [None, "bf16"])
@pytest.mark.parametrize("shards", [None, 3])
def test_every_way_of_storing_the_weights_loads(tmp_path, model, variant, shards):
    written = write_published_folder(tmp_path / "x", model, variant=variant, shards=shards)
    assert same_model(load_checkpoint(str(written), dtype=None)[0], model)


def test_of_two_variants_the_smaller_is_read(tmp_path, model):
    written = write_published_folder(tmp_path / "x", model)
    write_published_folder(written, random_model(torch.float32, seed=1), variant=None)
    assert same_model(load_checkpoint(written, dtype=None)[0], model)


def test_metadata_of_a_folder(folder, model):
    metadata = read_metadata(folder)
    assert metadata["model_class"] == "GMDiT"
    assert GMDiTConfig(**metadata["config"]) == model.config
    assert json.loads(json.dumps(metadata)) == metadata
    labels = metadata["data"].pop("labels")
    assert labels[:4] == ["tench, Tinca tinca", "class 1", "größer", "class 3"]
    assert len(labels) == 10
    assert labels[9] == "toilet tissue"
    assert metadata["data"] == {"space": "sd-vae", "scaling_factor": 0.18215}


def test_what_is_not_needed_may_be_missing(folder, model):
    for path in ("vae", "scheduler", "model_index.json"):
        shutil.rmtree(folder / path) if (folder / path).is_dir() else (folder / path).unlink()
    assert same_model(load_checkpoint(folder, dtype=None)[0], model)
    assert read_metadata(folder)["data"] == {"space": "sd-vae", "scaling_factor": 0.18215}


def test_the_scaling_factor_is_the_vaes(folder):
    change_json(folder / "vae" / "config.json", scaling_factor=0.3)
    assert read_metadata(folder)["data"]["scaling_factor"] == 0.3


def test_a_spectrum_network_that_got_lost_is_missed_aloud(folder):
    shutil.rmtree(folder / "spectrum_net")
    with pytest.warns(
        UserWarning, match="published: model_index.json names a spectrum_net, .* missing"
    ):
        assert load_checkpoint(folder)[1].spectrum_layers is None


def test_the_folder_is_one_that_diffusers_knows(tmp_path, model):
    try:
        from diffusers import AutoencoderKL
    except (
        ImportError,
        RuntimeError,
    ) as error:  # diffusers imports lazily, and says RuntimeError of what it depends on
        pytest.skip(f"diffusers does not import: {error}")
    written = write_published_folder(tmp_path / "x", model, vae_weights=True)
    vae = AutoencoderKL.from_pretrained(written / "vae", variant="bf16")
    assert vae.decode(torch.zeros(1, 4, 8, 8)).sample.shape == (1, 3, 64, 64)
    assert read_metadata(written)["data"]["scaling_factor"] == vae.config.scaling_factor


def test_the_published_model_at_full_size(tmp_path):
    """Its names and shapes, without its weights."""
    layout = json.loads(
        (Path(__file__).parents[1] / "golden" / "gmdit_imagenet_k8_layout.json").read_text()
    )
    expected = {}
    for part, prefix in (("transformer", ""), ("spectrum_net", "spectrum_net.")):
        write_json(tmp_path / part / "config.json", layout[part]["config"])
        for name, shape in layout[part]["shapes"].items():
            copies = layout[part]["config"]["num_layers"] if "{}" in name else 1
            expected.update({prefix + name.format(i): tuple(shape) for i in range(copies)})
    with torch.device("meta"):
        network = GMDiT(GMDiTConfig(**read_metadata(tmp_path)["config"]))
    assert network.config == GMDiTConfig(spectrum_layers=(64, 8))
    found = {name: tuple(t.shape) for name, t in network.state_dict().items()}
    assert found == expected
    sizes = [layout[part]["parameters"] for part in ("transformer", "spectrum_net")]
    assert sizes[0] == 676_164_001
    assert (
        sum(math.prod(shape) for shape in found.values())
        == sum(p.numel() for p in network.parameters())
        == sum(sizes)
    )


# Folders that are something else

CONFIGS = {  # part, changes to its config.json, the error
    "class": (
        "transformer",
        {"_class_name": "FluxTransformer2DModel"},
        "a FluxTransformer2DModel, not of a GMDiT.*own loader",
    ),
    "norm": (
        "transformer",
        {"norm_type": "layer_norm"},
        "norm_type = 'layer_norm'; .* only 'ada_norm_zero'",
    ),
    "affine": (
        "transformer",
        {"norm_elementwise_affine": True},
        "norm_elementwise_affine = True; .* only False",
    ),
    "eps": ("transformer", {"norm_eps": 1e-6}, "norm_eps = 1e-06; .* only 1e-05"),
    "activation": (
        "transformer",
        {"activation_fn": "geglu"},
        "activation_fn = 'geglu'; .* only 'gelu-approximate'",
    ),
    "bias": ("transformer", {"attention_bias": False}, "attention_bias = False; .* only True"),
    "channels": ("transformer", {"out_channels": 8}, "out_channels = 8; .* only None or 4"),
    "missing": ("transformer", {"num_gaussians": ...}, "config.json lacks num_gaussians"),
    "not a number": (
        "transformer",
        {"num_embeds_ada_norm": None},
        "num_embeds_ada_norm = None instead of a whole number",
    ),
    "out of range": ("transformer", {"num_gaussians": 0}, "num_components is 0"),
    "spectrum's class": (
        "spectrum_net",
        {"_class_name": "SpectrumCNN"},
        "a SpectrumCNN, not of a SpectrumMLP",
    ),
    "spectrum's size": (
        "spectrum_net",
        {"base_size": [4, 9, 9]},
        r"base_size = \[4, 9, 9\], .* \[4, 8, 8\]",
    ),
    "spectrum's layers": ("spectrum_net", {"layers": 64}, "layers = 64 instead of a list"),
}


@pytest.mark.parametrize(("part", "changes", "complaint"), CONFIGS.values(), ids=CONFIGS.keys())
def test_a_config_of_another_kind_is_quoted(folder, part, changes, complaint):
    change_json(folder / part / "config.json", **changes)
    with pytest.raises(ValueError, match=f"published.*{complaint}"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("path", "content", "complaint"),
    [
        ("transformer/config.json", "{", "published/transformer: config.json is unreadable"),
        ("model_index.json", "[]", "published: model_index.json holds a list instead of settings"),
        ("model_index.json", '{"id2label": {"cat": 1}}', "id2label has the key 'cat'"),
    ],
)
def test_json_of_another_kind_is_named(folder, path, content, complaint):
    (folder / path).write_text(content)
    with pytest.raises(ValueError, match=complaint):
        read_metadata(folder)


def test_a_folder_without_a_transformer_is_named(folder):
    shutil.rmtree(folder / "transformer")
    with pytest.raises(
        ValueError,
        match=r"published is a folder without transformer/config\.json.* model_index\.json and",
    ):
        load_checkpoint(folder)


def test_tensors_that_do_not_fit_are_named(folder):
    weights = folder / "spectrum_net" / WEIGHTS
    save_file({**load_file(weights), "mlp.0.bias": torch.zeros(7)}, weights)
    with pytest.raises(
        ValueError,
        match=r"published: 1 tensors .*'spectrum_net.mlp.0.bias': expected \(6,\), found \(7,\)",
    ):
        load_checkpoint(folder)


def test_pickles_are_not_read(folder):
    (folder / "transformer" / WEIGHTS).rename(
        folder / "transformer" / "diffusion_pytorch_model.bin"
    )
    with pytest.raises(
        ValueError,
        match=r"published/transformer holds no .*diffusion_pytorch_model\.bin.* never read",
    ):
        load_checkpoint(folder)
    (folder / "transformer" / WEIGHTS).write_bytes(pickle.dumps({"weight": 1}))
    with pytest.raises(ValueError, match=r"is a pickle file"):
        load_checkpoint(folder)


def test_shards_that_are_missing_or_elsewhere_are_named(tmp_path, model):
    written = write_published_folder(tmp_path / "x", model, shards=2)
    shard = "diffusion_pytorch_model.bf16-00002-of-00002.safetensors"
    (written / "transformer" / shard).unlink()
    with pytest.raises(ValueError, match=f"x/transformer/{shard} is missing"):
        load_checkpoint(written)
    index = written / "transformer" / "diffusion_pytorch_model.safetensors.index.bf16.json"
    change_json(index, weight_map={"proj_out_1.bias": "../../elsewhere.safetensors"})
    with pytest.raises(ValueError, match="weight_map does not name files beside it"):
        load_checkpoint(written)


# The hub


class Hub:
    """In place of huggingface_hub.snapshot_download: copies those files of a folder that match."""

    def __init__(self, remote, cache):
        self.remote, self.cache, self.calls = remote, cache, []

    def __call__(self, repo_id, *, revision=None, allow_patterns=None):
        self.calls.append((repo_id, revision))
        for path in self.remote.rglob("*"):
            name = path.relative_to(self.remote).as_posix()
            if path.is_file() and any(fnmatch(name, pattern) for pattern in allow_patterns):
                (self.cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, self.cache / name)
        return str(self.cache)

    def weights(self):
        """What was downloaded of them."""
        return sorted(
            path.relative_to(self.cache).as_posix() for path in self.cache.rglob("*.safetensors")
        )


@pytest.fixture
def hub(tmp_path, folder, monkeypatch):
    (folder / "vae" / WEIGHTS).write_bytes(b"not needed")
    (folder / "README.md").write_text("not needed")
    arguments = inspect.signature(huggingface_hub.snapshot_download).parameters
    assert {"repo_id", "revision", "allow_patterns"} <= arguments.keys()
    hub = Hub(folder, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    monkeypatch.chdir(tmp_path)
    return hub


@pytest.mark.parametrize(
    ("source", "call"),
    [
        ("Lakonik/gmflow_imagenet_k8_ema", ("Lakonik/gmflow_imagenet_k8_ema", None)),
        ("me/FLUX.1-x@refs/pr/1", ("me/FLUX.1-x", "refs/pr/1")),
        (Path("owner/name@v2"), ("owner/name", "v2")),
    ],
)
def test_a_hub_id_is_downloaded_and_loaded(hub, model, source, call):
    assert read_metadata(source)["data"]["labels"][0] == "tench, Tinca tinca"
    assert hub.weights() == []
    assert same_model(load_checkpoint(source, dtype=None)[0], model)
    assert set(hub.calls) == {call}


def test_only_one_variant_of_the_weights_is_downloaded(hub, model):
    for part in ("transformer", "spectrum_net"):
        for name in (
            "diffusion_pytorch_model.safetensors",
            "diffusion_pytorch_model.fp16.safetensors",
        ):
            (hub.remote / part / name).write_bytes(b"not needed")
    load_checkpoint("owner/name")
    assert hub.weights() == [f"spectrum_net/{WEIGHTS}", f"transformer/{WEIGHTS}"]
    assert not (hub.cache / "README.md").exists()


@pytest.mark.parametrize("shards", [None, 2])
def test_weights_in_full_precision_are_downloaded_where_there_are_no_others(hub, shards):
    model = random_model(torch.float32)
    shutil.rmtree(hub.remote / "transformer")
    write_published_folder(hub.remote, model, variant=None, shards=shards)
    (hub.remote / "transformer" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(
        b"not needed"
    )
    loaded, _ = load_checkpoint("owner/name", dtype=None)
    assert {p.dtype for p in loaded.spectrum_net.parameters()} == {torch.bfloat16}
    assert torch.equal(loaded.proj_out_2.weight, model.proj_out_2.weight)
    assert len(hub.weights()) == 1 + (shards or 1)


def test_nothing_large_is_downloaded_of_another_model(hub):
    change_json(hub.remote / "transformer" / "config.json", _class_name="FluxTransformer2DModel")
    with pytest.raises(
        ValueError, match=r"owner/name/transformer/config.json is of a FluxTransformer2DModel"
    ):
        load_checkpoint("owner/name")
    assert hub.weights() == []


def test_what_is_on_disk_comes_before_the_hub(hub, folder, tmp_path, model):
    shutil.copytree(folder, tmp_path / "owner" / "name")
    assert same_model(load_checkpoint("owner/name", dtype=None)[0], model)
    assert hub.calls == []


@pytest.mark.parametrize(
    "source",
    ["nothing", "a/b/c", "./a/b", "../b", "/a/b", "runs/model.safetensors", "runs/model.pt"],
)
def test_what_is_neither_a_path_nor_an_id_does_not_go_to_the_hub(hub, source):
    with pytest.raises(
        FileNotFoundError, match=f"there is no checkpoint {Path(source)}: .*no hub id"
    ):
        load_checkpoint(source)
    assert hub.calls == []


@pytest.mark.parametrize(
    "error",
    [ConnectionError("Name or\nservice not known"), RuntimeError("401"), ValueError("bad id")],
)
def test_a_hub_that_does_not_answer_is_named_with_what_to_do(hub, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    with pytest.raises(
        OSError,
        match=rf"owner/name is no file or folder .*\({reason}\).* by other means and give its path",
    ):
        load_checkpoint("owner/name")


def test_without_the_hubs_package_it_says_how_to_get_it(hub, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        ValueError, match=r"owner/name is no file .*pip install huggingface_hub.* other means"
    ):
        read_metadata("owner/name")


# The command


@pytest.mark.parametrize(
    ("choice", "dtype"),
    [("keep", "bfloat16"), ("bf16", "bfloat16"), ("fp32", "float32"), ("fp16", "float16")],
)
def test_convert_writes_the_same_model_as_one_file(folder, model, tmp_path, capsys, choice, dtype):
    out = tmp_path / "new" / "model.safetensors"
    main(["convert", str(folder), str(out), "--dtype", choice])
    count = sum(p.numel() for p in model.parameters())
    assert capsys.readouterr().out.startswith(
        f"{out}: GMDiT, parameters: {count:,} in torch.{dtype}, 0.0"
    )
    loaded, _ = load_checkpoint(out, dtype=None)
    assert {p.dtype for p in loaded.parameters()} == {getattr(torch, dtype)}
    assert read_metadata(out) == read_metadata(folder)
    assert same_model(loaded, model)
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_convert_overwrites_only_when_told(folder, tmp_path):
    out = tmp_path / "model.safetensors"
    out.write_text("precious")
    with pytest.raises(SystemExit, match=r"model\.safetensors is there already; .*--force"):
        main(["convert", str(folder), str(out)])
    assert out.read_text() == "precious"
    main(["convert", str(folder), str(out), "--force"])
    main(["convert", str(out), str(out), "--force", "--dtype", "fp32"])
    assert next(load_checkpoint(out, dtype=None)[0].parameters()).dtype == torch.float32


def test_convert_takes_hub_ids_and_refuses_other_names(hub, tmp_path):
    main(["convert", "owner/name", "model.safetensors"])
    assert read_metadata(tmp_path / "model.safetensors")["data"]["space"] == "sd-vae"
    with pytest.raises(SystemExit, match=r"model\.ckpt must end in \.safetensors"):
        main(["convert", "owner/name", "model.ckpt"])


def test_inspect_shows_what_the_samples_are(hub, folder, tmp_path, capsys):
    for source in (str(folder), "owner/name"):
        main(["inspect", source])
        out = capsys.readouterr().out
        assert f"{source}: GMDiT" in out
        assert (
            'data: 10 labels ("tench, Tinca tinca", "class 1", "größer", ...), space "sd-vae", scaling_factor 0.18215'
            in out
        )


def test_weights_beside_the_config_are_all_that_is_read(folder):
    """A file of another variant does not get in the way."""
    write_weights(folder / "transformer", {"other": torch.zeros(1)}, "fp16", None)
    load_checkpoint(folder)
