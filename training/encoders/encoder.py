"""Frozen vision transformers (DINOv2, SigLIP, ViT-MAE) that encode images."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmflow_core.files.diffusers_vae import CONFIG
from gmflow_core.files.errors import FileError, quoted, reason
from gmflow_core.files.json_files import read_json
from gmflow_core.files.safetensors_files import check_finite

ENCODERS = {
    "dinov2": "facebook/dinov2-with-registers-base",
    "siglip2": "google/siglip2-base-patch16-256",
    "mae": "facebook/vit-mae-base",
}
SIZES = (  # of an encoder's config
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "mlp_ratio",
    "patch_size",
    "image_size",
    "num_channels",
    "num_register_tokens",
    "decoder_hidden_size",
    "decoder_num_hidden_layers",
    "decoder_intermediate_size",
)
LARGEST_SIZE = 65_536
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and std of R, G, B
HALF = ((0.5,) * 3, (0.5,) * 3)


class Family(NamedTuple):
    """A kind of encoder that transformers names by its `model_type`."""

    model: str  # class of transformers
    config: str
    norm: str  # attribute of the last LayerNorm
    input_size: int  # side of the input images, in pixels
    normalisation: tuple[tuple[float, ...], tuple[float, ...]]  # mean and std in [0, 1]


FAMILIES = {
    "dinov2_with_registers": Family(
        "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", "layernorm", 224, IMAGENET
    ),
    "siglip_vision_model": Family(
        "SiglipVisionModel", "SiglipVisionConfig", "post_layernorm", 256, HALF
    ),
    "vit_mae": Family("ViTMAEModel", "ViTMAEConfig", "layernorm", 256, IMAGENET),
}


class Encoder(nn.Module):
    """A frozen vision transformer in float32.

    Its last LayerNorm is applied without the affine part, as RAE (arXiv 2510.11690) defines its
    latents; only `token` applies the affine part.

    Args:
        network: a model of transformers, of one of `FAMILIES`.
        input_size: side of the input images in pixels; the default of the family if None.
        source: folder or hub id of the network, if known.

    Raises:
        ValueError: the image side is not a multiple of the patch side.
    """

    def __init__(self, network: nn.Module, input_size: int | None = None, source: str = ""):
        super().__init__()
        self.source = source
        self.network = network.float().eval().requires_grad_(False)
        self.kind: str = network.config.model_type
        family = FAMILIES[self.kind]
        self.input_size = input_size or family.input_size
        patch = network.config.patch_size
        if self.input_size % patch:
            raise ValueError(
                f"input_size {self.input_size} is not divisible by the encoder's patches of "
                f"{patch} pixels"
            )
        self.grid = self.input_size // patch  # patches per side
        self.width: int = network.config.hidden_size
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in family.normalisation)
        self.register_buffer("image_mean", mean)
        self.register_buffer("image_std", std)
        norm = getattr(self._body(), family.norm)
        self.register_buffer("scale", norm.weight.detach().clone())
        self.register_buffer("shift", norm.bias.detach().clone())
        nn.init.ones_(norm.weight)
        nn.init.zeros_(norm.bias)

    def _body(self) -> nn.Module:
        """Return the module that holds the layers; transformers < 5 wraps SigLIP's once more."""
        return getattr(self.network, "vision_model", self.network)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Encode images; the tokens of the patches come last, in row-major order.

        Args:
            images: (B, 3, H, W) in [-1, 1], of any size.

        Returns:
            Last hidden states (B, N, D).
        """
        x = images.float() / 2 + 0.5
        if x.shape[2:] != (self.input_size, self.input_size):
            x = F.interpolate(x, (self.input_size, self.input_size), mode="bicubic")
        x = (x - self.image_mean) / self.image_std
        settings = {}
        if self.kind != "dinov2_with_registers":
            settings["interpolate_pos_encoding"] = True
        if self.kind == "vit_mae":
            # With mask_ratio 0, MAE keeps all tokens and only sorts them by this noise.
            order = torch.arange(self.grid**2, dtype=x.dtype, device=x.device)
            settings["noise"] = order.expand(len(x), -1)
        return self.network(pixel_values=x, **settings).last_hidden_state

    def latents(self, hidden: Tensor) -> Tensor:
        """Return the patch tokens of hidden states (B, N, D) as latents (B, D, h, w)."""
        return hidden[:, -(self.grid**2) :].transpose(1, 2).unflatten(2, (self.grid, self.grid))

    @torch.no_grad()
    def token(self, hidden: Tensor) -> Tensor:
        """Return one token (B, D) per image: the CLS token, or SigLIP's pooled output.

        Args:
            hidden: last hidden states (B, N, D), as `forward` returns them.
        """
        if self.kind == "siglip_vision_model":
            return self._body().head(hidden * self.scale + self.shift)
        return hidden[:, 0] * self.scale + self.shift


def load_encoder(source: str, input_size: int | None = None) -> Encoder:
    """Load a frozen encoder; transformers downloads what is not on the disk.

    Args:
        source: folder or hub id of DINOv2 with registers, of SigLIP or SigLIP 2 with a fixed
            image size, or of ViT-MAE.
        input_size: side of the input images in pixels; the default of the family if None.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        FileNotFoundError: the folder is not complete, or the hub cannot be reached.
        ValueError: the files do not hold such an encoder.
    """
    transformers = import_transformers()
    if Path(source).is_dir() and not (Path(source) / CONFIG).exists():
        raise FileNotFoundError(
            f"{source} holds no encoder: there is no {CONFIG}; "
            "give a folder in transformers' layout"
        )
    if Path(source).is_dir():
        check_encoder_config(Path(source))
    try:
        config = transformers.AutoConfig.from_pretrained(source)
        config = getattr(config, "vision_config", config)
        if config.model_type not in FAMILIES:
            raise ValueError(f"it is a {config.model_type}; encoders are {', '.join(FAMILIES)}")
        network = load_network(source, config)
        for name, tensor in network.state_dict().items():
            check_finite(tensor, name, source)
        return Encoder(network, input_size, source)
    except (FileError, ImportError):
        raise
    except OSError as error:
        raise FileNotFoundError(
            f"there is no whole encoder {source}: it is neither a folder with {CONFIG} and "
            f"model.safetensors, nor available from the hub ({error}). Download it elsewhere "
            "(hf download NAME --local-dir FOLDER) and give the folder"
        ) from error
    except Exception as error:  # transformers raises many kinds about damaged files
        raise ValueError(f"the encoder {source} cannot be used: {reason(error)}") from error


def check_encoder_config(folder: Path) -> None:
    """Check the sizes in an encoder's config by the size of its weights.

    Raises:
        FileError: the config is damaged, or its layers would take more than the files hold.
    """
    path = folder / CONFIG
    config = read_json(path)
    config = config.get("vision_config", config) if isinstance(config, dict) else config
    if not isinstance(config, dict):
        raise FileError(path, f"holds {quoted(config)} instead of an object")
    held = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    for name in SIZES:
        value = config.get(name, 1)
        if type(value) not in (int, float) or not 0 <= value <= LARGEST_SIZE:
            raise FileError(path, f"has {name} {quoted(value)}, not a number to {LARGEST_SIZE:,}")
    layers, width = (config.get(name, 1) for name in ("num_hidden_layers", "hidden_size"))
    if held and layers * width**2 > held:  # each layer has several matrices of width x width
        raise FileError(
            path, f"has {layers} layers of width {width}, more than the {held:,} bytes beside it"
        )


def load_network(source: str | None, config, tensors: dict[str, Tensor] | None = None) -> nn.Module:
    """Load a model of transformers from `source`, or build it from given tensors.

    Args:
        source: folder or hub id; None if `tensors` are given.
        config: the model's config, of one of `FAMILIES`.
        tensors: state dict; the affine part of the last LayerNorm may be missing in it.

    Raises:
        ModuleNotFoundError: transformers is not installed, or cannot import the model.
        ValueError: other tensors are missing.
    """
    transformers, family = import_transformers(), FAMILIES[config.model_type]
    try:
        model = getattr(transformers, family.model)  # imported only now
    except ImportError as error:
        raise ModuleNotFoundError(
            f"transformers cannot import its {family.model} ({error}); if torchvision is "
            "installed, uninstall it or install the build that matches torch"
        ) from error
    if config.model_type == "vit_mae":
        config.mask_ratio = 0.0
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # silence the report of SigLIP's unused text tower
    try:
        network, report = model.from_pretrained(
            source, config=config, state_dict=tensors, output_loading_info=True
        )
    finally:
        transformers.logging.set_verbosity(verbosity)
    allowed = (f"{family.norm}.weight", f"{family.norm}.bias") if tensors is not None else ()
    missing = sorted(name for name in report["missing_keys"] if not name.endswith(allowed))
    if missing:
        raise ValueError(
            f"{len(missing)} tensors of the {family.model} are missing, first {missing[0]}"
        )
    return network


def import_transformers() -> ModuleType:
    """Import transformers.

    Raises:
        ModuleNotFoundError: it is not installed; the message says how to install it.
    """
    try:
        import transformers
    except ImportError as error:
        raise ModuleNotFoundError(
            f"an RAE needs transformers ({error}): pip install -e '.[train]'"
        ) from error
    return transformers
