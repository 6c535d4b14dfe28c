"""Base models that GM adapters exist for: one entry each. A further base is a further entry."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...gmflow_core.models.adapter_heads import HeadLayout


@dataclass(frozen=True)
class Base:
    """A base model that adapters exist for.

    Args:
        image_model: ComfyUI's name of its architecture.
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
    ),
    Base(
        name="Qwen-Image",
        image_model="qwen_image",
        width="inner_dim",
        layout=HeadLayout(channels=16),
        layers=("norm_out", "proj_out"),
        mark=r"\.(img|txt)_(mlp|mod)\.",
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
    """Return ComfyUI's name of a MODEL's architecture, if it has one."""
    config = getattr(model.model, "model_config", None)
    return (getattr(config, "unet_config", None) or {}).get("image_model")
