"""Extension for tests only: lets ComfyUI run tiny models in the layout of real ones.

Text encoders come in one size, so the stock loaders get a small one that turns the text into random
conditioning: the same text gives the same tensors. Where a version of ComfyUI takes a size from a
table (Qwen-Image and its VAE, Z-Image, the VAE of FLUX.2, FLUX.1 before 0.9), this extension takes
it from the file. Nodes and their inputs stay ComfyUI's own.
"""

from __future__ import annotations

import functools
import inspect
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import comfy.ldm.modules.diffusionmodules.model
import comfy.ldm.wan.vae
import comfy.model_detection
import comfy.sd
import torch
from comfy.supported_models_base import ClipTarget
from safetensors import safe_open
from torch import Tensor

NODE_CLASS_MAPPINGS: dict[str, type] = {}
# CLIPType -> names of its token lists, width of its conditioning, width of its pooled output
KINDS = {
    "FLUX": (("l", "t5xxl"), 4096, 768),
    "QWEN_IMAGE": (("qwen25_7b",), 3584, None),
    "FLUX2": (("mistral3_24b",), 15360, None),
    "SD3": (("l", "g", "t5xxl"), 4096, 2048),
    "LUMINA2": (("qwen3_4b",), 2560, None),
    "WAN": (("umt5xxl",), 4096, None),
    "STABLE_DIFFUSION": (("l",), 768, 768),
}
HEAD_DIM = 128
Z_IMAGE = {  # what a table has for the real width
    "n_kv_heads": None,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
    "rope_theta": 256.0,
    "ffn_dim_multiplier": 8 / 3,
    "z_image_modulation": True,
    "time_scale": 1000.0,
    "pad_tokens_multiple": 32,
}
# a weight whose first size is the width; the classes that take the width, and as which argument
VAE_WIDTHS = [
    ("decoder.head.0.gamma", [(comfy.ldm.wan.vae, "WanVAE")], "dim"),
    (
        "encoder.conv_in.weight",
        [(comfy.ldm.modules.diffusionmodules.model, name) for name in ("Encoder", "Decoder")],
        "ch",
    ),
]


# Text


class Tokenizer:
    """A tokenizer with one token for each word, and eight more."""

    def __init__(
        self, names: tuple[str, ...], embedding_directory: Any = None, tokenizer_data: Any = None
    ):
        self.names = names

    def tokenize_with_weights(
        self, text: str, return_word_ids: bool = False, **options: Any
    ) -> dict[str, list]:
        seen = [f"image {image.float().mean().item():.4f}" for image in options.get("images") or ()]
        words = [*seen, *text.split(), *(f"end {i}" for i in range(8))]
        return {name: [[(word, 1.0) for word in words]] for name in self.names}

    def state_dict(self) -> dict[str, Tensor]:
        return {}


class Encoder(torch.nn.Module):
    """An encoder that adds a random vector for the whole text to one for each word."""

    def __init__(
        self, names: tuple[str, ...], width: int, pooled_width: int | None, **options: Any
    ):
        super().__init__()
        self.names, self.width, self.pooled_width = names, width, pooled_width
        self.dtypes = {torch.float32}
        self.unused = torch.nn.Parameter(torch.zeros(1), requires_grad=False)

    def encode_token_weights(self, tokens: dict[str, list]) -> tuple:
        words = [word for word, *_ in tokens[self.names[-1]][0]]
        text = " ".join(words)
        context = (
            random(self.width, text) + torch.stack([random(self.width, word) for word in words])
        )[None]
        if self.pooled_width is None:
            return context, None, {}
        pooled = " ".join(word for word, *_ in tokens[self.names[0]][0])
        return context, random(self.pooled_width, pooled)[None]

    def set_clip_options(self, options: dict[str, Any]) -> None:
        pass

    def reset_clip_options(self) -> None:
        pass

    def load_sd(self, state: dict[str, Tensor]) -> tuple[list, list]:
        return [], []


def random(width: int, text: str) -> Tensor:
    """Draw a random vector (width,), the same for the same text."""
    return torch.randn(width, generator=torch.Generator().manual_seed(zlib.crc32(text.encode())))


def load_clip(
    ckpt_paths: list[str],
    embedding_directory: Any = None,
    clip_type: Any = None,
    model_options: Any = None,
    **options: Any,
) -> comfy.sd.CLIP:
    """Replace comfy.sd.load_clip, with its arguments; a file's metadata may name the width."""
    names, width, pooled_width = KINDS[clip_type.name]
    for path in ckpt_paths:
        with safe_open(path, "pt") as file:
            width = int((file.metadata() or {}).get("width", width))
    encoder = functools.partial(Encoder, names, width, pooled_width)
    return comfy.sd.CLIP(ClipTarget(functools.partial(Tokenizer, names), encoder))


# Sizes


def sized(detect: Callable[..., dict | None]) -> Callable[..., dict | None]:
    """Wrap comfy.model_detection.detect_unet_config so that it takes the width from the file."""

    @functools.wraps(detect)
    def detect_sized(
        state_dict: dict[str, Tensor], key_prefix: str, *args: Any, **options: Any
    ) -> dict | None:
        config = detect(state_dict, key_prefix, *args, **options)
        kind = (config or {}).get("image_model")
        if kind == "lumina2" and "n_heads" not in config:
            config.update(Z_IMAGE, n_heads=config["dim"] // HEAD_DIM)
        if kind in ("flux", "qwen_image"):
            width = state_dict[f"{key_prefix}txt_in.weight"].shape[0]
            if kind == "qwen_image" and width != 24 * HEAD_DIM:
                config["num_attention_heads"] = width // HEAD_DIM
            elif kind == "flux":
                config.update(hidden_size=width, num_heads=width // HEAD_DIM)
        return config

    return detect_sized


class SizedVAE(comfy.sd.VAE):
    """A stock VAE whose parts are as wide as those in the file."""

    def __init__(self, sd: dict[str, Tensor] | None = None, *args: Any, **options: Any):
        with ExitStack() as stack:
            for key, places, argument in VAE_WIDTHS:
                for module, name in places if key in (sd or {}) else ():
                    part = functools.partial(
                        narrow, getattr(module, name), argument, sd[key].shape[0]
                    )
                    stack.enter_context(mock.patch.object(module, name, part))
            super().__init__(sd, *args, **options)


def narrow(part: type, argument: str, width: int, *args: Any, **options: Any) -> Any:
    """Return an instance of the class `part` with `width` in place of the width asked for."""
    return part(*args, **{**options, argument: width})


if "ckpt_paths" not in inspect.signature(comfy.sd.load_clip).parameters:
    raise RuntimeError(
        "this ComfyUI's comfy.sd.load_clip has no argument ckpt_paths: "
        "adapt load_clip in tests/comfyui/text_stand_in"
    )
comfy.sd.load_clip = load_clip
comfy.model_detection.detect_unet_config = sized(comfy.model_detection.detect_unet_config)
comfy.sd.VAE = SizedVAE
