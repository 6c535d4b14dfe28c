"""Folders in the layout of diffusers load as the model that was written; errors say what to do."""

import json
import math
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gmflow_core import load_checkpoint, read_metadata
from gmflow_core.models import GMDiT
from gmflow_core.models.gmdit import GMDiTConfig
from tests.diffusers_folder import (
    WEIGHTS,
    change_json,
    random_model,
    same_model,
    write_json,
    write_published_folder,
    write_weights,
)


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
    except (ImportError, RuntimeError) as error:  # RuntimeError: one of its own imports fails
        pytest.skip(f"diffusers does not import: {error}")
    written = write_published_folder(tmp_path / "x", model, vae_weights=True)
    vae = AutoencoderKL.from_pretrained(written / "vae", variant="bf16")
    assert vae.decode(torch.zeros(1, 4, 8, 8)).sample.shape == (1, 3, 64, 64)
    assert read_metadata(written)["data"]["scaling_factor"] == vae.config.scaling_factor


def test_the_published_model_at_full_size(tmp_path):
    """Compare names and shapes with those of the published files."""
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


def test_weights_beside_the_config_are_all_that_is_read(folder):
    """Ignore a file of another variant."""
    write_weights(folder / "transformer", {"other": torch.zeros(1)}, "fp16", None)
    load_checkpoint(folder)


# Folders that are something else

CONFIGS = {  # part, changes to its config.json, the error
    "class": (
        "transformer",
        {"_class_name": "FluxTransformer2DModel"},
        "a 'FluxTransformer2DModel', not of a GMDiT.*own loader",
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
    "too many": (
        "transformer",
        {"num_embeds_ada_norm": 30_000_000},
        "30,000,000 classes; the most is 1,000,000",
    ),
    "not a number": (
        "transformer",
        {"num_embeds_ada_norm": None},
        "num_embeds_ada_norm = None instead of a whole number",
    ),
    "out of range": ("transformer", {"num_gaussians": 0}, "num_components is 0"),
    "spectrum's class": (
        "spectrum_net",
        {"_class_name": "SpectrumCNN"},
        "a 'SpectrumCNN', not of a SpectrumMLP",
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
        (
            "transformer/config.json",
            "{",
            "published/transformer/config.json has no readable content",
        ),
        ("model_index.json", "[]", "published/model_index.json holds a list instead of settings"),
        ("model_index.json", '{"id2label": {"cat": 1}}', "has the key 'cat' in id2label"),
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
    with pytest.raises(ValueError, match="weight_map that does not name files beside it"):
        load_checkpoint(written)
