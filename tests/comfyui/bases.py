"""Tiny random models in the layouts of the real ones, in place of the files that people download.

Names and shapes are those of the published files; width and depth are small. ComfyUI reads the widths of FLUX.1, FLUX.2 and
the VAE of Qwen-Image from the files, older versions less. For the others there is the extension `text_stand_in`, which also
replaces the text encoders (`install_text_stand_in`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from .stand_ins import tiny_autoencoder, write_imagenet_stand_ins

HEAD_DIM = 128
CONTEXT = {"flux": 4096, "qwen": 3584, "flux2": 15360}  # width of the text encoder's output
CONTEXT_KLEIN = 7680  # FLUX.2 klein 4B
CHANNELS = {"flux": 64, "qwen": 64, "flux2": 128}  # of a token: the latent's channels x 2 x 2
MLP_RATIO = {"flux": 4, "qwen": 4, "flux2": 3}
DX_POLICY = {"type": "DX", "segment_size": 1 / 3.5, "shift": 3.2}
QUERY_KEY_NORMS = (
    ".scale",
    "norm_q.weight",
    "norm_k.weight",
    "norm_added_q.weight",
    "norm_added_k.weight",
)
FREQUENCIES = (
    "in_layer.weight",
    ".linear_1.weight",
    ".linear_1.lora_A.weight",
)  # layers that see the time's cosines and sines
WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"
TEXT_STAND_IN = Path(__file__).parent / "text_stand_in"

Shapes = dict[str, tuple[int, ...]]


# Bases


def write_flux(
    path: Path,
    *,
    hidden: int = 256,
    depth: int = 2,
    single: int = 2,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    guidance: bool = True,
) -> Path:
    """FLUX.1 in the layout of flux1-dev.safetensors; without guidance of flux1-schnell.safetensors."""
    return write(path, random_weights(flux_shapes(hidden, depth, single, guidance), seed, dtype))


def write_qwen_image(
    path: Path,
    *,
    hidden: int = 256,
    depth: int = 2,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Qwen-Image in the layout of qwen_image_bf16.safetensors."""
    return write(path, random_weights(qwen_image_shapes(hidden, depth), seed, dtype))


def write_flux2(
    path: Path,
    *,
    hidden: int = 256,
    depth: int = 2,
    single: int = 2,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    klein: bool = False,
) -> Path:
    """FLUX.2 in the layout of flux2-dev.safetensors, or of flux-2-klein-4b.safetensors."""
    return write(path, random_weights(flux2_shapes(hidden, depth, single, klein), seed, dtype))


def flux_shapes(hidden: int, depth: int, single: int, guidance: bool = True) -> Shapes:
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
    linear(shapes, f"{name}.qkv", hidden, 3 * hidden, bias)
    query_key_norm(shapes, f"{name}.norm")
    linear(shapes, f"{name}.proj", hidden, hidden, bias)


def query_key_norm(shapes: Shapes, name: str) -> None:
    shapes[f"{name}.query_norm.scale"] = shapes[f"{name}.key_norm.scale"] = (HEAD_DIM,)


def linear(shapes: Shapes, name: str, inputs: int, outputs: int, bias: bool = True) -> None:
    shapes[f"{name}.weight"] = (outputs, inputs)
    if bias:
        shapes[f"{name}.bias"] = (outputs,)


# Adapters and LoRAs


