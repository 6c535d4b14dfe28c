"""Tiny random VAEs that ComfyUI's stock loader takes, one for each base's latents."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from tests.helpers import normal

from .bases import Shapes, random_weights, write


def write_vae(path: Path, latent: str = "flux", *, seed: int = 3) -> Path:
    """Write a VAE that the stock loader takes.

    Args:
        latent: "flux" (a tiny autoencoder of 16 channels), "qwen" (the VAE of Wan 2.1) or "flux2"
            (an autoencoder of 32 channels whose 2 x 2 patches are normalised).

    Raises:
        ValueError: `latent` is unknown.
    """
    if latent == "flux":
        sizes = {
            "taesd_encoder.14.weight": (16, 64, 3, 3),
            "taesd_encoder.14.bias": (16,),
            "taesd_decoder.1.weight": (64, 16, 3, 3),
        }
        weights = tiny_autoencoder() | random_weights(sizes, seed, torch.float32)
        weights["taesd_decoder.19.weight"] *= 0.5
        weights["taesd_decoder.19.bias"] += 0.5  # grey
        weights |= {"vae_scale": torch.tensor(0.3611), "vae_shift": torch.tensor(0.1159)}
    elif latent == "qwen":
        weights = random_weights(wan_vae_shapes(width=8), seed, torch.float32)
    elif latent == "flux2":
        weights = random_weights(flux2_vae_shapes(width=32), seed, torch.bfloat16)
        statistics = random_weights({"mean": (128,), "variance": (128,)}, seed, torch.float32)
        weights |= {
            "bn.running_mean": statistics["mean"],
            "bn.running_var": 1 + statistics["variance"],
        }
        weights["bn.num_batches_tracked"] = torch.tensor(1)
    else:
        raise ValueError(f"latent is {latent!r}, not flux, qwen or flux2")
    return write(path, weights)


def wan_vae_shapes(width: int, channels: int = 16) -> Shapes:
    """Return names and shapes of Wan 2.1's VAE, which Qwen-Image shares; published width 96."""
    shapes: Shapes = {}

    def convolution(name: str, inputs: int, outputs: int, *kernel: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs, *kernel), (outputs,)

    def norm(name: str, size: int, *ones: int) -> None:
        shapes[f"{name}.gamma"] = (size, *ones)

    def residual(name: str, inputs: int, outputs: int) -> None:
        norm(f"{name}.residual.0", inputs, 1, 1, 1)
        convolution(f"{name}.residual.2", inputs, outputs, 3, 3, 3)
        norm(f"{name}.residual.3", outputs, 1, 1, 1)
        convolution(f"{name}.residual.6", outputs, outputs, 3, 3, 3)
        if inputs != outputs:
            convolution(f"{name}.shortcut", inputs, outputs, 1, 1, 1)

    def middle(name: str, size: int) -> None:
        residual(f"{name}.0", size, size)
        norm(f"{name}.1.norm", size, 1, 1)
        convolution(f"{name}.1.to_qkv", size, 3 * size, 1, 1)
        convolution(f"{name}.1.proj", size, size, 1, 1)
        residual(f"{name}.2", size, size)

    def head(name: str, inputs: int, outputs: int) -> None:
        norm(f"{name}.0", inputs, 1, 1, 1)
        convolution(f"{name}.2", inputs, outputs, 3, 3, 3)

    sizes = [width, 2 * width, 4 * width, 4 * width]
    convolution("encoder.conv1", 3, width, 3, 3, 3)
    before, layer = width, 0
    for stage, size in enumerate(sizes):
        for _ in range(2):
            residual(f"encoder.downsamples.{layer}", before, size)
            before, layer = size, layer + 1
        if stage < 3:
            convolution(f"encoder.downsamples.{layer}.resample.1", size, size, 3, 3)
            if stage:
                convolution(f"encoder.downsamples.{layer}.time_conv", size, size, 3, 1, 1)
            layer += 1
    middle("encoder.middle", before)
    head("encoder.head", before, 2 * channels)
    convolution("conv1", 2 * channels, 2 * channels, 1, 1, 1)
    convolution("conv2", channels, channels, 1, 1, 1)
    convolution("decoder.conv1", channels, before, 3, 3, 3)
    middle("decoder.middle", before)
    layer = 0
    for stage, size in enumerate(reversed(sizes)):
        for _ in range(3):
            residual(f"decoder.upsamples.{layer}", before, size)
            before, layer = size, layer + 1
        if stage < 3:
            convolution(f"decoder.upsamples.{layer}.resample.1", size, size // 2, 3, 3)
            if stage < 2:
                convolution(f"decoder.upsamples.{layer}.time_conv", size, 2 * size, 3, 1, 1)
            before, layer = size // 2, layer + 1
    head("decoder.head", before, 3)
    return shapes


def flux2_vae_shapes(width: int, channels: int = 32) -> Shapes:
    """Return names and shapes of FLUX.2's VAE in its own layout; published width 128."""
    shapes: Shapes = {}

    def convolution(name: str, inputs: int, outputs: int, kernel: int = 3) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (
            (outputs, inputs, kernel, kernel),
            (outputs,),
        )

    def norm(name: str, size: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (size,)

    def residual(name: str, inputs: int, outputs: int) -> None:
        norm(f"{name}.norm1", inputs)
        convolution(f"{name}.conv1", inputs, outputs)
        norm(f"{name}.norm2", outputs)
        convolution(f"{name}.conv2", outputs, outputs)
        if inputs != outputs:
            convolution(f"{name}.nin_shortcut", inputs, outputs, 1)

    def middle(name: str, size: int) -> None:
        residual(f"{name}.block_1", size, size)
        norm(f"{name}.attn_1.norm", size)
        for part in ("q", "k", "v", "proj_out"):
            convolution(f"{name}.attn_1.{part}", size, size, 1)
        residual(f"{name}.block_2", size, size)

    sizes = [width, 2 * width, 4 * width, 4 * width]
    convolution("encoder.conv_in", 3, width)
    before = width
    for stage, size in enumerate(sizes):
        for i in range(2):
            residual(f"encoder.down.{stage}.block.{i}", before, size)
            before = size
        if stage < 3:
            convolution(f"encoder.down.{stage}.downsample.conv", size, size)
    middle("encoder.mid", before)
    norm("encoder.norm_out", before)
    convolution("encoder.conv_out", before, 2 * channels)
    convolution("quant_conv", 2 * channels, 2 * channels, 1)
    convolution("post_quant_conv", channels, channels, 1)
    convolution("decoder.conv_in", channels, before)
    middle("decoder.mid", before)
    for stage, size in reversed(list(enumerate(sizes))):
        for i in range(3):
            residual(f"decoder.up.{stage}.block.{i}", before, size)
            before = size
        if stage:
            convolution(f"decoder.up.{stage}.upsample.conv", size, size)
    norm("decoder.norm_out", before)
    convolution("decoder.conv_out", before, 3)
    return shapes


def tiny_autoencoder() -> dict[str, Tensor]:
    """Return random weights of a TAESD for 4-channel latents."""
    shapes: dict[str, tuple[int, ...]] = {}

    def convolution(name: str, inputs: int, outputs: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs, 3, 3)
        if bias:
            shapes[f"{name}.bias"] = (outputs,)

    def block(name: str) -> None:
        for layer in (0, 2, 4):
            convolution(f"{name}.conv.{layer}", 64, 64)

    encoder, decoder = "taesd_encoder", "taesd_decoder"
    convolution(f"{encoder}.0", 3, 64)
    block(f"{encoder}.1")
    convolution(f"{decoder}.1", 4, 64)
    for stage in range(3):
        convolution(f"{encoder}.{2 + 4 * stage}", 64, 64, bias=False)
        convolution(f"{decoder}.{7 + 5 * stage}", 64, 64, bias=False)
        for i in range(3):
            block(f"{encoder}.{3 + 4 * stage + i}")
            block(f"{decoder}.{3 + 5 * stage + i}")
    convolution(f"{encoder}.14", 64, 4)
    block(f"{decoder}.18")
    convolution(f"{decoder}.19", 64, 3)
    weights = {name: normal(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    return {
        name: weight / weight[0].numel() ** 0.5 if weight.ndim > 1 else torch.zeros_like(weight)
        for name, weight in weights.items()
    }
