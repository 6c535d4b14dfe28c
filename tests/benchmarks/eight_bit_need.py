"""Compute what FLUX.1 and Qwen-Image need on a card from their shapes; nothing is measured."""

from __future__ import annotations

import torch

from tests.comfyui.adapters import adapter_shapes
from tests.comfyui.bases import flux_shapes, qwen_image_shapes

GB, GIB = 1e9, 2**30
CARDS = (8, 12, 16, 24)  # GiB: a card sold as 8 GB holds 8 GiB
CONTEXT = 600e6  # bytes that CUDA and a display take of a card: a guess


def compute_need() -> list[dict]:
    """Return a row for each model and kind of weights: what it needs on a card, in GB.

    Activations are ComfyUI's own estimate for 1024 x 1024 without a negative prompt
    (`memory_usage_factor`, 0.33), or the minimum that it keeps for them. The reserve of 400 MiB is
    what it keeps free besides on Linux. One layer at a time is expanded to 16 bit.
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
        # latent pixels x bytes x ComfyUI's factor
        activations = max(128 * 128 * 2 * 0.01 * factor * 2**20, 0.8 * GIB)
        largest = 2 * max(map(count, shapes.values()))
        for variant, size in weights.items():
            rest = (
                2 * head
                + activations
                + (0 if variant == "bf16" else largest)
                + 400 * 2**20
                + CONTEXT
            )
            need = size + rest
            rows.append(
                {
                    "model": model,
                    "weights": variant,
                    "parameters": total,
                    "weights_gb": round(size / GB, 2),
                    "gm_head_gb": round(2 * head / GB, 3),
                    "lora_in_host_gb": round(2 * lora / GB, 2),
                    "activations_gb": round(activations / GB, 2),
                    "need_gb": round(need / GB, 2),
                    **{f"{card}_gb_card": fit(need, size, card) for card in CARDS},
                    "how": "computed",
                }
            )
    return rows


def count(shape: tuple[int, ...]) -> int:
    """Return the number of elements of a shape."""
    return torch.Size(shape).numel()


def fit(need: float, weights: float, card: int) -> str:
    """Return "fits" for a card of that many GiB, or the share of weights kept in host memory."""
    over = need - card * GIB
    return "fits" if over <= 0 else f"{100 * over / weights:.0f} % offloaded"
