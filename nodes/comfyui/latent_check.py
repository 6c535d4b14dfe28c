"""Compare latent and conditioning with what a model takes, before sampling starts."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def check_latent(model, latent: Tensor, any_size: bool = False) -> None:
    """Check the channels and the dimensions of a latent that is about to be sampled.

    ComfyUI has brought empty latents into the model's shape by then; others would end in an error
    about matrices.

    Args:
        model: a MODEL.
        latent: (B, C, *S).
        any_size: True for models of points, which take any S.

    Raises:
        ValueError: they are not the model's.
    """
    taken = model.get_model_object("latent_format")
    channels, dims = taken.latent_channels, getattr(taken, "latent_dimensions", 2)
    shape = tuple(latent.shape)
    fits = len(shape) >= 3 and shape[1] == channels and (any_size or len(shape) == dims + 2)
    if not fits:
        size = (
            "points"
            if any_size
            else {1: "length", 2: "height, width"}.get(dims, "frames, height, width")
        )
        raise ValueError(
            f"the latent has the shape {shape}, and this model ({type(model.model).__name__}) "
            f"takes (batch, {channels}, {size}); connect an empty latent, or VAE Encode with the "
            "VAE of this model"
        )


def check_conditioning(model, conds: Mapping[str, list[dict] | None]) -> None:
    """Check that the conditioning is as wide as the output of the base's text encoder.

    Args:
        model: a MODEL.
        conds: of a guider, by their kind.

    Raises:
        ValueError: it is of another model, such as that of GM Class Labels.
    """
    first = getattr(model.model.diffusion_model, "txt_in", None)
    width = getattr(first, "in_features", None)
    for parts in conds.values():
        for cond in parts or []:
            text = cond.get("cross_attn")
            if width is not None and text is not None and text.shape[-1] != width:
                raise ValueError(
                    f"the conditioning has {text.shape[-1]} features, and this model takes "
                    f"{width}; connect CLIP Text Encode, with the text encoders of this model"
                )
