"""Tiny random adapters and style LoRAs in the published layouts, for the bases of `bases.py`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from .bases import CHANNELS, HIDDEN, Shapes, linear, random_weights, write

MLP_RATIO = {"flux": 4, "qwen": 4, "flux2": 3}
POLICIES = {  # as their files' policy_config gives them
    "GM": {"type": "GMFlow"},
    "DX": {"type": "DX", "segment_size": 1 / 3.5, "shift": 3.2},
    "polynomial": {"mode": "polynomial", "shift": 3.2, "type": "DX"},  # of dxqwen_p10
    "ArcFlow": {"type": "ArcFlow"},
}


def write_adapter(
    path: Path,
    base: str = "flux",
    *,
    hidden: int | None = None,
    depth: int = 2,
    single: int = 2,
    rank: int = 4,
    K: int = 8,
    logstd_inner: int = 32,
    policy: str = "GM",
    grid: int = 10,
    seed: int = 1,
    strength: float = 0.5,
    dtype: torch.dtype = torch.bfloat16,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write an adapter in the published layout: LoRA weights by diffusers' names, and a head.

    Args:
        base: "flux", "qwen" or "flux2".
        hidden: width of the base; that of its writer in `bases.py` if None.
        K: number of components of a GM or ArcFlow adapter.
        policy: one of POLICIES.
        grid: number of grid points of a DX adapter, or of a polynomial's coefficients.
        strength: size of the LoRA's change of a layer, relative to a random base's layer.
        metadata: metadata of the file; its policy_config if None.
    """
    hidden = hidden or HIDDEN[base]
    shapes = adapter_shapes(base, hidden, depth, single, rank, K, logstd_inner, policy, grid)
    weights = random_weights(shapes, seed, torch.float32)
    for name, weight in weights.items():
        if ".lora_B." in name:
            weight *= strength
    mixed = policy in ("GM", "ArcFlow")
    head, count = ("proj_out_means", K) if mixed else ("proj_out", grid)
    for name in (f"{head}.weight", f"{head}.bias"):  # components scatter around a common one
        each = weights[name].view(count, CHANNELS[base], -1)
        each.copy_(each[:1] + 0.5 * each)
    if policy == "GM":
        weights["proj_out_logstds.3.weight"] *= 0.5
        weights["proj_out_logstds.3.bias"] -= 1.5
    if metadata is None:
        metadata = {"policy_config": json.dumps(POLICIES[policy], separators=(",", ":"))}
    return write(path, {name: weight.to(dtype) for name, weight in weights.items()}, metadata)


def adapter_shapes(
    base: str,
    hidden: int,
    depth: int,
    single: int = 0,
    rank: int = 256,
    count: int = 8,
    logstd_inner: int = 1024,
    policy: str = "GM",
    grid: int = 10,
) -> Shapes:
    """Return names and shapes of an adapter with `count` components.

    Raises:
        ValueError: `base` or `policy` is unknown.
    """
    if base not in CHANNELS:
        raise ValueError(f"base is {base!r}, not one of {', '.join(CHANNELS)}")
    if policy not in POLICIES:
        raise ValueError(f"policy is {policy!r}, not one of {', '.join(POLICIES)}")
    shapes: Shapes = {}
    for name, (inputs, outputs) in lora_layers(base, hidden, depth, single).items():
        shapes[f"{name}.lora_A.weight"] = (rank, inputs)
        shapes[f"{name}.lora_B.weight"] = (outputs, rank)
    linear(shapes, "norm_out.linear", hidden, 2 * hidden, bias=base != "flux2")
    if policy in ("DX", "polynomial"):
        linear(shapes, "proj_out", hidden, grid * CHANNELS[base])
        return shapes
    linear(shapes, "proj_out_means", hidden, count * CHANNELS[base])
    linear(shapes, "proj_out_logweights", hidden, count * 4)
    if policy == "ArcFlow":
        linear(shapes, "proj_out_loggamma", hidden, (count - 1) * 4)
        return shapes
    linear(shapes, "proj_out_logstds.1", hidden, logstd_inner)
    linear(shapes, "proj_out_logstds.3", logstd_inner, 1)
    return shapes


def lora_layers(base: str, hidden: int, depth: int, single: int) -> dict[str, tuple[int, int]]:
    """Return inputs and outputs of the layers that a published adapter changes, by name.

    Names are those of diffusers.
    """
    wide = MLP_RATIO[base] * hidden
    embedder = "time_guidance_embed" if base == "flux2" else "time_text_embed"
    layers = {
        f"{embedder}.timestep_embedder.linear_1": (256, hidden),
        f"{embedder}.timestep_embedder.linear_2": (hidden, hidden),
    }
    for i in range(depth):
        block = f"transformer_blocks.{i}"
        if base == "qwen":
            layers[f"{block}.img_mlp.net.0.proj"], layers[f"{block}.img_mlp.net.2"] = (
                (hidden, wide),
                (wide, hidden),
            )
            if i < depth - 1:  # the last block's text output is not used
                layers[f"{block}.txt_mlp.net.0.proj"], layers[f"{block}.txt_mlp.net.2"] = (
                    (hidden, wide),
                    (wide, hidden),
                )
        elif base == "flux":
            for part in ("ff", "ff_context"):
                layers[f"{block}.{part}.net.0.proj"], layers[f"{block}.{part}.net.2"] = (
                    (hidden, wide),
                    (wide, hidden),
                )
        else:
            for part in ("ff", "ff_context"):
                layers[f"{block}.{part}.linear_in"], layers[f"{block}.{part}.linear_out"] = (
                    (hidden, 2 * wide),
                    (wide, hidden),
                )
    for i in range(single):
        block = f"single_transformer_blocks.{i}"
        if base == "flux":
            layers[f"{block}.proj_mlp"], layers[f"{block}.proj_out"] = (
                (hidden, wide),
                (hidden + wide, hidden),
            )
        elif base == "flux2":
            layers[f"{block}.attn.to_out"] = (hidden + wide, hidden)
    return layers


def write_lora(
    path: Path,
    base: str = "flux",
    *,
    hidden: int | None = None,
    depth: int = 2,
    rank: int = 4,
    seed: int = 2,
    strength: float = 1.0,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Write a style LoRA of the image stream's attention.

    Names are kohya's for FLUX and diffusers' for Qwen-Image.
    """
    hidden = hidden or HIDDEN[base]
    if base == "qwen":
        names = [
            f"transformer.transformer_blocks.{i}.attn.{part}"
            for i in range(depth)
            for part in ("to_q", "to_v", "to_out.0")
        ]
        layers, down, up = dict.fromkeys(names, (hidden, hidden)), "lora_A", "lora_B"
    else:
        layers, down, up = {}, "lora_down", "lora_up"
        for i in range(depth):
            layers[f"lora_unet_double_blocks_{i}_img_attn_qkv"] = (hidden, 3 * hidden)
            layers[f"lora_unet_double_blocks_{i}_img_attn_proj"] = (hidden, hidden)
    shapes: Shapes = {}
    for name, (inputs, outputs) in layers.items():
        shapes[f"{name}.{down}.weight"], shapes[f"{name}.{up}.weight"] = (
            (rank, inputs),
            (outputs, rank),
        )
    weights = random_weights(shapes, seed, torch.float32)
    weights = {
        name: (strength * weight if up in name else weight).to(dtype)
        for name, weight in weights.items()
    }
    if base != "qwen":
        weights |= {f"{name}.alpha": torch.tensor(float(rank)) for name in layers}
    return write(path, weights)
