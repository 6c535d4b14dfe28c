"""Tiny random models of further kinds, in the layouts of the real ones: no adapter is for them.

Names and shapes are those of Stable Diffusion 3.5 medium, Z-Image, Wan 2.1 (1.3B), and Stable
Diffusion 1.5, which predicts epsilon; width and depth are small.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .bases import Shapes, linear, random_weights, write, write_flux, write_qwen_image
from .graphs import node
from .stand_in_files import write_text_encoder


@dataclass(frozen=True)
class Kind:
    """A kind of model, with the stock nodes around it.

    Args:
        file: name in models/diffusion_models.
        clip: type of its text encoder, for CLIPLoader.
        latent: (C, *S) of a latent, in the layout of ComfyUI's LATENT.
        empty: the node that makes an empty one.
        text, pooled: widths of a conditioning; pooled None for none.
    """

    file: str
    clip: str
    latent: tuple[int, ...]
    empty: dict[str, Any]
    text: int
    pooled: int | None = None


SIZE = {"width": 64, "height": 64, "batch_size": 1}
EMPTY = node("EmptySD3LatentImage", **SIZE)
VIDEO = node("EmptyHunyuanLatentVideo", length=9, **SIZE)
IMAGE = (16, 8, 8)
KINDS = {
    "flux": Kind("flux1-schnell.safetensors", "flux", IMAGE, EMPTY, 4096, 768),
    "qwen": Kind("qwen_image_bf16.safetensors", "qwen_image", (16, 1, 8, 8), EMPTY, 3584),
    "sd3": Kind("sd3.5_medium.safetensors", "sd3", IMAGE, EMPTY, 4096, 2048),
    "lumina": Kind("z_image_bf16.safetensors", "lumina2", IMAGE, EMPTY, 2560),
    "wan": Kind("wan2.1_t2v_1.3B_bf16.safetensors", "wan", (16, 3, 8, 8), VIDEO, 4096),
    "sd15": Kind(
        "v1-5-unet.safetensors",
        "stable_diffusion",
        (4, 8, 8),
        node("EmptyLatentImage", **SIZE),
        768,
        768,
    ),
}


def write_plain_base(folder: Path, kind: str) -> Path:
    """Write a base of a kind, in float32, into a folder of models."""
    path, size = folder / "diffusion_models" / KINDS[kind].file, {"dtype": torch.float32}
    if kind == "flux":
        return write_flux(path, depth=1, single=1, guidance=False, **size)
    if kind == "qwen":
        return write_qwen_image(path, depth=1, **size)
    shapes = {"sd3": sd3_shapes, "lumina": lumina_shapes, "wan": wan_shapes, "sd15": sd15_shapes}
    weights = random_weights(shapes[kind](), seed=0, dtype=torch.float32)
    return write(path, weights)


def write_texts(folder: Path) -> None:
    """Write the stand-ins for text encoders into a folder of models."""
    for name in ("clip_l", "t5xxl"):
        write_text_encoder(folder / "text_encoders" / f"{name}.safetensors")


def text_encoder(kind: str) -> dict[str, Any]:
    """Return the stock node that loads a kind's text encoder."""
    names = {"clip_name1": "clip_l.safetensors", "clip_name2": "t5xxl.safetensors"}
    if kind == "flux":
        return node("DualCLIPLoader", type="flux", **names)
    return node("CLIPLoader", clip_name=names["clip_name2"], type=KINDS[kind].clip)


