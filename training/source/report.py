"""Draw a fitted source."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from gmflow_core.files.atomic import atomic_write
from gmflow_core.pictures import image_grid
from gmflow_core.source.source import GaussianMixtureSource
from training.common.plots import figure, finish
from training.data.encoded_images import EncodedImages
from training.data.shards import LatentDataset, to_pixels

SHOWN = 64  # modes in the picture


def draw_report(
    source: GaussianMixtureSource,
    log_likelihoods: list[float],
    dataset: LatentDataset | EncodedImages | None,
    path: Path,
) -> None:
    """Draw the means of the likeliest modes, a histogram of the weights, and the curve of EM.

    Args:
        log_likelihoods: of each iteration, in nats per sample.
        dataset: the samples, if they were prepared; says whether means are pixels.
        path: PNG file to write.
    """
    drawing, axes = figure(1, 3, 3.2, 3.2)
    means, weights, curve = axes[0]
    draw_means(means, source, dataset is not None and dataset.kind == "pixels")
    weights.hist(source.weights.cpu().numpy() * source.num_modes, bins=40)
    weights.set_xlabel("weight times number of modes")
    weights.set_ylabel("modes")
    shown = log_likelihoods[1:] or log_likelihoods  # the start is far below the rest
    done = range(len(log_likelihoods) - len(shown) + 1, len(log_likelihoods) + 1)
    curve.plot(done, shown, marker="." if len(shown) < 50 else "")
    curve.set_xlabel("iteration of EM")
    curve.set_ylabel("log-likelihood, nats per sample")
    with atomic_write(path) as temporary:
        drawing.savefig(temporary, format="png")


def draw_means(ax, source: GaussianMixtureSource, pixels: bool) -> None:
    """Draw the means as images if they have 1, 3 or 4 channels, or as points if they are 2-D.

    Args:
        ax: matplotlib's axes.
        pixels: the means are pixels in [-1, 1]; otherwise latents, drawn in false colours.
    """
    ax.axis("off")
    shape = source.shape
    chosen = source.log_weights.argsort(descending=True)[:SHOWN].cpu()
    if len(shape) == 3 and shape[0] in (1, 3, 4):
        x = source.means.cpu()[chosen][:, :3].expand(-1, 3, -1, -1)
        x = to_pixels(x) / 255 if pixels else (0.5 + 0.25 * x / x.std()).clamp(0, 1)
        scale = max(1, 32 // shape[-1])
        ax.imshow(image_grid(x, columns=round(len(x) ** 0.5), scale=scale).numpy())
        ax.set_title(f"means of {len(x)} modes, heaviest first", fontsize=9)
    elif shape == (2,):
        ax.axis("on")
        ax.scatter(*source.means.cpu().T, s=400 * source.weights.cpu(), alpha=0.6)
        ax.set_aspect("equal")
        ax.set_title("means, size by weight", fontsize=9)
    else:
        ax.set_title(f"samples of {shape} are not drawn", fontsize=9)


def draw_weights(weights: Tensor, sizes: Tensor, path: Path) -> None:
    """Draw the weights of the modes and the samples' shares, sorted, and their histograms.

    Args:
        weights: of the mixture, (M,).
        sizes: samples whose likeliest mode it is, (M,).
        path: PNG file to write.
    """
    weights, shares = weights.double().cpu(), (sizes / sizes.sum()).double().cpu()
    drawing, axes = figure(1, 2, 4.2, 3.2)
    ranks = range(1, len(weights) + 1)
    bins = torch.linspace(0, len(weights) * max(weights.max(), shares.max()).item(), 41)
    for values, name, style in ((weights, "weights", "-"), (shares, "shares of samples", "--")):
        label = f"{name}: {effective_number(values):.1f} effective modes"
        axes[0, 0].plot(ranks, values.sort(descending=True).values, style, label=label)
        axes[0, 1].hist(values * len(weights), bins=bins, histtype="step", linestyle=style)
    axes[0, 0].axhline(1 / len(weights), color="grey", lw=0.8, label=f"uniform: {len(weights)}")
    axes[0, 0].set_xlabel("mode, heaviest first")
    axes[0, 0].set_ylabel("weight")
    axes[0, 0].set_ylim(bottom=0)
    axes[0, 1].set_xlabel("weight times number of modes")
    axes[0, 1].set_ylabel("modes")
    finish(drawing, axes, path)


def effective_number(weights: Tensor) -> float:
    """Return the exponential of the entropy of weights (M,), M for equal ones."""
    return torch.special.entr(weights).sum().exp().item()
