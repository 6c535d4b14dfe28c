"""Frozen vision transformers that encode images."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from training.encoders.hub import CONFIG, PARTS, hub_errors


def _place(name: str, folder: Path) -> str:
    """A path inside `folder` if there is one of that name, else the name."""
    return str(folder / name) if (folder / name).exists() else name


def find_file(name: str, folder: Path) -> Path:
    """The file of that name in `folder`, or OWNER/NAME/PATH from the hub.

    Raises:
        FileNotFoundError: it is in neither.
    """
    if (folder / name).is_file():
        return folder / name
    owner, _, rest = name.partition("/")
    repository, _, inside = rest.partition("/")
    if not (owner and repository and inside):
        raise FileNotFoundError(
            f"there is no file {folder / name}, which {folder / PARTS} names; put it there"
        )
    from huggingface_hub import hf_hub_download

    with hub_errors(f"{owner}/{repository}", inside):
        return Path(hf_hub_download(f"{owner}/{repository}", inside))


def load_encoder(source: str, input_size: int | None = None) -> Encoder:
    """Read a frozen encoder; transformers fetches what is not on the disk.

    Args:
        source: folder or hub id of DINOv2 with registers, SigLIP or SigLIP 2 of one picture size, or ViT-MAE.
        input_size: side of the pictures that it is given; that of its kind if None.

    Raises:
        ModuleNotFoundError, FileNotFoundError, ValueError: as `load_rae`.
    """
    transformers = _transformers()
    if Path(source).is_dir() and not (Path(source) / CONFIG).exists():
        raise FileNotFoundError(
            f"{source} holds no encoder: there is no {CONFIG}; give a folder in transformers' layout"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(source)
        config = getattr(config, "vision_config", config)
        if config.model_type not in FAMILIES:
            raise ValueError(f"it is a {config.model_type}; encoders are {', '.join(FAMILIES)}")
        return Encoder(_network(source, config), input_size)
    except OSError as error:
        raise FileNotFoundError(
            f"there is no whole encoder {source}: neither a folder with {CONFIG} and model.safetensors, nor to be had from the "
            f"hub ({error}). Download it elsewhere (hf download NAME --local-dir FOLDER) and give the folder"
        ) from error
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"the encoder {source} cannot be used: {error}") from error


def _network(source: str | None, config, tensors: dict[str, Tensor] | None = None) -> nn.Module:
    """A model of transformers from its place, or of these tensors; a last norm without affine part may be missing.

    Raises:
        ValueError: other tensors are missing.
    """
    transformers, family = _transformers(), FAMILIES[config.model_type]
    if config.model_type == "vit_mae":
        config.mask_ratio = 0.0
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it reports the text encoders that are left out
    try:
        network, report = getattr(transformers, family.model).from_pretrained(
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


def _transformers():
    try:
        import transformers
    except ImportError as error:
        raise ModuleNotFoundError(
            f"an RAE needs transformers ({error}): pip install -e '.[train]'"
        ) from error
    return transformers


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5,) * 3, (0.5,) * 3)


class Family(NamedTuple):
    """A kind of encoder, by its `model_type` in transformers."""

    model: str  # class of transformers
    config: str
    norm: str  # attribute of the last LayerNorm
    input_size: int  # side of the pictures that it is given
    normalisation: tuple[
        tuple[float, ...], tuple[float, ...]
    ]  # mean and std of its pictures, of values in [0, 1]


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
    """A frozen vision transformer in float32. Its last LayerNorm has no affine part, except for what `token` gives.

    Args:
        network: a model of transformers, of one of `FAMILIES`.
        input_size: side of the pictures that it is given.

    Raises:
        ValueError: the pictures do not divide into its patches.
    """

    def __init__(self, network: nn.Module, input_size: int | None = None):
        super().__init__()
        self.network = network.float().eval().requires_grad_(False)
        self.kind: str = network.config.model_type
        family = FAMILIES[self.kind]
        self.input_size = input_size or family.input_size
        patch = network.config.patch_size
        if self.input_size % patch:
            raise ValueError(
                f"input_size {self.input_size} is not divisible by the encoder's patches of {patch} pixels"
            )
        self.grid = self.input_size // patch  # tokens a side
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
        """Where the layers are: older versions of transformers wrap those of SigLIP once more."""
        return getattr(self.network, "vision_model", self.network)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """The last hidden states of pictures (B, 3, H, W) in [-1, 1]: (B, N, D), those of patches last, row by row."""
        x = images.float() / 2 + 0.5
        if x.shape[2:] != (self.input_size, self.input_size):
            x = F.interpolate(x, (self.input_size, self.input_size), mode="bicubic")
        x = (x - self.image_mean) / self.image_std
        settings = {}
        if self.kind != "dinov2_with_registers":
            settings["interpolate_pos_encoding"] = True
        if self.kind == "vit_mae":  # the order of its tokens; with a mask_ratio of 0 it keeps all
            settings["noise"] = torch.arange(self.grid**2, dtype=x.dtype, device=x.device).expand(
                len(x), -1
            )
        return self.network(pixel_values=x, **settings).last_hidden_state

    def latents(self, hidden: Tensor) -> Tensor:
        """The tokens of the patches, (B, D, h, w)."""
        return hidden[:, -(self.grid**2) :].transpose(1, 2).unflatten(2, (self.grid, self.grid))

    @torch.no_grad()
    def token(self, hidden: Tensor) -> Tensor:
        """One token (B, D) for each picture, as the encoder was trained to give it: CLS, or SigLIP's pooled output."""
        if self.kind == "siglip_vision_model":
            return self._body().head(hidden * self.scale + self.shift)
        return hidden[:, 0] * self.scale + self.shift


ENCODERS = {
    "dinov2": "facebook/dinov2-with-registers-base",
    "siglip2": "google/siglip2-base-patch16-256",
    "mae": "facebook/vit-mae-base",
}