def write_adapter(
    path: Path,
    base: str = "flux",
    *,
    hidden: int = 256,
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
    """An adapter in the published layout: LoRA weights by diffusers' names, and the head's weights.

    Args:
        base: "flux", "qwen" or "flux2".
        K: number of components; `grid` is the number of grid points of a DX adapter.
        policy: "GM" or "DX".
        strength: scale of the LoRA's change of a layer, relative to the layer of a random base.
        metadata: of the file; its policy_config if None.
    """
    shapes = adapter_shapes(base, hidden, depth, single, rank, K, logstd_inner, policy, grid)
    weights = random_weights(shapes, seed, torch.float32)
    for name, weight in weights.items():
        if ".lora_B." in name:
            weight *= strength
    head, count = ("proj_out_means", K) if policy == "GM" else ("proj_out", grid)
    for name in (f"{head}.weight", f"{head}.bias"):  # the components have something in common
        each = weights[name].view(count, CHANNELS[base], -1)
        each.copy_(each[:1] + 0.5 * each)
    if policy == "GM":
        weights["proj_out_logstds.3.weight"] *= 0.5
        weights["proj_out_logstds.3.bias"] -= 1.5
    if metadata is None:
        metadata = {
            "policy_config": json.dumps(
                {"type": "GMFlow"} if policy == "GM" else DX_POLICY, separators=(",", ":")
            )
        }
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
    """Names and shapes of an adapter; `count` is the number of components."""
    if base not in CHANNELS:
        raise ValueError(f"base is {base!r}, not one of {', '.join(CHANNELS)}")
    if policy not in ("GM", "DX"):
        raise ValueError(f"policy is {policy!r}, not GM or DX")
    shapes: Shapes = {}
    for name, (inputs, outputs) in lora_layers(base, hidden, depth, single).items():
        shapes[f"{name}.lora_A.weight"] = (rank, inputs)
        shapes[f"{name}.lora_B.weight"] = (outputs, rank)
    linear(shapes, "norm_out.linear", hidden, 2 * hidden, bias=base != "flux2")
    if policy == "DX":
        linear(shapes, "proj_out", hidden, grid * CHANNELS[base])
        return shapes
    linear(shapes, "proj_out_means", hidden, count * CHANNELS[base])
    linear(shapes, "proj_out_logweights", hidden, count * 4)
    linear(shapes, "proj_out_logstds.1", hidden, logstd_inner)
    linear(shapes, "proj_out_logstds.3", logstd_inner, 1)
    return shapes


def lora_layers(base: str, hidden: int, depth: int, single: int) -> dict[str, tuple[int, int]]:
    """The layers that a published adapter changes, by diffusers' names: inputs and outputs."""
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
            if i < depth - 1:  # the last block's text goes nowhere
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
    hidden: int = 256,
    depth: int = 2,
    rank: int = 4,
    seed: int = 2,
    strength: float = 1.0,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """A style LoRA of the image stream's attention: by kohya's names for FLUX, by diffusers' for Qwen-Image."""
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


# The rest of a workflow


def write_vae(path: Path, latent: str = "flux", *, seed: int = 3) -> Path:
    """A VAE that the stock loader takes, for the latents of "flux", "qwen" or "flux2": a tiny autoencoder of 16 channels, the
    VAE of Wan 2.1, and an autoencoder of 32 channels whose 2 x 2 patches are normalised."""
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
    """The VAE of Wan 2.1, which Qwen-Image shares; published with a width of 96."""
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
    """The VAE of FLUX.2 in its own layout; published with a width of 128."""
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


def write_text_encoder(path: Path, width: int | None = None) -> Path:
    """A file for the loaders that `text_stand_in` replaces; the type chosen in the loader sets the width if it is None."""
    return write(path, {"stand_in": torch.zeros(1)}, {} if width is None else {"width": str(width)})


def install_text_stand_in(base: Path) -> None:
    """Put the extension `text_stand_in` into a base directory that no server uses yet."""
    place = base / "custom_nodes" / TEXT_STAND_IN.name
    if not place.exists():
        shutil.copytree(TEXT_STAND_IN, place, ignore=shutil.ignore_patterns("__pycache__"))


def write_gguf(source: Path, path: Path, base: str = "flux") -> Path:
    """A base as the GGUF file of it, matrices in Q8_0; needs the package gguf."""
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


LOADERS = {  # input -> folder of models/, kind of file
    "GMFlowAdapter": {"adapter_name": ("loras", "adapter")},
    "GMFlowLoadDiffusionModel8bit": {"unet_name": ("diffusion_models", "base")},
    "UNETLoader": {"unet_name": ("diffusion_models", "base")},
    "UnetLoaderGGUF": {"unet_name": ("diffusion_models", "gguf")},
    "VAELoader": {"vae_name": ("vae", "vae")},
    "CLIPLoader": {"clip_name": ("text_encoders", "text")},
    "DualCLIPLoader": {
        "clip_name1": ("text_encoders", "text"),
        "clip_name2": ("text_encoders", "text"),
    },
    "LoraLoaderModelOnly": {"lora_name": ("loras", "lora")},
    "LoraLoader": {"lora_name": ("loras", "lora")},
}


def write_stand_ins(base: Path, prompt: Mapping[str, Any], **options: Any) -> list[Path]:
    """Write each file that the loaders of a prompt in API format name, unless it is there.

    Args:
        base: the folder that holds models/ and input/.
        options: for the bases, adapters and LoRAs, where they have them: hidden, depth, single, seed, dtype ...

    Returns:
        The files, those that were there too.
    """
    for about in prompt.values():
        if about["class_type"] == "LoadImage":
            write_picture(base / "input" / about["inputs"]["image"])
    return [
        write_stand_in(base / "models" / folder / about["inputs"][name], kind, **options)
        for about in prompt.values()
        for name, (folder, kind) in LOADERS.get(about["class_type"], {}).items()
    ]


def write_workflow_files(base: Path, workflow: str) -> dict[str, Any]:
    """The prompt of workflows/api/`workflow`.json, after its files have been written."""
    prompt = json.loads((WORKFLOWS / "api" / f"{workflow}.json").read_text())
    if workflow == "imagenet_256":
        write_imagenet_stand_ins(base)
    else:
        write_stand_ins(base, prompt)
    return prompt


def write_picture(path: Path) -> Path:
    """A colourful picture of 96 x 80 pixels, unless it is there."""
    if not path.exists():
        x, y = np.meshgrid(np.linspace(0, 255, 96), np.linspace(0, 255, 80))
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.stack([x, y, 255 - x], -1).astype(np.uint8)).save(path)
    return path


