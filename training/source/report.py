"""Draw a fitted source."""

from __future__ import annotations

from pathlib import Path

from gmflow_core.files.atomic import atomic_write
from gmflow_core.pictures import image_grid
from gmflow_core.source.source import GaussianMixtureSource
from training.common.plots import figure
from training.data.shards import LatentDataset, to_pixels

SHOWN = 64  # modes in the picture


def draw_report(
    source: GaussianMixtureSource,
    log_likelihoods: list[float],
    dataset: LatentDataset | None,
    path: Path,
) -> Path:
    """The likeliest modes' means as pictures where they can be drawn, the weights, and the log-likelihood of each iteration."""
    drawing, axes = figure(1, 3, 3.2, 3.2)
    means, weights, curve = axes[0]
    means.axis("off")
    order = source.log_weights.argsort(descending=True)
    shape, chosen = source.shape, order[:SHOWN].cpu()
    if len(shape) == 3 and shape[0] in (1, 3, 4):
        x = source.means.cpu()[chosen][:, :3].expand(-1, 3, -1, -1)
        pixels = dataset is not None and dataset.kind == "pixels"
        x = to_pixels(x) / 255 if pixels else (0.5 + 0.25 * x / x.std()).clamp(0, 1)
        means.imshow(
            image_grid(x, columns=round(len(x) ** 0.5), scale=max(1, 32 // shape[-1])).numpy()
        )
        means.set_title(f"means of {len(x)} modes, heaviest first", fontsize=9)
    elif shape == (2,):
        means.axis("on")
        means.scatter(*source.means.cpu().T, s=400 * source.weights.cpu(), alpha=0.6)
        means.set_aspect("equal")
        means.set_title("means, size by weight", fontsize=9)
    else:
        means.set_title(f"samples of {shape} are not drawn", fontsize=9)
    weights.hist(source.weights.cpu().numpy() * source.num_modes, bins=40)
    weights.set_xlabel("weight times number of modes")
    weights.set_ylabel("modes")
    shown = log_likelihoods[1:] or log_likelihoods  # the first is that of the start, far below
    done = range(len(log_likelihoods) - len(shown) + 1, len(log_likelihoods) + 1)
    curve.plot(done, shown, marker="." if len(shown) < 50 else "")
    curve.set_xlabel("iteration of EM")
    curve.set_ylabel("log-likelihood, nats per sample")
    with atomic_write(path) as temporary:
        drawing.savefig(temporary, format="png")
    return path
