"""Base models that GM adapters exist for: one entry each."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...gmflow_core.models.adapter_heads import HeadLayout


@dataclass(frozen=True)
class Base:
    """A base model that adapters exist for. A further one is a further entry.

    Args:
        image_model: ComfyUI's name of its architecture.
        width: attribute of its network that holds the transformer's width.
        layout: of its tokens.
        layers: names of its last layers: the head takes the place of the first, the others fall away.
        mark: pattern of a LoRA module that only its adapters have, in the names of diffusers.
        guidance: that it is distilled with, if it is.
        renamed: LoRA modules that ComfyUI does not know by their name in diffusers, and their names in ComfyUI.
        multiplier: of sigma, in the unit of time that its network is fed.
    """

    name: str
    image_model: str
    width: str
    layout: HeadLayout
    layers: tuple[str, ...]
    mark: str
    guidance: float | None = None
    renamed: dict[str, str] = field(default_factory=dict)
    multiplier: float = 1.0


BASES = (
    Base(
        "FLUX.1",
        "flux",
        "hidden_size",
        HeadLayout(channels=16),
        ("final_layer",),
        r"single_transformer_blocks\.\d+\.(proj_mlp|attn\.to_q)$",
        guidance=3.5,
    ),
    Base(
        "Qwen-Image",
        "qwen_image",
        "inner_dim",
        HeadLayout(channels=16),
        ("norm_out", "proj_out"),
        r"\.(img|txt)_(mlp|mod)\.",
    ),
    Base(
        "FLUX.2",
        "flux2",
        "hidden_size",
        HeadLayout(channels=32, folded=2, modulation_bias=False),
        ("final_layer",),
        r"single_transformer_blocks\.\d+\.attn\.to_qkv_mlp_proj$",
        guidance=4.0,
        renamed={
            "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
            "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
        },
    ),
)


def base_of(model) -> Base:
    """The entry of BASES for a MODEL.

    Raises:
        ValueError: there is none.
    """
    config = getattr(model.model, "model_config", None)
    found = (getattr(config, "unet_config", None) or {}).get("image_model")
    for base in BASES:
        if base.image_model == found:
            return base
    raise ValueError(
        f"GM Adapter is for {', '.join(base.name for base in BASES)}, and this model is a {type(model.model).__name__}"
        f"{f' ({found})' if found else ''}; connect one of those"
    )