def sd3_shapes(heads: int = 2, self_attentions: int = 1, positions: int = 24) -> Shapes:
    """Return names and shapes of SD 3.5 medium's weights, whose heads have 64 channels.

    Args:
        heads: also the number of blocks.
        self_attentions: first blocks with a second attention.
        positions: side of the table of positions.
    """
    hidden = 64 * heads
    shapes: Shapes = {
        "pos_embed": (1, positions**2, hidden),
        "x_embedder.proj.weight": (hidden, 16, 2, 2),
        "x_embedder.proj.bias": (hidden,),
    }
    linear(shapes, "t_embedder.mlp.0", 256, hidden)
    linear(shapes, "t_embedder.mlp.2", hidden, hidden)
    linear(shapes, "y_embedder.mlp.0", KINDS["sd3"].pooled, hidden)
    linear(shapes, "y_embedder.mlp.2", hidden, hidden)
    linear(shapes, "context_embedder", KINDS["sd3"].text, hidden)
    for i in range(heads):
        for stream in ("context", "x"):
            block, is_image = f"joint_blocks.{i}.{stream}_block", stream == "x"
            ends, doubled = not is_image and i == heads - 1, is_image and i < self_attentions
            for name in ("attn", "attn2") if doubled else ("attn",):
                linear(shapes, f"{block}.{name}.qkv", hidden, 3 * hidden)
                for norm in ("ln_q", "ln_k"):
                    shapes[f"{block}.{name}.{norm}.weight"] = (64,)
                if not ends:
                    linear(shapes, f"{block}.{name}.proj", hidden, hidden)
            count = 2 if ends else 9 if doubled else 6
            linear(shapes, f"{block}.adaLN_modulation.1", hidden, count * hidden)
            if not ends:
                linear(shapes, f"{block}.mlp.fc1", hidden, 4 * hidden)
                linear(shapes, f"{block}.mlp.fc2", 4 * hidden, hidden)
    linear(shapes, "final_layer.linear", hidden, 64)
    linear(shapes, "final_layer.adaLN_modulation.1", hidden, 2 * hidden)
    return shapes


def lumina_shapes(dim: int = 256, layers: int = 2) -> Shapes:
    """Return names and shapes of Z-Image's weights, whose heads have 128 channels."""
    wide, text = 256 * -(-int(dim * 8 / 3) // 256), KINDS["lumina"].text
    time = min(dim, 1024)
    shapes: Shapes = {"x_pad_token": (1, dim), "cap_pad_token": (1, dim)}
    linear(shapes, "x_embedder", 64, dim)
    linear(shapes, "t_embedder.mlp.0", 256, time)
    linear(shapes, "t_embedder.mlp.2", time, 256)
    shapes["cap_embedder.0.weight"] = (text,)
    linear(shapes, "cap_embedder.1", text, dim)
    blocks = [f"layers.{i}" for i in range(layers)]
    for block in ("noise_refiner.0", "noise_refiner.1", *blocks):
        linear(shapes, f"{block}.adaLN_modulation.0", 256, 4 * dim)
    for block in ("context_refiner.0", "context_refiner.1", "noise_refiner.0", "noise_refiner.1"):
        blocks.append(block)
    for block in blocks:
        linear(shapes, f"{block}.attention.qkv", dim, 3 * dim, bias=False)
        linear(shapes, f"{block}.attention.out", dim, dim, bias=False)
        for norm in ("q_norm", "k_norm"):
            shapes[f"{block}.attention.{norm}.weight"] = (128,)
        for name, (inputs, outputs) in {
            "w1": (dim, wide),
            "w2": (wide, dim),
            "w3": (dim, wide),
        }.items():
            linear(shapes, f"{block}.feed_forward.{name}", inputs, outputs, bias=False)
        for norm in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
            shapes[f"{block}.{norm}.weight"] = (dim,)
    linear(shapes, "final_layer.linear", dim, 64)
    linear(shapes, "final_layer.adaLN_modulation.1", 256, dim)
    return shapes


def wan_shapes(dim: int = 256, wide: int = 512, layers: int = 1) -> Shapes:
    """Return names and shapes of the weights of Wan 2.1 for text to video."""
    shapes: Shapes = {
        "patch_embedding.weight": (dim, 16, 1, 2, 2),
        "patch_embedding.bias": (dim,),
        "head.modulation": (1, 2, dim),
    }
    linear(shapes, "text_embedding.0", KINDS["wan"].text, dim)
    linear(shapes, "text_embedding.2", dim, dim)
    linear(shapes, "time_embedding.0", 256, dim)
    linear(shapes, "time_embedding.2", dim, dim)
    linear(shapes, "time_projection.1", dim, 6 * dim)
    for block in (f"blocks.{i}" for i in range(layers)):
        shapes[f"{block}.modulation"] = (1, 6, dim)
        for attention in ("self_attn", "cross_attn"):
            for name in "qkvo":
                linear(shapes, f"{block}.{attention}.{name}", dim, dim)
            for norm in ("norm_q", "norm_k"):
                shapes[f"{block}.{attention}.{norm}.weight"] = (dim,)
        shapes[f"{block}.norm3.weight"] = shapes[f"{block}.norm3.bias"] = (dim,)
        linear(shapes, f"{block}.ffn.0", dim, wide)
        linear(shapes, f"{block}.ffn.2", wide, dim)
    linear(shapes, "head.head", dim, 64)
    return shapes


def sd15_shapes(mult: tuple[int, ...] = (1,), blocks: int = 1, flat: int = 0) -> Shapes:
    """Return names and shapes of the weights of SD 1.5's UNet.

    Args:
        mult: of the 320 channels, at each resolution; SD 1.5 has (1, 2, 4, 4).
        blocks: residual blocks at each resolution; SD 1.5 has 2.
        flat: last resolutions without attention; SD 1.5 has 1.
    """
    shapes: Shapes = {}
    linear(shapes, "time_embed.0", 320, 1280)
    linear(shapes, "time_embed.2", 1280, 1280)
    conv(shapes, "input_blocks.0.0", 4, 320)
    skips, width, at = [320], 320, 0
    for level, factor in enumerate(mult):
        for _ in range(blocks):
            at += 1
            residual(shapes, f"input_blocks.{at}.0", width, 320 * factor)
            width = 320 * factor
            if level < len(mult) - flat:
                attention(shapes, f"input_blocks.{at}.1", width)
            skips.append(width)
        if level < len(mult) - 1:
            at += 1
            conv(shapes, f"input_blocks.{at}.0.op", width, width)
            skips.append(width)
    residual(shapes, "middle_block.0", width, width)
    attention(shapes, "middle_block.1", width)
    residual(shapes, "middle_block.2", width, width)
    at = 0
    for level, factor in reversed(list(enumerate(mult))):
        for block in range(blocks + 1):
            residual(shapes, f"output_blocks.{at}.0", width + skips.pop(), 320 * factor)
            width, has = 320 * factor, level < len(mult) - flat
            if has:
                attention(shapes, f"output_blocks.{at}.1", width)
            if level and block == blocks:
                conv(shapes, f"output_blocks.{at}.{1 + has}.conv", width, width)
            at += 1
    norm(shapes, "out.0", 320)
    conv(shapes, "out.2", 320, 4)
    return shapes


def conv(shapes: Shapes, name: str, inputs: int, outputs: int, side: int = 3) -> None:
    """Add weight and bias of a convolution."""
    shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs, side, side), (outputs,)


