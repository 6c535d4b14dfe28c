"""Pictures of a model's samples: through a VAE, as pixels, as a density, or by colours."""

from __future__ import annotations

from collections.abc import Callable

import comfy.latent_formats
import torch
from torch import Tensor

from .gm_model import PixelLatent, PointLatent
from .latent_shapes import to_points
from .previews import density_of, to_colours
from .sizes import check_size
from .solver_choice import no_effect

PIXELS_OF_LATENT = 8  # image pixels a side to a latent pixel, for a guess of a picture's size
POINTS_SIZE = 256  # pixels a side of a density picture
Decode = Callable[[Tensor], Tensor]


def decoder_of(model, vae=None) -> tuple[Decode, str]:
    """Return a function that makes pictures of the samples of a MODEL, and how it does so.

    The function takes samples (B, C, *S) in the scale of a LATENT, and returns pictures
    (B, H, W, 3) in [0, 1] on the CPU; of points it makes a single picture, (1, H, W, 3). Of a video
    it takes the first frame.

    Args:
        vae: a VAE; models of points and of pixels need none.

    Raises:
        ValueError: the samples are latents, there is no VAE, and ComfyUI knows no colours of them.
    """
    latent_format = model.get_model_object("latent_format")
    needs_none = isinstance(latent_format, PointLatent | PixelLatent)
    if needs_none and vae is not None:
        no_effect("vae", "this model samples no latents")
    if needs_none:
        is_points = isinstance(latent_format, PointLatent)
        return (_density, "density") if is_points else (_pixels, "pixels")
    if vae is not None:
        return lambda samples: _decoded(vae, samples), "VAE"
    if latent_format.latent_rgb_factors is None:
        raise ValueError(
            f"this model ({type(model.model).__name__}) samples latents; connect its VAE to vae "
            "to see pictures"
        )
    return lambda samples: _colours(latent_format, samples), "approximate colours: no VAE"


def enlarged(pictures: Tensor, size: int = 256) -> Tensor:
    """Enlarge small pictures (B, H, W, 3) by a whole number, each pixel to a square.

    Args:
        size: longer side, in pixels, above which no picture is enlarged.
    """
    scale = max(1, size // max(pictures.shape[1:3]))
    return pictures.repeat_interleave(scale, 1).repeat_interleave(scale, 2)


def draws_points(model) -> bool:
    """Return whether a MODEL is one of 2-D points, of which a latent holds many."""
    return isinstance(model.get_model_object("latent_format"), PointLatent)


def _density(samples: Tensor) -> Tensor:
    return density_of(to_points(samples.float().cpu()), POINTS_SIZE)[None]


def _pixels(samples: Tensor) -> Tensor:
    return to_colours(samples.cpu()).movedim(1, -1)


def _decoded(vae, samples: Tensor) -> Tensor:
    height, width = samples.shape[-2:]
    shape = (height * PIXELS_OF_LATENT, width * PIXELS_OF_LATENT, 3)
    check_size("pictures", len(samples), shape, "choose a smaller batch or latent")
    images = vae.decode(samples).float().cpu()
    if images.ndim == 5:  # (B, T, H, W, 3)
        images = images[:, 0]
    return images[..., :3].nan_to_num().clamp(0, 1)


def _colours(latent_format: comfy.latent_formats.LatentFormat, samples: Tensor) -> Tensor:
    """Map the channels of latents to colours, as ComfyUI's own previews do."""
    x = latent_format.process_in(samples.float().cpu())
    reshape = getattr(latent_format, "latent_rgb_factors_reshape", None)
    x = x if reshape is None else reshape(x)
    x = x[:, :, 0] if x.ndim == 5 else x
    factors = torch.tensor(latent_format.latent_rgb_factors).float()
    bias = torch.tensor(getattr(latent_format, "latent_rgb_factors_bias", None) or [0.0] * 3)
    return ((x.movedim(1, -1) @ factors + bias + 1) / 2).nan_to_num().clamp(0, 1)
