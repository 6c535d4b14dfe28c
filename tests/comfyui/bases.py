"""Tiny random base models in the layouts of the real ones, in place of the files people download.

Names and shapes are those of the published files; width and depth are small. ComfyUI reads the
widths of FLUX.1, FLUX.2 and Qwen-Image's VAE from the files; older versions read fewer. The
extension `text_stand_in` sets the others and replaces the text encoders.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

HEAD_DIM = 128
CONTEXT = {"flux": 4096, "qwen": 3584, "flux2": 15360}  # width of the text encoder's output
CONTEXT_KLEIN = 7680  # FLUX.2 klein 4B
CHANNELS = {"flux": 64, "qwen": 64, "flux2": 128}  # of a token: the latent's channels x 2 x 2
# FLUX.2 gets one head, as ComfyUI lengthens every text of its to 512 tokens
HIDDEN = {"flux": 256, "qwen": 256, "flux2": 128}
QUERY_KEY_NORMS = (
    ".scale",
    "norm_q.weight",
    "norm_k.weight",
    "norm_added_q.weight",
    "norm_added_k.weight",
)
FREQUENCIES = (  # layers whose inputs are the cosines and sines of the time
    "in_layer.weight",
    ".linear_1.weight",
    ".linear_1.lora_A.weight",
)

Shapes = dict[str, tuple[int, ...]]


# Layouts


def write_flux(
    path: Path,
    *,
    hidden: int = HIDDEN["flux"],
    depth: int = 2,
    single: int = 2,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    guidance: bool = True,
) -> Path:
    """Write FLUX.1 in the layout of flux1-dev.safetensors, without guidance of flux1-schnell."""
    return write(path, random_weights(flux_shapes(hidden, depth, single, guidance), seed, dtype))


def write_qwen_image(
    path: Path,
    *,
    hidden: int = HIDDEN["qwen"],
    depth: int = 2,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Write Qwen-Image in the layout of qwen_image_bf16.safetensors."""
    return write(path, random_weights(qwen_image_shapes(hidden, depth), seed, dtype))


def write_flux2(
    path: Path,
    *,
    hidden: int = HIDDEN["flux2"],
    depth: int = 2,
    single: int = 2,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    klein: bool = False,
) -> Path:
    """Write FLUX.2 in the layout of flux2-dev.safetensors, or of flux-2-klein-4b.safetensors."""
    return write(path, random_weights(flux2_shapes(hidden, depth, single, klein), seed, dtype))


def flux_shapes(hidden: int, depth: int, single: int, guidance: bool = True) -> Shapes:
    """Return names and shapes of FLUX.1's weights."""
    shapes: Shapes = {}
    linear(shapes, "img_in", CHANNELS["flux"], hidden)
    linear(shapes, "txt_in", CONTEXT["flux"], hidden)
    for name, width in {
        "time_in": 256,
        "vector_in": 768,
        **({"guidance_in": 256} if guidance else {}),
    }.items():
        linear(shapes, f"{name}.in_layer", width, hidden)
        linear(shapes, f"{name}.out_layer", hidden, hidden)
    for block in (f"double_blocks.{i}.{stream}" for i in range(depth) for stream in ("img", "txt")):
        linear(shapes, f"{block}_mod.lin", hidden, 6 * hidden)
        flux_attention(shapes, f"{block}_attn", hidden, bias=True)
        linear(shapes, f"{block}_mlp.0", hidden, 4 * hidden)
        linear(shapes, f"{block}_mlp.2", 4 * hidden, hidden)
    for block in (f"single_blocks.{i}" for i in range(single)):
        linear(shapes, f"{block}.linear1", hidden, 7 * hidden)
        linear(shapes, f"{block}.linear2", 5 * hidden, hidden)
        query_key_norm(shapes, f"{block}.norm")
        linear(shapes, f"{block}.modulation.lin", hidden, 3 * hidden)
    linear(shapes, "final_layer.linear", hidden, CHANNELS["flux"])
    linear(shapes, "final_layer.adaLN_modulation.1", hidden, 2 * hidden)
    return shapes


