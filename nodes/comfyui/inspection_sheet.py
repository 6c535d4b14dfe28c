"""Draw a recorded mixture: maps, charts, the components' means, and one pixel's own mixture."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...gmflow_core import GaussianMixture
from ...gmflow_core.charts import (
    SCALE,
    bar_chart,
    heat_map,
    histogram_chart,
    mixture_chart,
    weight_table,
    with_scale,
)
from ...gmflow_core.pictures import contact_sheet, layout_of, stacked, to_picture
from ...gmflow_core.toys.checkerboard import histogram
from .inspection import Recorded
from .sample_pictures import Decode

TILE = 320  # pixels a side of a picture on the sheet
FEW = 8  # components up to which their means are as large as the maps; else half as large
EXTENT = 4.4  # maps of points show [-EXTENT, EXTENT]^2
CELLS = 48  # a side of such a map
ROWS = 12  # components in the table of a pixel, at most
BINS = 10  # of the weights' histogram
MARK = torch.tensor([0.3, 0.95, 0.9])  # colour of the mark at the chosen pixel
UNCERTAIN, AT = "most uncertain", "x, y"


@dataclass(frozen=True, eq=False)
class Place:
    """One pixel of a picture, or one point, and its mixture.

    Args:
        mixture: (1, K, C).
        x, y: column and row, from 0; of a point its coordinates before the step.
    """

    mixture: GaussianMixture
    x: float
    y: float
    name: str


@dataclass(frozen=True, eq=False)
class Inspection:
    """A recorded mixture of one item of a batch, with its maps.

    Args:
        item: from 0; points have only one.

    Raises:
        ValueError: the batch has no such item.
    """

    recorded: Recorded
    item: int

    def __post_init__(self):
        batch = 1 if self.recorded.of_points else len(self.recorded.x)
        if self.item >= batch:
            what = (
                "all the points of this latent are one picture; choose item 0"
                if self.recorded.of_points
                else f"the batch has {batch} items; choose one from 0 to {batch - 1}"
            )
            raise ValueError(f"there is no item {self.item}: {what}")

    @property
    def mixture(self) -> GaussianMixture:
        """Mixture of the item: (1, K, C, h, w), of a video's first frame; of points (N, K, 2)."""
        own = self.recorded.mixture
        if self.recorded.of_points:
            return own
        means, weights, std = (
            part[min(self.item, len(part) - 1)][None]
            for part in (own.means, own.log_weights, own.log_std)
        )
        if means.ndim == 6:  # (1, K, C, T, h, w)
            means, weights, std = means[:, :, :, 0], weights[:, :, :, 0], std[:, :, :, 0]
        return GaussianMixture(means, weights, std)

    def field(self, values: Tensor) -> Tensor:
        """Arrange values (B, 1, *S) of the item as a map (h, w).

        Those of points are averaged over the cells of the plane, nan where there is no point.
        """
        if not self.recorded.of_points:
            return values[0, 0]
        x = self.recorded.x
        inside = ((x.abs() < EXTENT) & x.isfinite()).all(-1)
        cell = ((x[inside] + EXTENT) * (CELLS / (2 * EXTENT))).long().clamp(0, CELLS - 1)
        sums = torch.zeros(CELLS * CELLS, dtype=torch.float64)
        sums.index_add_(0, cell[:, 1] * CELLS + cell[:, 0], values[inside, 0].double())
        return (sums.reshape(CELLS, CELLS) / histogram(x, CELLS, EXTENT)).flip(0)

    def place(self, choice: str, x: float, y: float) -> Place:
        """Return the pixel at column x and row y, the point nearest to (x, y), or another.

        Args:
            choice: AT; or UNCERTAIN for where the entropy of the weights is highest.

        Raises:
            ValueError: the picture has no such pixel.
        """
        mixture, recorded = self.mixture, self.recorded
        entropy = mixture.weight_entropy().nan_to_num(-1)
        if recorded.of_points:
            target = torch.tensor([x, y])
            near = (recorded.x - target).square().sum(-1).nan_to_num(math.inf)
            index = int(entropy.argmax() if choice == UNCERTAIN else near.argmin())
            own = GaussianMixture(*(part[index : index + 1] for part in _whole(mixture)))
            px, py = recorded.x[index].tolist()
            return Place(own, px, py, f"point ({px:.2f}, {py:.2f})")
        height, width = recorded.places
        if choice == UNCERTAIN:
            y, x = divmod(int(entropy.argmax()), width)
        column, row = math.floor(x), math.floor(y)
        if not (0 <= column < width and 0 <= row < height):
            raise ValueError(
                f"there is no pixel at x {x:g}, y {y:g} in {width} x {height} pixels of mixtures; "
                f"x goes from 0 to {width - 1}, and y from 0 to {height - 1}"
            )
        own = GaussianMixture(*(part[..., row, column] for part in _whole(mixture)))
        return Place(own, column, row, f"pixel x {column}, y {row}")


