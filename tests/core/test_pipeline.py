"""From names of classes to pictures: a published folder with its VAE, and the shipped digits."""

import shutil
import sys

import pytest
import torch
from PIL import Image, ImageChops
from safetensors.torch import load_file

from gmflow_core import Guidance, ImagePipeline, load_checkpoint, sample_images, save_checkpoint
from gmflow_core import pipeline as pipeline_module
from gmflow_core.cli import main
from gmflow_core.files.checkpoint import SHIPPED
from gmflow_core.models.precision import set_precision
from gmflow_core.pictures import to_picture
from tests.core.conftest import LABELS
from tests.diffusers_folder import change_json, random_model, write_published_folder

WORDS = ["tench", "toilet tissue"]
SETTINGS = {"solver": "gm-sde", "steps": 2, "guidance": 0.45}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder in the published layout, with a tiny random VAE: images of 64 pixels."""
    try:
        import diffusers  # noqa: F401
        from diffusers import AutoencoderKL  # noqa: F401
    except (ImportError, RuntimeError) as error:  # RuntimeError: one of its own imports fails
        pytest.skip(f"diffusers does not import: {error}")
    folder = tmp_path_factory.mktemp("published") / "birds"
    return write_published_folder(folder, random_model(), labels=LABELS, vae_weights=True)


def sample(source, out, *options):
    """Run `gmflow sample` with the settings above."""
    command = ["sample", str(source), "--solver", "gm-sde", "--steps", "2", "--guidance", ".45"]
    main([*command, "--device", "cpu", "--out", str(out), *options])


def test_pictures_are_the_decoded_latents(published):
    from diffusers import AutoencoderKL

    pipeline = ImagePipeline.load(published, device="cpu")
    assert pipeline.label_ids([*WORDS, 2, "größer"]) == [0, 9, 2, 2]
    calls = []
    pictures = pipeline(WORDS, seeds=[7, 3], progress=lambda *at: calls.append(at), **SETTINGS)
    assert calls == [(1, 2), (2, 2)]
    network, _ = load_checkpoint(published)
    settings = {**SETTINGS, "guidance": Guidance(0.45)}
    latents = sample_images(network, torch.tensor([0, 9]), seeds=[7, 3], **settings)
    vae = AutoencoderKL.from_pretrained(
        published / "vae", variant="bf16", torch_dtype=torch.float32
    )
    with torch.no_grad():
        images = vae.decode(latents / vae.config.scaling_factor).sample
    for picture, image in zip(pictures, images, strict=True):
        expected = ((image.clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0)
        found = torch.tensor(list(picture.convert("RGB").tobytes())).reshape(64, 64, 3)
        assert (found - expected).abs().max() <= 1


def test_the_command_writes_a_sheet_and_single_pictures(published, tmp_path):
    options = ["--labels", *WORDS, "--seeds", "5", "6", "7"]
    sample(published, tmp_path / "birds.png", *options)
    sheet = Image.open(tmp_path / "birds.png")
    assert sheet.size == (2 + 3 * 66, 2 + 2 * 66)
    sample(published, tmp_path / "birds", *options[:-1])
    names = sorted(path.name for path in (tmp_path / "birds").iterdir())
    assert names == [
        *("0000_tench_seed5.png", "0000_tench_seed6.png"),
        *("0009_toilet_tissue_seed5.png", "0009_toilet_tissue_seed6.png"),
    ]
    for i, name in enumerate(names):
        x, y = 2 + 66 * (i % 2), 2 + 66 * (i // 2)
        tile = sheet.crop((x, y, x + 64, y + 64))
        single = Image.open(tmp_path / "birds" / name)
        assert max(high for _, high in ImageChops.difference(tile, single).getextrema()) <= 1
    with pytest.raises(SystemExit, match="--count does not go with --seeds"):
        sample(published, tmp_path / "birds.png", *options, "--count", "2")


def test_latents_without_a_vae_say_where_to_get_one(published, tmp_path, monkeypatch):
    bare = tmp_path / "bare"
    shutil.copytree(published, bare)
    shutil.rmtree(bare / "vae")
    out = tmp_path / "a.png"
    with pytest.raises(SystemExit, match=r"latents \('sd-vae'\).* --vae, a folder or hub id"):
        sample(bare, out)
    sample(bare, tmp_path / "a.safetensors", "--labels", "tench", "--count", "1")  # needs none
    assert load_file(tmp_path / "a.safetensors")["samples"].shape == (1, 4, 8, 8)
    with pytest.raises(SystemExit, match="there is no VAE 'nowhere'"):
        sample(bare, out, "--vae", "nowhere")
    sample(bare, out, "--labels", "tench", "--count", "1", "--vae", str(published))
    assert Image.open(out).size == (68, 68)
    shutil.copytree(published / "vae", tmp_path / "other")
    change_json(tmp_path / "other" / "config.json", scaling_factor=0.13025)
    with pytest.raises(SystemExit, match=r"scaling_factor is 0\.13025, but .* with 0\.18215"):
        sample(bare, out, "--vae", str(tmp_path / "other"))
    change_json(tmp_path / "other" / "config.json", _class_name="FluxTransformer2DModel")
    with pytest.raises(SystemExit, match="is of a 'FluxTransformer2DModel', not of an Autoencoder"):
        sample(bare, out, "--vae", str(tmp_path / "other"))
    with pytest.raises(SystemExit, match="no class 'tensch'; near it: 0 tench"):  # before the VAE
        sample(bare, out, "--labels", "tensch", "--vae", "nowhere")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(SystemExit, match=r'pip install "diffusers>=0\.37"'):
        sample(published, out)


def test_a_vae_of_diffusers_decodes_as_the_folder_of_it(published):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(published / "vae", variant="bf16")
    settings = {"seeds": [3], "steps": 1}
    [theirs] = ImagePipeline.load(published, vae=vae)(["tench"], **settings)
    [own] = ImagePipeline.load(published)(["tench"], **settings)
    assert ImageChops.difference(theirs, own).getbbox() is None
    vae.register_to_config(latent_channels=16)
    with pytest.raises(ValueError, match="decodes latents of 16 channels"):
        ImagePipeline.load(published, vae=vae)


def test_a_model_without_classes_takes_no_labels(tmp_path):
    path = tmp_path / "unlabelled.safetensors"
    network, _ = load_checkpoint(SHIPPED / "digits_k8.safetensors")
    save_checkpoint(network, path, data={"space": "pixels", "unlabelled": True})
    with pytest.raises(ValueError, match="was trained without classes; give it no labels"):
        ImagePipeline.load(path)([3])
    with pytest.raises(SystemExit, match="was trained without classes; give it no labels"):
        sample(path, tmp_path / "out.png", "--labels", "3")
    assert len(ImagePipeline.load(path)(None, seeds=[0], steps=1)) == 1


def test_a_hub_id_brings_its_own_vae(published, hub):
    hub.remote = published
    picture = ImagePipeline.load("owner/name", device="cpu")([0], steps=1)[0]
    assert picture.size == (64, 64)
    assert [name.split("/")[0] for name in hub.weights()] == ["spectrum_net", "transformer", "vae"]


def test_digits_and_their_student_of_one_call_need_no_vae(monkeypatch):
    pipeline = ImagePipeline.load(SHIPPED / "digits_one_call.safetensors", device="cpu")
    calls = []
    pictures = pipeline(range(3), seeds=[1, 2, 1], progress=lambda *at: calls.append(at))
    assert calls == [(1, 1)]  # its own number of steps
    assert [picture.size for picture in pictures] == [(8, 8)] * 3
    monkeypatch.setattr(pipeline_module, "MOST_AT_ONCE", 2)
    x = pipeline.sample([0, 1, 2], seeds=[1, 2, 1])
    assert torch.allclose(pipeline.sample([2], seeds=[1]), x[2:], atol=1e-5)
    with pytest.raises(ValueError, match="2 seeds do not fit 1 labels"):
        pipeline.sample([0], seeds=[1, 2])
    with pytest.raises(ValueError, match="there are no labels"):
        pipeline([])
    with pytest.raises(ValueError, match="guidance needs classes"):
        pipeline(None, seeds=[1], guidance=0.3)
    assert pipeline.label_ids(torch.tensor([3, 7])) == pipeline.label_ids(["3", "7"]) == [3, 7]
    with pytest.raises(ValueError, match="pixels, which need no VAE"):
        ImagePipeline.load(SHIPPED / "digits_k8.safetensors", vae="a/b")
    with pytest.raises(ValueError, match="is a model of points"):
        ImagePipeline.load(SHIPPED / "checkerboard_k64.safetensors")
    with pytest.raises(ValueError, match="was trained with a mixture source; give it as --source"):
        ImagePipeline.load(SHIPPED / "digits_modes_k8.safetensors")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"precision": "float32"}, "precision is 'float32'; choose one of auto, bf16, fp32"),
        ({"precision": "fp16"}, "precision is 'fp16'; choose"),
        ({"precision": None}, "precision is None; choose"),
        ({"device": "cuda:99"}, r"the device cuda:99 cannot be used here: .*; give another one"),
        ({"device": "abacus"}, "the device abacus cannot be used here"),
        ({"device": 1.5}, "the device 1.5 cannot be used here"),
        ({"model": None}, "None is no path and no hub id; give a text or a Path"),
        ({"vae": None, "model": 3}, "3 is no path and no hub id"),
        ({"source": 3}, "3 is no path and no hub id"),
    ],
)
def test_what_cannot_be_loaded_is_said_clearly(settings, said):
    settings = {"model": SHIPPED / "digits_k8.safetensors", **settings}
    with pytest.raises(ValueError, match=said):
        ImagePipeline.load(**settings)


def test_devices_and_precisions_are_checked_for_all_callers():
    with pytest.raises(ValueError, match=r"the device cuda:99 cannot be used here"):
        load_checkpoint(SHIPPED / "digits_k8.safetensors", device="cuda:99")
    with pytest.raises(ValueError, match="precision is 'auto'; choose one of bf16, fp32"):
        set_precision(torch.nn.Linear(1, 1), "auto")


def test_numbers_are_numbers_where_classes_are_called_by_other_numbers(tmp_path):
    """Folders 1, 10 and 2 are the classes 0, 1 and 2: a text is a name first, a number is not."""
    network, _ = load_checkpoint(SHIPPED / "digits_one_call.safetensors")
    names = ["1", "10", "2", *"3456789"]
    pipeline = ImagePipeline(network, {"space": "pixels", "labels": names})
    assert pipeline.label_ids(["1", "10", "2", "0"]) == [0, 1, 2, 0]
    assert pipeline.label_ids([0, 1, 2]) == [0, 1, 2]
    with pytest.raises(ValueError, match=r"there is no class 10; .* numbered from 0 to 9"):
        pipeline.label_ids([10])
    path = tmp_path / "names.safetensors"
    save_checkpoint(network, path, data=pipeline.data)
    sample = ["sample", str(path), "--labels", "10", "2", "--count", "1", "--steps", "1"]
    main([*sample, "--out", str(tmp_path / "a")])
    drawn = {file.name for file in (tmp_path / "a").iterdir()}
    assert drawn == {"0001_10_seed0.png", "0002_seed1.png"}
    own = pipeline.decode(pipeline.sample([1], seeds=[0], steps=1))
    picture = to_picture(Image.open(tmp_path / "a" / "0001_10_seed0.png"))
    assert torch.allclose(picture, own[0].permute(1, 2, 0), atol=2 / 255)
