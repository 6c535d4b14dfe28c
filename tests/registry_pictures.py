"""Draw the icon and the banner that the registry shows, docs/icon.png and docs/banner.png.

    python -m tests.registry_pictures

Both show the method on one axis. From left to right, sigma falls from 1 to 0: one Gaussian of noise
splits into the components of a mixture, each in its colour. The curves are paths of the exact
probability flow ODE; the dots are GM-ODE on the same noise with four network calls.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from gmflow_core import GaussianMixture, flow_sigmas, posterior, sample_euler, sample_gm_ode
from gmflow_core.pictures import to_image

DOCS = Path(__file__).resolve().parents[1] / "docs"
ICON, BANNER = DOCS / "icon.png", DOCS / "banner.png"

MODES = (-2.15, -0.75, 0.65, 2.1)  # means of the data's components
WEIGHTS = (0.26, 0.24, 0.24, 0.26)
STD = 0.13
NOISE = (-1.15, -0.4, 0.3, 1.1)  # where the paths begin
EXTENT = 2.9  # the picture shows [-EXTENT, EXTENT]
MARGIN = 0.1  # of the width, before sigma = 1 and behind sigma = 0
CALLS, FINE = 4, 128  # network calls of the dots, and of the curves

COLOURS = ((255, 84, 120), (255, 178, 66), (50, 222, 172), (96, 140, 255))
DARK, GREY, LIGHT = (17, 15, 33), (184, 180, 212), (255, 255, 255)
WORDS = ("GMFlow", "Gaussian-mixture flow matching", "for ComfyUI, in four steps")


def main() -> None:
    """Write both pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    for path, picture in ((ICON, icon()), (BANNER, banner())):
        picture.save(path, optimize=True)
        print(f"wrote {path} ({picture.width} x {picture.height})")


def icon(size: int = 512) -> Image.Image:
    """Draw the square icon, `size` pixels a side."""
    return _flow(size, size, dot=0.034, line=0.013)


def banner(height: int = 630) -> Image.Image:
    """Draw the banner, 21 : 9, with words on its left."""
    width, left = round(height * 7 / 3), round(height * 0.85)
    picture = Image.new("RGB", (width, height), DARK)
    picture.paste(_flow(width - left, height, dot=0.021, line=0.008), (left, 0))
    draw = ImageDraw.Draw(picture)
    for y, size, colour, words in zip(
        (0.47, 0.57, 0.635), (0.18, 0.047, 0.047), (LIGHT, GREY, GREY), WORDS, strict=True
    ):
        font = ImageFont.load_default(size * height)
        draw.text((0.11 * height, y * height), words, colour, font, "ls")
    return picture


def _flow(width: int, height: int, *, dot: float, line: float) -> Image.Image:
    """Draw densities, curves and dots; their sizes are in heights."""
    scale = 3  # drawn larger, then scaled down for smooth edges
    picture = to_image(_densities(width, height)).resize((width * scale, height * scale))
    draw = ImageDraw.Draw(picture)

    def at(sigma: float, x: float) -> tuple[float, float]:
        across = 1 - MARGIN - (1 - 2 * MARGIN) * sigma
        return scale * width * across, scale * height * (1 - x / EXTENT) / 2

    for path in _paths(sample_euler, FINE):
        draw.line([at(*point) for point in path], LIGHT, round(line * height * scale), "curve")
    radius = dot * height * scale
    for path in _paths(sample_gm_ode, CALLS):
        for x, y in (at(*point) for point in path):
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), LIGHT)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def _densities(width: int, height: int) -> Tensor:
    """Return the density of x_sigma in each column as a picture (height, width, 3) in [0, 1]."""
    across = (torch.arange(width) + 0.5) / width
    sigma = ((1 - MARGIN - across) / (1 - 2 * MARGIN)).clamp(0, 1)
    edge = (torch.minimum(across, 1 - across) / MARGIN).clamp(0, 1)
    fade = edge**2 * (3 - 2 * edge)  # at both ends
    x = EXTENT * (1 - 2 * (torch.arange(height) + 0.5) / height)
    means = (1 - sigma) * torch.tensor(MODES)[:, None]  # (K, width)
    std = (((1 - sigma) * STD) ** 2 + sigma**2).sqrt()
    shares = torch.stack(
        [
            weight * _one(mean, std).log_prob(x.expand(width, 1, height)).exp()
            for weight, mean in zip(WEIGHTS, means, strict=True)
        ]
    )  # (K, width, height)
    density = shares.sum(0)
    brightness = (density / density.amax(1, keepdim=True)) ** 0.7 * fade[:, None]
    colours = torch.tensor(COLOURS) / 255
    colour = torch.einsum("kwh,kc->hwc", shares / density.clamp_min(1e-30), colours)
    dark = torch.tensor(DARK) / 255
    return dark + (colour - dark) * brightness.T[..., None]


def _one(mean: Tensor, std: Tensor) -> GaussianMixture:
    """Return one Gaussian a column: mean (width, 1), std (width,)."""
    width = len(std)
    return GaussianMixture(
        mean.view(width, 1, 1, 1), torch.zeros(width, 1, 1, 1), std.log().view(width, 1, 1, 1)
    )


def _denoiser(x: Tensor, sigma: Tensor) -> GaussianMixture:
    """Return the exact mixture of x_0 given x_sigma, the best that a network could predict."""
    count = len(x)
    data = GaussianMixture(
        torch.tensor(MODES).view(1, -1, 1).expand(count, -1, 1),
        torch.tensor(WEIGHTS).log().view(1, -1, 1).expand(count, -1, 1),
        torch.full((count, 1, 1), STD).log(),
    )
    return posterior(data, x, torch.ones_like(sigma), x, sigma)  # x at sigma = 1 tells nothing


def _paths(sampler, calls: int) -> list[list[tuple[float, float]]]:
    """Return the path of each noise in NOISE as points (sigma, x)."""
    sigmas, xs = flow_sigmas(calls), []
    end = sampler(
        _denoiser,
        torch.tensor(NOISE)[:, None],
        sigmas,
        callback=lambda step, x, mean: xs.append(x[:, 0]),
    )
    path = torch.stack([*xs, end[:, 0]], 1)  # (paths, calls + 1)
    return [list(zip(sigmas.tolist(), row.tolist(), strict=True)) for row in path]


if __name__ == "__main__":
    main()