@dataclass(frozen=True)
class Sheet:
    """A drawn inspection.

    Args:
        picture: (H, W, 3) in [0, 1].
        maps: boxes of the maps on it: left, top, width, height in pixels.
        area: values of x at the left and the right edge of a map, of y at its top and bottom.
    """

    picture: Tensor
    maps: list[tuple[int, int, int, int]]
    area: tuple[float, float, float, float]


def draw_inspection(
    inspection: Inspection, place: Place, decode: Decode, how: str, tints: bool
) -> tuple[Sheet, Tensor]:
    """Draw the sheet of an inspection.

    Args:
        decode, how: of `decoder_of`.
        tints: the means are colours, red, green and blue in [-1, 1].

    Returns:
        the sheet, and the K means as pictures (K, H, W, 3).
    """
    recorded, mixture = inspection.recorded, inspection.mixture
    count = mixture.num_components
    means = decode_means(inspection, decode)
    shares = mixture.weights.mean([d for d in range(mixture.weights.ndim) if d != 1]).tolist()
    maps = _maps(inspection, place, decode)
    square = (TILE, TILE)
    weights = mixture.weights.flatten()
    charts = [
        ("average weight of each component", bar_chart(shares, [*map(str, range(count))], square)),
        (f"histogram of all {len(weights):,} weights", histogram_chart(weights, BINS, square)),
        (f"the mixture at {place.name}", _plane(place, recorded.of_points, tints)),
        ("its weights and means", _table(place, tints)),
    ]
    title = (
        f"GM Mixture Inspector: {recorded.solver}, step {recorded.step} of {recorded.steps}, "
        f"sigma {recorded.sigma:.3f}, K = {count}"
    )
    layout = layout_of([("", maps)], False, title, TILE)
    top = to_picture(contact_sheet([("", maps)], None, title, TILE))
    middle = to_picture(contact_sheet([("", charts)], None, "", TILE))
    bottom = _means_sheet(means, shares, how)
    height, width = maps[1][1].shape[0] - TILE // SCALE, maps[1][1].shape[1]
    boxes = [(*layout.place(0, column), width, height) for column in range(len(maps))]
    h, w = recorded.places if not recorded.of_points else (0, 0)
    area = (-EXTENT, EXTENT, EXTENT, -EXTENT) if recorded.of_points else (0.0, w, 0.0, h)
    return Sheet(stacked([top, middle, bottom]), boxes[recorded.of_points :], area), means


def decode_means(inspection: Inspection, decode: Decode) -> Tensor:
    """Return the K means as pictures (K, H, W, 3): decoded images, or densities of points."""
    recorded = inspection.recorded
    if recorded.of_points:
        means = recorded.mixture.means.unbind(1)
        return torch.cat([decode(recorded.to_latent(mean)) for mean in means])
    return decode(recorded.to_latent(recorded.mixture.means[inspection.item]))


def describe(inspection: Inspection, place: Place) -> str:
    """Return the figures of an inspection as text."""
    recorded, mixture = inspection.recorded, inspection.mixture
    count = mixture.num_components
    lines = [
        f"step {recorded.step} of {recorded.steps} ({recorded.solver}), sigma {recorded.sigma:.4f}",
        f"{count} component{'s' if count > 1 else ''} of standard deviation "
        f"{mixture.log_std.exp().mean():.4f} on average",
        _range("entropy of the weights (nats)", mixture.weight_entropy())
        + f"; the most is log {count} = {math.log(count):.3f}",
        _range("effective components", mixture.effective_components()),
        _range("spread (standard deviation of the mixture)", mixture.spread()),
    ]
    own = place.mixture
    lines.append(
        f"{place.name}: entropy {float(own.weight_entropy()):.3f} nats, "
        f"{float(own.effective_components()):.2f} effective components, spread "
        f"{float(own.spread()):.4f}"
    )
    for k in _heaviest(own):
        means = ", ".join(f"{m:.3f}" for m in own.means[0, k].tolist())
        lines.append(f"  component {k}: weight {float(own.weights[0, k]):.4f}, mean ({means})")
    return "\n".join(lines)


def _range(name: str, values: Tensor) -> str:
    return f"{name}: mean {values.mean():.3f}, from {values.min():.3f} to {values.max():.3f}"


