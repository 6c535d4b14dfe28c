"""Base models that GM adapters exist for: one entry each. A further base is a further entry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter

from torch import nn

from ...gmflow_core.models.adapter_heads import HeadLayout

FirstToken = Callable[[int, int, int, nn.Module], int]


def image_first(tokens: int, own: int, text: int, network: nn.Module) -> int:
    """Return where the image's tokens begin, for bases whose last layer sees them first.

    Args:
        tokens: all that the last layer sees.
        own: the image's.
        text: of the conditioning.
        network: the base model's.
    """
    return 0


def after_text(tokens: int, own: int, text: int, network: nn.Module) -> int:
    """Return where the image's tokens begin, behind those of the text; see `image_first`."""
    return text


def padded_last(tokens: int, own: int, text: int, network: nn.Module) -> int:
    """Return where the image's tokens begin, last and padded to a multiple; see `image_first`."""
    multiple = getattr(network, "pad_tokens_multiple", None) or 1
    return tokens - -(-own // multiple) * multiple


@dataclass(frozen=True)
class Trained:
    """What a base's new adapters change, by patterns of the names of layers in the base's files.

    The names are those of diffusers where its published adapters have them, else ComfyUI's.

    Args:
        linear: ComfyUI's name of the base's last linear layer.
        mlp: of the MLPs and the time embedding, as in the published adapters.
        attention: of the attention.
        modulation: ComfyUI's name of the linear layer of the last adaptive norm; "" if the head
            takes the place of `linear` alone.
        shift_first: the rows of the shift come before those of the scale there.
    """

    linear: str
    mlp: str
    attention: str
    modulation: str = ""
    shift_first: bool = False


@dataclass(frozen=True)
class Base:
    """A base model that adapters exist for.

    Args:
        image_model: ComfyUI's name of its architecture, or one of NETWORKS.
        width: attribute of its network that holds the transformer's width.
        layout: layout of its tokens.
        layers: names of its last layers: the head replaces the first, the others are skipped.
        mark: pattern, in the names of diffusers, of a LoRA module that only its adapters have.
        guidance: the guidance it was distilled with, if it was.
        default_guidance: the guidance ComfyUI feeds it if the conditioning sets none.
        renamed: LoRA modules that ComfyUI does not know by their name in diffusers, and their
            names in ComfyUI.
        multiplier: factor from sigma to the unit of time that its network takes.
        saved_names: parts of weight names as newer versions of ComfyUI have them in memory, and
            as published files and older versions have them.
        trained: what new adapters for it change.
        first_token: where the image's tokens begin among those that its last layer sees.
    """

    name: str
    image_model: str
    width: str
    layout: HeadLayout
    layers: tuple[str, ...]
    mark: str
    guidance: float | None = None
    default_guidance: float | None = None
    renamed: dict[str, str] = field(default_factory=dict)
    multiplier: float = 1.0
    saved_names: dict[str, str] = field(default_factory=dict)
    trained: Trained | None = None
    first_token: FirstToken = image_first

    def width_of(self, network: nn.Module) -> int:
        """Return the width of a network of this base."""
        return attrgetter(self.width)(network)


LINEAR = {"channels": 16, "linear_only": True}
TIME = r"|time_text_embed\.timestep_embedder\.linear_[12]"
JOINT = r"transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
NETWORKS = {"OpenAISignatureMMDITWrapper": "mmdit"}  # classes that ComfyUI names no architecture of
BASES = (
    Base(
        name="FLUX.1",
        image_model="flux",
        width="hidden_size",
        layout=HeadLayout(channels=16),
        layers=("final_layer",),
        mark=r"single_transformer_blocks\.\d+\.(proj_mlp|attn\.to_q)$",
        guidance=3.5,
        default_guidance=3.5,
        saved_names={"_norm.weight": "_norm.scale"},
        trained=Trained(
            "final_layer.linear",
            r"transformer_blocks\.\d+\.ff(_context)?\.net\.(0\.proj|2)"
            rf"|single_transformer_blocks\.\d+\.proj_(mlp|out){TIME}",
            rf"{JOINT}|single_transformer_blocks\.\d+\.attn\.to_[qkv]",
            "final_layer.adaLN_modulation.1",
            shift_first=True,
        ),
    ),
    Base(
        name="Qwen-Image",
        image_model="qwen_image",
        width="inner_dim",
        layout=HeadLayout(channels=16),
        layers=("norm_out", "proj_out"),
        mark=r"\.(img|txt)_(mlp|mod)\.",
        trained=Trained(
            "proj_out",
            rf"transformer_blocks\.\d+\.(img|txt)_mlp\.net\.(0\.proj|2){TIME}",
            JOINT,
            "norm_out.linear",
        ),
    ),
    Base(
        name="FLUX.2",
        image_model="flux2",
        width="hidden_size",
        layout=HeadLayout(channels=32, folded=2, modulation_bias=False),
        layers=("final_layer",),
        mark=r"single_transformer_blocks\.\d+\.attn\.to_qkv_mlp_proj$",
        guidance=4.0,
        default_guidance=3.5,
        renamed={
            "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
            "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
            "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
            "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
            "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
            "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
            "single_stream_modulation.linear": "single_stream_modulation.lin",
        },
        trained=Trained(
            "final_layer.linear",
            r"transformer_blocks\.\d+\.ff(_context)?\.linear_(in|out)"
            r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
            r"|time_guidance_embed\.timestep_embedder\.linear_[12]",
            JOINT,
            "final_layer.adaLN_modulation.1",
            shift_first=True,
        ),
    ),
    Base(
        name="Z-Image / Lumina 2",
        image_model="lumina2",
        width="final_layer.linear.in_features",
        layout=HeadLayout(channels_last=True, negative=True, **LINEAR),
        layers=("final_layer.linear",),
        mark=r"^layers\.\d+\.feed_forward\.w1$",
        trained=Trained(
            "final_layer.linear",
            r"layers\.\d+\.feed_forward\.w[123]|t_embedder\.mlp\.[02]",
            r"layers\.\d+\.attention\.(qkv|out)",
        ),
        first_token=padded_last,
    ),
    Base(
        name="Krea 2",
        image_model="krea2",
        width="last.linear.in_features",
        layout=HeadLayout(**LINEAR),
        layers=("last.linear",),
        mark=r"^blocks\.\d+\.mlp\.gate$",
        trained=Trained(
            "last.linear",
            r"blocks\.\d+\.mlp\.(gate|up|down)|tmlp\.[02]",
            r"blocks\.\d+\.attn\.(w[qkvo]|gate)",
        ),
        first_token=after_text,
    ),
    Base(
        name="Stable Diffusion 3",
        image_model="mmdit",
        width="final_layer.linear.in_features",
        layout=HeadLayout(channels_last=True, **LINEAR),
        layers=("final_layer.linear",),
        mark=r"^joint_blocks\.\d+\.x_block\.mlp\.fc1$",
        multiplier=1000.0,
        trained=Trained(
            "final_layer.linear",
            r"joint_blocks\.\d+\.(x|context)_block\.mlp\.fc[12]|t_embedder\.mlp\.[02]",
            r"joint_blocks\.\d+\.(x|context)_block\.attn2?\.(qkv|proj)",
        ),
    ),
)


def base_names() -> str:
    """Return the names of all bases, for messages."""
    return ", ".join(base.name for base in BASES)


def find_base_named(name: str | None) -> Base | None:
    """Return the entry of BASES of a name, in any case of letters; None if there is none."""
    return next((base for base in BASES if base.name.lower() == (name or "").lower()), None)


def find_base(model) -> Base | None:
    """Return the entry of BASES for a MODEL, None if there is none."""
    return next((base for base in BASES if base.image_model == _image_model(model)), None)


def base_of(model) -> Base:
    """Return the entry of BASES for a MODEL.

    Raises:
        ValueError: there is none.
    """
    base = find_base(model)
    if base is None:
        found = _image_model(model)
        raise ValueError(
            f"GM Adapter does not fit this model, a {type(model.model).__name__}"
            f"{f' ({found})' if found else ''}: it is for {base_names()}; connect a model of one "
            "of those"
        )
    return base


def _image_model(model) -> str | None:
    """Return ComfyUI's name of a MODEL's architecture, or that of NETWORKS, if it has one."""
    config, network = (getattr(model.model, n, None) for n in ("model_config", "diffusion_model"))
    found = (getattr(config, "unet_config", None) or {}).get("image_model")
    return found or NETWORKS.get(type(network).__name__)
