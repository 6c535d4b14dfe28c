"""Previews of 2-D and of pixel models while they are sampled, by any sampler.

ComfyUI's own previews are a linear map of a latent's channels to colours, of the first item alone.
Latent formats of this extension draw the whole batch with `picture`, and have no linear map, so
that ComfyUI sends no preview; a wrapper for its SAMPLER_SAMPLE adds one to the sampler's callback.
"""

from __future__ import annotations

import math

import comfy.utils
import latent_preview
from comfy.cli_args import LatentPreviewMethod, args
from comfy.patcher_extension import WrappersMP
from PIL import Image
from torch import Tensor

from ...gmflow_core.pictures import image_grid, to_image
from ...gmflow_core.toys.density_picture import density_picture
from .guard import guarded

KEY = "gmflow_previews"  # of our wrapper
SIZE = 512  # pixels a side of a picture
PER_CELL = 4  # points to a cell of a density picture, on average, if there are few
FEWEST_CELLS, MOST_CELLS = 16, 128  # a side


def density_of(points: Tensor, size: int = SIZE) -> Tensor:
    """Draw the density of points (N, 2), with as many cells as their number allows.

    Returns:
        (size, size, 3) in [0, 1].
    """
    cells = round(math.sqrt(len(points) / PER_CELL))
    return density_picture(points, size, min(max(cells, FEWEST_CELLS), MOST_CELLS, size))


def pixel_grid(images: Tensor) -> Tensor:
    """Arrange images (B, 1 or 3, h, w) in [-1, 1] as `batch_grid` does."""
    return batch_grid(to_colours(images))


def to_colours(images: Tensor) -> Tensor:
    """Convert images (B, 1 or 3, h, w) in [-1, 1] to red, green and blue in [0, 1]."""
    return ((images.float().nan_to_num() + 1) / 2).clamp(0, 1).expand(-1, 3, -1, -1)


def batch_grid(images: Tensor, size: int = SIZE) -> Tensor:
    """Arrange images (B, 3, h, w) in [0, 1] side by side, nearly in a square.

    Args:
        size: longer side of the picture, up to which the pixels of small images become squares.

    Returns:
        (H, W, 3) in [0, 1].
    """
    columns, gap = math.ceil(math.sqrt(len(images))), 2 if len(images) > 1 else 0
    rows = math.ceil(len(images) / columns)
    across, down = columns * images.shape[3], rows * images.shape[2]
    scale = min((size - gap * (columns + 1)) // across, (size - gap * (rows + 1)) // down)
    return image_grid(images, columns, max(1, scale), gap)


def add_previews(model) -> None:
    """Let a MODEL whose latent format has `picture` send previews."""
    model.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, guarded(sample_with_previews))


def without_previews(model):
    """Return a clone of a MODEL that sends no previews of its own."""
    model = model.clone()
    model.remove_wrappers_with_key(WrappersMP.SAMPLER_SAMPLE, KEY)
    return model


def sample_with_previews(executor, guider, sigmas, extra_args, callback, *others, **settings):
    """Run a sampler that sends a preview after each step, unless previews are switched off."""
    draw = guider.inner_model.latent_format.picture
    if callback is None or args.preview_method == LatentPreviewMethod.NoPreviews:
        return executor(guider, sigmas, extra_args, callback, *others, **settings)
    bar = comfy.utils.ProgressBar(len(sigmas) - 1)

    def report(step: int, x0: Tensor, x: Tensor, steps: int) -> None:
        callback(step, x0, x, steps)
        bar.update_absolute(step + 1, steps, preview_of(draw(x0.detach().cpu())))

    return executor(guider, sigmas, extra_args, report, *others, **settings)


def preview_of(picture: Tensor) -> tuple[str, Image.Image, None]:
    """Convert a picture (H, W, 3) to a preview as ComfyUI sends it: format, image, no resizing.

    PNG keeps the edges of squares.
    """
    image, largest = to_image(picture), latent_preview.MAX_PREVIEW_RESOLUTION
    image.thumbnail((largest, largest), Image.Resampling.BOX)
    return "PNG", image, None
