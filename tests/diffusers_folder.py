"""Write a small random GM-DiT in the layout of diffusers, for the tests that load one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from gmflow_core.models import GMDiT
from gmflow_core.models.gmdit import GMDiTConfig
from tests.helpers import normal

WEIGHTS = "diffusion_pytorch_model.bf16.safetensors"
TINY = {
    "num_components": 3,
    "channels": 4,
    "latent_size": 8,
    "num_classes": 10,
    "num_layers": 2,
    "num_heads": 2,
    "head_dim": 8,
    "log_std_dim": 16,
    "spectrum_layers": (6, 4),
}


def random_model(dtype: torch.dtype = torch.bfloat16, seed: int = 0, **changes) -> GMDiT:
    """Return a tiny GM-DiT without the zeros of a fresh one; `changes` are to its config."""
    model = GMDiT(GMDiTConfig(**{**TINY, **changes}))
    for i, parameter in enumerate(model.parameters()):
        parameter.data.copy_(0.1 * normal(*parameter.shape, seed=1000 * seed + i))
    return model.to(dtype).eval().requires_grad_(False)


def same_model(loaded: GMDiT, model: GMDiT) -> bool:
    """Compare config, names and values, and return whether the output is the same."""
    assert loaded.config == model.config
    expected, found = model.state_dict(), loaded.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name].to(found[name].dtype)) for name in expected)
    size, labels = model.config.latent_size, torch.tensor([0, model.config.num_classes])
    x, sigma = normal(2, model.config.channels, size, size), torch.tensor([0.9, 0.2])
    actual = loaded(x, sigma, labels)
    wanted = model.to(next(loaded.parameters()).dtype)(x, sigma, labels)
    return torch.equal(actual.means, wanted.means) and torch.equal(actual.log_std, wanted.log_std)


def write_published_folder(
    folder: Path,
    model: GMDiT,
    *,
    underscore: bool = True,
    library: str = "lib",
    variant: str | None = "bf16",
    labels: dict[str, Any] | None = None,
    shards: int | None = None,
    vae_weights: bool = False,
) -> Path:
    """Write model_index.json, transformer/, spectrum_net/, scheduler/ and vae/, as published.

    Args:
        underscore: the class names begin with an underscore.
        library: of the classes, "lib" or "lakonlab".
        variant: of the weights' files, None for full precision.
        labels: id2label; left out if None.
        shards: number of files for the transformer's weights; None: one without an index.
        vae_weights: vae/ holds the weights of a tiny random AutoencoderKL too (needs diffusers).
    """
    config, mark = model.config, "_" if underscore else ""
    parts = {"transformer": transformer_config(config, mark)}
    if config.spectrum_layers is not None:
        parts["spectrum_net"] = {
            "_class_name": f"{mark}SpectrumMLP",
            "_diffusers_version": "0.32.2",
            "base_size": [config.channels, config.latent_size, config.latent_size],
            "layers": list(config.spectrum_layers),
        }
    index = {"_class_name": "GMDiTPipeline", "_diffusers_version": "0.32.2"}
    if labels is not None:
        index["id2label"] = labels
    index["scheduler"] = [
        f"{library}.models.diffusions.schedulers.flow_euler_ode",
        "FlowEulerODEScheduler",
    ]
    for part, settings in parts.items():
        index[part] = [f"{library}.models.architecture.gmflow", settings["_class_name"]]
        write_json(folder / part / "config.json", settings)
    index["vae"] = ["diffusers", "AutoencoderKL"]
    write_json(folder / "model_index.json", index)
    scheduler = {"_class_name": "FlowEulerODEScheduler", "num_train_timesteps": 1000, "shift": 1.0}
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)

    weights = {"transformer": {}, "spectrum_net": {}}
    for name, tensor in model.state_dict().items():
        part = "spectrum_net" if name.startswith("spectrum_net.") else "transformer"
        weights[part][name.removeprefix("spectrum_net.")] = tensor.clone()
    for part in parts:
        write_weights(
            folder / part, weights[part], variant, shards if part == "transformer" else None
        )
    write_vae(folder / "vae", config.channels, vae_weights)
    return folder


def transformer_config(config: GMDiTConfig, mark: str) -> dict[str, Any]:
    """Return the content of transformer/config.json."""
    return {
        "_class_name": f"{mark}GMDiTTransformer2DModel",
        "_diffusers_version": "0.32.2",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": config.head_dim,
        "class_dropout_prob": 0.0,
        "constant_logstd": config.constant_log_std,
        "dropout": 0.0,
        "gm_num_logstd_layers": config.log_std_layers,
        "in_channels": config.channels,
        "logstd_inner_dim": config.log_std_dim,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-5,
        "norm_num_groups": 32,
        "norm_type": "ada_norm_zero",
        "num_attention_heads": config.num_heads,
        "num_embeds_ada_norm": config.num_classes,
        "num_gaussians": config.num_components,
        "num_layers": config.num_layers,
        "out_channels": None,
        "patch_size": config.patch_size,
        "sample_size": config.latent_size,
        "upcast_attention": False,
    }


def write_weights(
    folder: Path, tensors: dict[str, Tensor], variant: str | None, shards: int | None
) -> None:
    """Write tensors as one file, or in shards with an index."""
    stem = f"diffusion_pytorch_model{f'.{variant}' if variant else ''}"
    if shards is None:
        save_file(tensors, folder / f"{stem}.safetensors", {"format": "pt"})
        return
    names = [f"{stem}-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    weight_map = {name: names[i % shards] for i, name in enumerate(tensors)}
    for file in names:
        save_file(
            {name: tensors[name] for name in tensors if weight_map[name] == file},
            folder / file,
            {"format": "pt"},
        )
    index = f"diffusion_pytorch_model.safetensors.index{f'.{variant}' if variant else ''}.json"
    write_json(folder / index, {"metadata": {"total_size": 0}, "weight_map": weight_map})


def write_vae(folder: Path, channels: int, weights: bool) -> None:
    """Write the config of a tiny AutoencoderKL, and its weights if told to."""
    settings = {
        "act_fn": "silu",
        "block_out_channels": [8, 8, 8, 8],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "in_channels": 3,
        "latent_channels": channels,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "out_channels": 3,
        "sample_size": 64,
        "scaling_factor": 0.18215,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    }
    if weights:
        from diffusers import AutoencoderKL

        torch.manual_seed(0)
        AutoencoderKL(**settings).to(torch.bfloat16).save_pretrained(folder, variant="bf16")
    else:
        write_json(folder / "config.json", {"_class_name": "AutoencoderKL", **settings})


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file; missing folders are created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def change_json(path: Path, **changes: Any) -> None:
    """Set entries of a JSON file; ... removes one."""
    content = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    write_json(path, {name: value for name, value in content.items() if value is not ...})