def flux2_shapes(hidden: int, depth: int, single: int, klein: bool = False) -> Shapes:
    """Return names and shapes of FLUX.2's weights."""
    shapes: Shapes = {}

    def plain(name: str, inputs: int, outputs: int) -> None:
        linear(shapes, name, inputs, outputs, bias=False)

    plain("img_in", CHANNELS["flux2"], hidden)
    plain("txt_in", CONTEXT_KLEIN if klein else CONTEXT["flux2"], hidden)
    for name in ("time_in",) if klein else ("time_in", "guidance_in"):
        plain(f"{name}.in_layer", 256, hidden)
        plain(f"{name}.out_layer", hidden, hidden)
    plain("double_stream_modulation_img.lin", hidden, 6 * hidden)
    plain("double_stream_modulation_txt.lin", hidden, 6 * hidden)
    plain("single_stream_modulation.lin", hidden, 3 * hidden)
    for block in (f"double_blocks.{i}.{stream}" for i in range(depth) for stream in ("img", "txt")):
        flux_attention(shapes, f"{block}_attn", hidden, bias=False)
        plain(f"{block}_mlp.0", hidden, 6 * hidden)
        plain(f"{block}_mlp.2", 3 * hidden, hidden)
    for block in (f"single_blocks.{i}" for i in range(single)):
        plain(f"{block}.linear1", hidden, 9 * hidden)
        plain(f"{block}.linear2", 4 * hidden, hidden)
        query_key_norm(shapes, f"{block}.norm")
    plain("final_layer.linear", hidden, CHANNELS["flux2"])
    plain("final_layer.adaLN_modulation.1", hidden, 2 * hidden)
    return shapes


def qwen_image_shapes(hidden: int, depth: int) -> Shapes:
    """Return names and shapes of Qwen-Image's weights."""
    shapes: Shapes = {"txt_norm.weight": (CONTEXT["qwen"],)}
    linear(shapes, "img_in", CHANNELS["qwen"], hidden)
    linear(shapes, "txt_in", CONTEXT["qwen"], hidden)
    linear(shapes, "time_text_embed.timestep_embedder.linear_1", 256, hidden)
    linear(shapes, "time_text_embed.timestep_embedder.linear_2", hidden, hidden)
    for block in (f"transformer_blocks.{i}" for i in range(depth)):
        for name in (
            "to_q",
            "to_k",
            "to_v",
            "to_out.0",
            "add_q_proj",
            "add_k_proj",
            "add_v_proj",
            "to_add_out",
        ):
            linear(shapes, f"{block}.attn.{name}", hidden, hidden)
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            shapes[f"{block}.attn.{name}.weight"] = (HEAD_DIM,)
        for stream in ("img", "txt"):
            linear(shapes, f"{block}.{stream}_mod.1", hidden, 6 * hidden)
            linear(shapes, f"{block}.{stream}_mlp.net.0.proj", hidden, 4 * hidden)
            linear(shapes, f"{block}.{stream}_mlp.net.2", 4 * hidden, hidden)
    linear(shapes, "norm_out.linear", hidden, 2 * hidden)
    linear(shapes, "proj_out", hidden, CHANNELS["qwen"])
    return shapes


def flux_attention(shapes: Shapes, name: str, hidden: int, bias: bool) -> None:
    """Add the weights of an attention layer in FLUX's layout."""
    linear(shapes, f"{name}.qkv", hidden, 3 * hidden, bias)
    query_key_norm(shapes, f"{name}.norm")
    linear(shapes, f"{name}.proj", hidden, hidden, bias)


def query_key_norm(shapes: Shapes, name: str) -> None:
    """Add the scales of the norms of queries and keys."""
    shapes[f"{name}.query_norm.scale"] = shapes[f"{name}.key_norm.scale"] = (HEAD_DIM,)


def linear(shapes: Shapes, name: str, inputs: int, outputs: int, bias: bool = True) -> None:
    """Add weight and bias of a linear layer."""
    shapes[f"{name}.weight"] = (outputs, inputs)
    if bias:
        shapes[f"{name}.bias"] = (outputs,)


def write_gguf(source: Path, path: Path, base: str = "flux") -> Path:
    """Write a base as a GGUF file with matrices in Q8_0; needs the package gguf."""
    import gguf

    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(
        str(path), {"flux": "flux", "flux2": "flux", "qwen": "qwen_image"}[base]
    )
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, weight in load_file(source).items():
        kind = gguf.GGMLQuantizationType.Q8_0 if weight.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(weight.float().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# Weights


def random_weights(
    shapes: Mapping[str, Iterable[int]], seed: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Draw weights that keep the scale of activations; norms near one, biases small, no zeros."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        weight = torch.randn(*shape, generator=generator)
        if name.endswith(QUERY_KEY_NORMS):
            weight = 1.5 + 0.1 * weight  # sharpens the attention
        elif name.endswith(".gamma") or (
            "norm" in name and weight.ndim == 1 and not name.endswith(".bias")
        ):
            weight = 1 + 0.1 * weight
        elif weight.ndim == 1:
            weight *= 0.1
        else:
            weight /= weight[0].numel() ** 0.5
        if name.endswith(FREQUENCIES) and weight.shape[1] == 256:
            # the fast half of the cosines and sines gets smaller weights
            weight.view(-1, 2, 2, 64).mul_(torch.tensor([0.05, 2**0.5]).view(2, 1))
        weights[name] = weight.to(dtype)
    return weights


def write(
    path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write a safetensors file, make its folder, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: weight.contiguous() for name, weight in weights.items()},
        path,
        dict(metadata or {}) or None,
    )
    return path