def write_stand_in(path: Path, kind: str, **options: Any) -> Path:
    """One file of a kind (`write_stand_ins`), whose name says which base it belongs to, unless it is there."""
    if path.exists():
        return path
    base = base_of(path.name)
    klein = base == "flux2" and "klein" in path.name.lower()
    if kind == "base":
        if base == "flux":
            return write_flux(path, guidance="schnell" not in path.name.lower(), **options)
        if base == "flux2":
            return write_flux2(path, klein=klein, **options)
        return write_qwen_image(path, **without(options, "single"))
    if kind == "gguf":
        source = write_stand_in(path.with_suffix(".safetensors"), "base", **options)
        write_gguf(source, path, base)
        source.unlink()
        return path
    if kind in ("adapter", "dx"):
        return write_adapter(path, base, policy="DX" if kind == "dx" else "GM", **options)
    if kind == "lora":
        return write_lora(path, base, **without(options, "single"))
    if kind == "vae":
        return write_vae(path, base)
    if kind == "text":
        return write_text_encoder(path, CONTEXT_KLEIN if "qwen_3_4b" in path.name.lower() else None)
    raise ValueError(f"kind is {kind!r}, not base, gguf, adapter, dx, lora, vae or text")


def base_of(name: str) -> str:
    """Which base a file belongs to, by its name."""
    name = name.lower().replace("-", "").replace("_", "").replace(".", "")
    return "flux2" if "flux2" in name else "qwen" if "qwen" in name else "flux"


# Inside


def random_weights(
    shapes: Mapping[str, Iterable[int]], seed: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Weights that keep the size of what goes through them; norms near one, biases small, none of them zero."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        weight = torch.randn(*shape, generator=generator)
        if name.endswith(QUERY_KEY_NORMS):
            weight = 1.5 + 0.1 * weight  # an attention that chooses
        elif name.endswith(".gamma") or (
            "norm" in name and weight.ndim == 1 and not name.endswith(".bias")
        ):
            weight = 1 + 0.1 * weight
        elif weight.ndim == 1:
            weight *= 0.1
        else:
            weight /= weight[0].numel() ** 0.5
        if (
            name.endswith(FREQUENCIES) and weight.shape[1] == 256
        ):  # the fast half of the cosines and of the sines matters less
            weight.view(-1, 2, 2, 64).mul_(torch.tensor([0.05, 2**0.5]).view(2, 1))
        weights[name] = weight.to(dtype)
    return weights


def write(
    path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: weight.contiguous() for name, weight in weights.items()},
        path,
        dict(metadata or {}) or None,
    )
    return path


def without(options: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in names}