def norm(shapes: Shapes, name: str, width: int) -> None:
    """Add weight and bias of a norm."""
    shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)


def residual(shapes: Shapes, name: str, inputs: int, outputs: int) -> None:
    """Add the weights of a residual block."""
    norm(shapes, f"{name}.in_layers.0", inputs)
    conv(shapes, f"{name}.in_layers.2", inputs, outputs)
    linear(shapes, f"{name}.emb_layers.1", 1280, outputs)
    norm(shapes, f"{name}.out_layers.0", outputs)
    conv(shapes, f"{name}.out_layers.3", outputs, outputs)
    if inputs != outputs:
        conv(shapes, f"{name}.skip_connection", inputs, outputs, side=1)


def attention(shapes: Shapes, name: str, width: int) -> None:
    """Add the weights of a transformer block that attends to the image and to the text."""
    norm(shapes, f"{name}.norm", width)
    conv(shapes, f"{name}.proj_in", width, width, side=1)
    conv(shapes, f"{name}.proj_out", width, width, side=1)
    block = f"{name}.transformer_blocks.0"
    for part, context in {"attn1": width, "attn2": KINDS["sd15"].text}.items():
        linear(shapes, f"{block}.{part}.to_q", width, width, bias=False)
        linear(shapes, f"{block}.{part}.to_k", context, width, bias=False)
        linear(shapes, f"{block}.{part}.to_v", context, width, bias=False)
        linear(shapes, f"{block}.{part}.to_out.0", width, width)
    linear(shapes, f"{block}.ff.net.0.proj", width, 8 * width)
    linear(shapes, f"{block}.ff.net.2", 4 * width, width)
    for i in range(1, 4):
        norm(shapes, f"{block}.norm{i}", width)
