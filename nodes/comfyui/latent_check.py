"""Compare latent and conditioning with what a model takes, before sampling starts."""

from __future__ import annotations

from collections.abc import Container, Mapping

from torch import Tensor, nn

# layers that a text and a pooled text go through first; Krea 2 has no single one
TEXT = ("txt_in", "context_embedder", "cap_embedder.1")
POOLED = ("vector_in.in_layer", "y_embedder.mlp.0")


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
            f"the latent does not fit: it has the shape {shape}, and this model "
            f"({type(model.model).__name__}) takes (batch, {channels}, {size}); connect an empty "
            "latent, or VAE Encode with the VAE of this model"
        )


CONNECT_TEXT = "connect CLIP Text Encode, with the text encoders of this model"


def check_conditioning(
    model, conds: Mapping[str, list[dict] | None], needed: Container[str] = ()
) -> None:
    """Check that the conditioning is as wide as the output of the base's text encoder.

    Args:
        model: a MODEL.
        conds: of a guider, by their kind.
        needed: kinds that have to hold a text, if the base takes one.

    Raises:
        ValueError: it is of another model, such as that of GM Class Labels, or without a text.
    """
    network = model.model.diffusion_model
    width, pooled_width = _width_of(network, TEXT), _width_of(network, POOLED)
    if hasattr(network, "txtlayers") and hasattr(network, "txtdim"):
        width = network.txtlayers * network.txtdim
    if width is None:
        return
    for kind, parts in conds.items():
        for cond in parts or []:
            text, pooled = cond.get("cross_attn"), cond.get("pooled_output")
            if text is None and kind in needed:
                raise ValueError(f"the {kind} conditioning holds no text; {CONNECT_TEXT}")
            if text is not None and text.shape[-1] != width:
                raise ValueError(
                    f"the conditioning does not fit: it has {text.shape[-1]} features, and this "
                    f"model takes {width}; {CONNECT_TEXT}"
                )
            if text is not None and (text.ndim != 3 or 0 in text.shape):
                raise ValueError(
                    f"the {kind} conditioning does not fit: it has the shape {tuple(text.shape)}, "
                    f"and must be (batch, tokens, {width}) with a token or more; {CONNECT_TEXT}"
                )
            if None not in (pooled, pooled_width) and pooled.shape[-1] != pooled_width:
                raise ValueError(
                    f"the {kind} conditioning does not fit: its pooled output has "
                    f"{pooled.shape[-1]} features, and this model takes {pooled_width}; "
                    f"{CONNECT_TEXT}"
                )


def _width_of(network: nn.Module, layers: tuple[str, ...]) -> int | None:
    """Return the features that the first of these layers takes; None if a network has none."""
    for path in layers:
        try:
            return network.get_submodule(path).in_features
        except AttributeError:
            continue
    return None
