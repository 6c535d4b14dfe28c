"""Compute what the big models need on a card from their shapes; nothing is measured."""

from __future__ import annotations

import torch

from gmflow_core.models.gmdit import GMDiT
from tests.comfyui.adapters import adapter_shapes
from tests.comfyui.bases import flux_shapes, qwen_image_shapes

GB, GIB = 1e9, 2**30
CARDS = (4, 8, 12, 16, 24)  # GiB: a card sold as 8 GB holds 8 GiB
CONTEXT = 600e6  # bytes that CUDA and a display take of a card: a guess
RESERVE = 400 * 2**20  # bytes that ComfyUI keeps free besides on Linux
LEAST_ACTIVATIONS = 0.8 * GIB  # bytes that ComfyUI keeps for activations at least
Q4_K = 144 / 256  # bytes of a weight in GGUF's format Q4_K: a block of 256 has 144


def compute_need() -> list[dict]:
    """Return a row for each model and kind of weights: what it needs on a card, in GB.

    Activations are ComfyUI's own estimate (`memory_usage_factor`, 0.33), or the minimum that it
    keeps for them: for FLUX.1 and Qwen-Image at 1024 x 1024 without a negative prompt, for the
    published GM-DiT with 4 images of 256 x 256 and guidance. One layer at a time is expanded to 16
    bit, or to the 32 bit that GM-DiT computes in.
    """
    models = {
        "FLUX.1": (flux_shapes(3072, 19, 38), adapter_shapes("flux", 3072, 19, 38), 3.1),
        "Qwen-Image": (qwen_image_shapes(3072, 60), adapter_shapes("qwen", 3072, 60), 1.8),
    }
    rows = []
    for model, (shapes, adapter, factor) in models.items():
        blocks = {
            name: shape for name, shape in shapes.items() if len(shape) == 2 and "blocks." in name
        }
        total, inside = (sum(map(count, some.values())) for some in (shapes, blocks))
        head = sum(count(shape) for name, shape in adapter.items() if "lora_" not in name)
        lora = sum(map(count, adapter.values())) - head
        weights = {
            "bf16": 2 * total,
            "fp8": total,
            "8-bit": inside + 4 * sum(shape[0] for shape in blocks.values()) + 2 * (total - inside),
        }
        if model == "FLUX.1":
            weights["Q4_K"] = Q4_K * inside + 2 * (total - inside)
        activations = activations_of(128 * 128, 2, factor)
        largest = 2 * max(map(count, shapes.values()))
        for variant, size in weights.items():
            expanded = 0 if variant == "bf16" else largest
            rows.append(
                row_of(model, variant, total, size, activations, expanded, 2 * head, 2 * lora)
            )
    with torch.device("meta"):
        sizes = [weight.numel() for weight in GMDiT().parameters()]
    total, activations = sum(sizes), activations_of(2 * 4 * 32 * 32, 4, 0.25)
    rows.append(row_of("GM-DiT", "16-bit", total, 2 * total, activations, 4 * max(sizes)))
    return rows


def activations_of(pixels: int, size: int, factor: float) -> float:
    """Return ComfyUI's estimate of the activations in bytes, at least its minimum.

    Args:
        pixels: latent pixels of the batch.
        size: bytes of a number that the network computes with.
        factor: ComfyUI's `memory_usage_factor` of the model.
    """
    return max(pixels * size * 0.01 * factor * 2**20, LEAST_ACTIVATIONS)


def row_of(
    model: str,
    variant: str,
    parameters: int,
    weights: float,
    activations: float,
    expanded: int,
    head: int = 0,
    lora: int = 0,
) -> dict:
    """Return the row of a model with one kind of weights.

    Args:
        parameters: number of parameters.
        weights, activations: bytes of them.
        expanded: bytes of the largest layer as it is expanded for its product.
        head, lora: bytes of an adapter's head (on the card) and LoRA (in host memory).
    """
    need = weights + head + activations + expanded + RESERVE + CONTEXT
    return {
        "model": model,
        "weights": variant,
        "parameters": parameters,
        "weights_gb": round(weights / GB, 2),
        "gm_head_gb": round(head / GB, 3),
        "lora_in_host_gb": round(lora / GB, 2),
        "activations_gb": round(activations / GB, 2),
        "need_gb": round(need / GB, 2),
        **{f"{card}_gb_card": fit(need, weights, card) for card in CARDS},
        "how": "computed",
    }


def count(shape: tuple[int, ...]) -> int:
    """Return the number of elements of a shape."""
    return torch.Size(shape).numel()


def fit(need: float, weights: float, card: int) -> str:
    """Return "fits" for a card of that many GiB, or the share of weights kept in host memory."""
    over = need - card * GIB
    return "fits" if over <= 0 else f"{100 * over / weights:.0f} % offloaded"