def _whole(mixture: GaussianMixture) -> tuple[Tensor, Tensor, Tensor]:
    """Return means, log-weights and log-std, the last with an entry for each pixel or point."""
    log_std = mixture.log_std.expand_as(mixture.log_weights[:, :1])
    return mixture.means, mixture.log_weights, log_std


def _heaviest(mixture: GaussianMixture) -> list[int]:
    """Return the components of a pixel, the largest weight first, at most ROWS of them."""
    return mixture.weights.flatten().argsort(descending=True)[:ROWS].tolist()


def _maps(inspection: Inspection, place: Place, decode: Decode) -> list[tuple[str, Tensor]]:
    """Draw the predicted mean, and the maps of entropy, effective components and spread."""
    recorded, mixture = inspection.recorded, inspection.mixture
    x0, item = recorded.mixture.mean(), inspection.item
    mean = decode(recorded.to_latent(x0 if recorded.of_points else x0[item : item + 1]))[0]
    count = mixture.num_components
    spread = inspection.field(mixture.spread())
    most = float(spread[spread.isfinite()].max()) if spread.isfinite().any() else 1.0
    fields = [
        (
            f"entropy of the weights, 0 to {math.log(count):.2f} nats",
            inspection.field(mixture.weight_entropy()),
            (0.0, math.log(count)),
        ),
        (
            f"effective components, 1 to {count}",
            inspection.field(mixture.effective_components()),
            (1.0, float(count)),
        ),
        (f"spread (std), 0 to {most:.3g}", spread, (0.0, most)),
    ]
    drawn = [(name, _marked(heat_map(f, *r, TILE), f, inspection, place)) for name, f, r in fields]
    return [("prediction (mean)", with_scale(mean, TILE, scale=False)), *drawn]


def _marked(picture: Tensor, field: Tensor, inspection: Inspection, place: Place) -> Tensor:
    """Draw a frame around the chosen pixel, or the cell of the chosen point, on a map."""
    height, width = field.shape
    x, y = place.x, place.y
    if inspection.recorded.of_points:
        x = math.floor((x + EXTENT) * CELLS / (2 * EXTENT))
        y = math.floor((EXTENT - y) * CELLS / (2 * EXTENT))
    if not (0 <= x < width and 0 <= y < height):
        return picture
    unit = picture.shape[1] / width
    left, top = max(0, round(x * unit) - 2), max(0, round(y * unit) - 2)
    right, bottom = round((x + 1) * unit) + 2, round((y + 1) * unit) + 2
    inner = picture[top + 2 : bottom - 2, left + 2 : right - 2].clone()
    picture[top:bottom, left:right] = MARK
    picture[top + 2 : bottom - 2, left + 2 : right - 2] = inner
    return picture


def _plane(place: Place, of_points: bool, tints: bool) -> Tensor:
    """Draw the mixture of a place: in its own plane, or in that of its two principal axes."""
    own = place.mixture
    means = own.means[0]
    colours = _tints(means) if tints else None
    weights, std = own.weights.flatten().tolist(), float(own.log_std.exp())
    if of_points:
        return mixture_chart(means, weights, std, TILE, EXTENT, colours)
    if means.shape[1] < 2:
        plane = torch.cat([means, torch.zeros_like(means)], 1)
    else:
        axes = own.principal_axes()[0, :, :2]
        plane = (means - own.mean()) @ axes.to(means)
    return mixture_chart(plane, weights, std, TILE, tints=colours)


def _table(place: Place, tints: bool) -> Tensor:
    """Draw the weights of a place, with the first channels of the means."""
    own = place.mixture
    rows = []
    for k in _heaviest(own):
        mean = own.means[0, k]
        shown = " ".join(f"{m:+.2f}" for m in mean[:3].tolist()) + (" ..." if len(mean) > 3 else "")
        colour = _tints(mean) if tints else None
        rows.append((str(k), float(own.weights[0, k]), colour, shown))
    return weight_table(rows, TILE)


def _tints(means: Tensor) -> Tensor:
    """Return the colours (..., 3) in [0, 1] of means (..., 3 or 1) in [-1, 1]."""
    return ((means + 1) / 2).clamp(0, 1).expand(*means.shape[:-1], 3)


def _means_sheet(means: Tensor, shares: list[float], how: str) -> Tensor:
    """Draw the K means, each with its average weight."""
    columns, tile = (4, TILE) if len(means) <= FEW else (8, TILE // 2)
    cells = [
        (f"{k}: {share:.1%}", picture)
        for k, (picture, share) in enumerate(zip(means, shares, strict=True))
    ]
    rows = [("", cells[i : i + columns]) for i in range(0, len(cells), columns)]
    title = f"The {len(cells)} means ({how}), each with its average weight"
    return to_picture(contact_sheet(rows, None, title, tile))
