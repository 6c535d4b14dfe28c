"""Our parts of a 4-step sampling at FLUX.1's real size, measured without the network.

What they take of a whole sampling is computed: the network's products, counted from its shapes,
at the rate that a large matrix product reaches on the same thread in the same run.
"""

from __future__ import annotations

from pathlib import Path

import torch

from gmflow_core.files.adapter_file import policy_of, read_tensors, split_tensors
from gmflow_core.flow.path import flow_sigmas
from gmflow_core.flow.policy import predict_x0
from gmflow_core.models.adapter_heads import HeadLayout, build_head
from gmflow_core.sampling.solvers import FINAL_STEP_SIZE, solve
from tests.comfyui.adapters import write_adapter

from .measure import measure_rates, quartiles, take_turns

WIDTH, DOUBLE, SINGLE = 3072, 19, 38  # FLUX.1
TEXT_TOKENS, STEPS, SUBSTEPS, SHIFT = 256, 4, 128, 3.2


def products(width: int, double: int, single: int, image: int, text: int) -> float:
    """Return the floating-point operations of a network in FLUX.1's layout, for one call.

    Counted are the products in its blocks, with weights and of attention; each multiplication
    and each addition is one operation.

    Args:
        width: of the tokens.
        double, single: numbers of blocks.
        image, text: numbers of tokens.
    """
    tokens, blocks = image + text, double + single
    weights = 12 * width**2 * blocks  # for each token, qkv, proj and the MLP; the same in both
    return 2.0 * tokens * weights + 4.0 * tokens**2 * width * blocks


def parts_row(folder: Path, side: int = 128, width: int = WIDTH) -> dict[str, float | str]:
    """Return the seconds of our parts, and their share of a sampling with FLUX.1.

    Args:
        folder: gets the random adapter whose head is measured.
        side: of the latents, in latent pixels; 128 for a picture of 1024 x 1024.
        width: of the head's tokens.
    """
    sizes = {"hidden": width, "depth": 1, "single": 1, "logstd_inner": 1024}
    path = write_adapter(folder / "head.safetensors", **sizes)
    tensors, metadata = read_tensors(path)
    head_tensors, _ = split_tensors(tensors)
    policy = policy_of(metadata, head_tensors, path.name)
    head = build_head(head_tensors, policy, HeadLayout(channels=16), width).float()
    tokens = torch.randn(1, (side // 2) ** 2, width)
    embedding, noise = torch.randn(1, width), torch.randn(1, 16, side, side)

    def predict():
        prediction = head(tokens, embedding)
        head.layout.to_tokens(prediction.mean())
        return head.to_image(prediction, (side, side))

    velocity = predict()

    def follow():
        denoiser = lambda x, sigma: predict_x0(velocity, x, sigma)  # noqa: E731
        sigmas = flow_sigmas(STEPS, SHIFT, final_step_size=FINAL_STEP_SIZE)
        return solve("gm-policy", denoiser, noise, sigmas, substeps=SUBSTEPS, shift=SHIFT)

    with torch.inference_mode():
        found = take_turns({"head": predict, "solver": follow}, "cpu", 10.0)
        rate = measure_rates("cpu")["flops_per_second"]
    head_seconds = STEPS * quartiles(found["head"])[1]
    solver_seconds = quartiles(found["solver"])[1]
    operations = STEPS * products(WIDTH, DOUBLE, SINGLE, (side // 2) ** 2, TEXT_TOKENS)
    network = operations / rate
    return {
        "width": width,
        "blocks": f"{DOUBLE} + {SINGLE}",
        "latent": f"{side} x {side}",
        "head_seconds": head_seconds,
        "solver_seconds": solver_seconds,
        "network_tflop": operations / 1e12,
        "gflop_per_second": rate / 1e9,
        "network_seconds": network,
        "outside_percent": 100 * solver_seconds / network,
        "last_and_outside_percent": 100 * (head_seconds + solver_seconds) / network,
    }
