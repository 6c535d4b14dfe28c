"""Draw and write the results of training.evaluate: sheets of samples, a table, plots."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from gmflow_core.models.settings import is_number
from gmflow_core.sampling.solvers import SOLVERS
from training.common.plots import figure, finish
from training.common.tables import write_table
from training.evaluation.inception import InceptionFeatures

# fmt: off
METRICS = (
    "frechet_distance", "inception_score", "precision", "recall", "nearest_distance",
    "class_accuracy", "saturation", "saturation_distance",
)
NEWER = ("spatial_frechet_distance",)  # what rows of older versions lack
COLUMNS = (
    "name", "checkpoint", "num_components", "solver", "steps", "substeps", "guidance", "scale",
    "network_calls", "count", *METRICS, *NEWER, "out_of_range", "seconds",
)
# fmt: on
# columns of text, and those of the other ones, of numbers, that are never empty
WORDS = ("name", "checkpoint", "solver", "guidance")
NUMBERS = ("steps", "scale", "network_calls", "frechet_distance", "saturation")
CYCLE = itertools.cycle(("#2a6fb0", "#2f8f5b", "#7d5ba6", "#b0413e", "#d98c1f", "#5f6b73"))
COLOURS = dict(zip(SOLVERS, CYCLE, strict=False))
KINDS = {"probabilistic": "probabilistic", "cfg": "CFG"}


def sheet(
    images: Tensor, labels: Tensor | None, classes: int, rows: int = 6, columns: int = 10
) -> Image.Image:
    """Draw samples side by side; up to 10 classes have a column each.

    Args:
        images: uint8 (n, 3, H, W).
        labels: (n,); None if unknown.
        classes: number of classes.
    """
    if labels is not None and classes <= columns:
        grid = [(labels == label).nonzero().flatten().tolist()[:rows] for label in range(classes)]
    else:
        shown = min(len(images), rows * columns)
        grid = [list(range(column, shown, columns)) for column in range(columns)]
    side = max(images.shape[2:])
    tile = side * max(1, 48 // side) if side < 128 else 128
    size = (len(grid) * (tile + 2) + 2, max(map(len, grid)) * (tile + 2) + 2)
    picture = Image.new("RGB", size, "white")
    how = Image.Resampling.NEAREST if tile >= side else Image.Resampling.BOX
    for column, members in enumerate(grid):
        for row, member in enumerate(members):
            image = Image.fromarray(images[member].permute(1, 2, 0).numpy())
            place = (2 + column * (tile + 2), 2 + row * (tile + 2))
            picture.paste(image.resize((tile, tile), how), place)
    return picture


LARGEST = 1e300  # of a row's numbers; NaN is not below it either


def is_row(row: Any, real_images: bool = False) -> bool:
    """Return whether a value from a file has what tables and plots need of a row.

    Args:
        real_images: it is the row of these, which have no solver; nor have samples that were given.
    """
    words, numbers = WORDS, NUMBERS
    if real_images or (isinstance(row, dict) and row.get("solver") is None):
        words = ("name",) if real_images else ("name", "checkpoint")
        numbers = ("frechet_distance", "saturation")
    if not isinstance(row, dict) or any(row.get(column) is None for column in (*words, *numbers)):
        return False
    return all(
        isinstance(row[column], str)
        if column in WORDS
        else is_number(row[column], -LARGEST, LARGEST)
        for column in COLUMNS
        if row.get(column) is not None
    ) and all(metric in row for metric in METRICS)


def write_csv(report: dict[str, Any], path: Path) -> None:
    """Write the rows as a table; the row of real images, if any, comes first."""
    rows = [*([report["floor"]] if report.get("floor") else []), *report["results"]]
    known = ({name: row[name] for name in COLUMNS if name in row} for row in rows)
    write_table(known, COLUMNS, path)


def write_plots(report: dict[str, Any], out: Path) -> list[Path]:
    """Write the plots that the rows allow: over calls, over guidance, one metric over another.

    Returns:
        Their files.
    """
    rows, plots = [row for row in report["results"] if row.get("solver") is not None], []
    report = {**report, "results": rows}  # samples that were given have no place on an axis

    def has(metric: str) -> bool:
        return any(row[metric] is not None for row in rows)

    if len({row["network_calls"] for row in rows}) > 1:
        plots.append(plot_calls(report, out / "calls.png"))
    if any(row["guidance"] != "none" for row in rows):
        plots.append(plot_guidance(report, out / "guidance.png"))
        if has("precision"):
            plots.append(plot_pair(report, out / "precision.png", "precision", "frechet_distance"))
        if has("class_accuracy") and has("saturation_distance"):
            path = out / "saturation.png"
            plots.append(plot_pair(report, path, "saturation_distance", "class_accuracy"))
    return plots


def metric_title(report: dict[str, Any], metric: str) -> str:
    """Return the title of a metric's axis."""
    if metric == "frechet_distance":
        name = report["features"]["name"]
        return "FID" if name == InceptionFeatures.name else f"Fréchet distance ({name})"
    titles = {
        "saturation_distance": "saturation: total variation distance",
        "saturation": "mean saturation",
    }
    return titles.get(metric, metric.replace("_", " "))


def values_of(rows: list[dict[str, Any]], key: str) -> list[Any]:
    """Return the distinct values of `key`: checkpoints in their order, numbers ascending."""
    found = list(dict.fromkeys(row[key] for row in rows))
    return found if key == "checkpoint" else sorted(found)


def lines(
    rows: list[dict[str, Any]], checkpoint: str, steps: int
) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Yield a line for each solver and kind of guidance: matplotlib's style, and its rows.

    Rows are in ascending order of the scale, the one without guidance first.
    """
    for solver in COLOURS:
        same = [
            r
            for r in rows
            if (r["checkpoint"], r["solver"], r["steps"]) == (checkpoint, solver, steps)
        ]
        for kind, title in KINDS.items():
            guided = sorted((r for r in same if r["guidance"] == kind), key=lambda r: r["scale"])
            if guided:
                solid = kind == "probabilistic"
                style = {
                    "color": COLOURS[solver],
                    "linestyle": "-" if solid else "--",
                    "marker": "o" if solid else "s",
                    "markerfacecolor": COLOURS[solver] if solid else "white",
                    "markersize": 4,
                    "label": f"{SOLVERS[solver].title}, {title}",
                }
                yield style, [r for r in same if r["guidance"] == "none"] + guided


def plot_calls(report: dict[str, Any], path: Path) -> Path:
    """Plot Fréchet distance and class accuracy over network calls; a column per checkpoint.

    Points are without guidance where there is such a row, otherwise of the best guided row.
    """
    rows, floor = report["results"], report.get("floor")
    metrics = ["frechet_distance"]
    if any(r["class_accuracy"] is not None for r in rows):
        metrics.append("class_accuracy")
    checkpoints, ticks = values_of(rows, "checkpoint"), values_of(rows, "network_calls")
    width = 2.6 if len(checkpoints) > 1 else 3.8
    drawing, axes = figure(len(metrics), len(checkpoints), width, 2.8, sharex=True, sharey="row")
    for (r, metric), (c, name) in itertools.product(enumerate(metrics), enumerate(checkpoints)):
        ax = axes[r, c]
        draw_solvers(ax, [row for row in rows if row["checkpoint"] == name], metric)
        if floor and floor[metric] is not None:
            dots = {"color": "black", "linewidth": 1, "linestyle": (0, (1, 2))}
            ax.axhline(floor[metric], **dots, label="real images")
        if 0 in ticks:
            ax.set_xscale("symlog", linthresh=1)  # logarithmic above 1
        else:
            ax.set_xscale("log")
        ax.set_xticks(ticks, [str(n) for n in ticks])
        ax.minorticks_off()
        if r == 0:
            ax.set_title(name, fontsize=9)
        if r == len(metrics) - 1:
            ax.set_xlabel("network calls")
        if c == 0:
            ax.set_ylabel(metric_title(report, metric))
    if min(row["frechet_distance"] for row in [*rows, *([floor] if floor else [])]) > 0:
        set_log_scale(axes[0, 0])
    return finish(drawing, axes, path)


def draw_solvers(ax, rows: list[dict[str, Any]], metric: str) -> None:
    """Draw a metric over network calls, a line for each solver."""
    for solver, colour in COLOURS.items():
        best = best_by_calls([row for row in rows if row["solver"] == solver])
        calls = sorted(n for n in best if best[n][metric] is not None)
        if calls:
            guided = any(best[n]["guidance"] != "none" for n in calls)
            label = f"{SOLVERS[solver].title} (guided)" if guided else SOLVERS[solver].title
            points = [best[n][metric] for n in calls]
            ax.plot(calls, points, label=label, color=colour, marker="o", markersize=4)


def set_log_scale(ax) -> None:
    """Make the vertical axis logarithmic, with plain numbers at its ticks."""
    from matplotlib.ticker import LogFormatter

    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(LogFormatter())
    ax.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False))


def best_by_calls(rows: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Return one row for each number of calls: without guidance, or of least Fréchet distance."""
    ranked = sorted(
        rows, key=lambda row: (row["guidance"] != "none", row["frechet_distance"]), reverse=True
    )
    return {row["network_calls"]: row for row in ranked}


def plot_guidance(report: dict[str, Any], path: Path) -> Path:
    """Plot mean saturation over the scale of each kind of guidance; a row per number of steps."""
    rows, floor = report["results"], report.get("floor")
    steps = values_of(rows, "steps")
    kinds = [kind for kind in KINDS if any(row["guidance"] == kind for row in rows)]
    columns = [(name, kind) for name in values_of(rows, "checkpoint") for kind in kinds]
    drawing, axes = figure(len(steps), len(columns), 2.9, 2.5, sharey=True)
    data = report["saturation"].get("reference", floor and floor["saturation"])
    labels = {
        "probabilistic": "probabilistic guidance w",
        "cfg": "classifier-free guidance scale",
    }
    for (r, n), (c, (name, kind)) in itertools.product(enumerate(steps), enumerate(columns)):
        ax = axes[r, c]
        for style, found in lines(rows, name, n):
            if found[-1]["guidance"] == kind:
                nothing = 0.0 if kind == "probabilistic" else 1.0
                scales = [nothing if row["guidance"] == "none" else row["scale"] for row in found]
                ax.plot(scales, [row["saturation"] for row in found], **style)
        if data is not None:
            ax.axhline(data, color="black", linewidth=1, label="real images")
        ax.set_title(f"{name}, {n} network calls", fontsize=9)
        ax.set_xlabel(labels[kind])
        if c == 0:
            ax.set_ylabel(metric_title(report, "saturation"))
    return finish(drawing, axes, path)


def plot_pair(report: dict[str, Any], path: Path, across: str, up: str) -> Path:
    """Plot one metric over another along the guidance scale; real images are a star.

    There is a panel for each checkpoint and number of steps.
    """
    rows, floor = report["results"], report.get("floor")
    steps, checkpoints = values_of(rows, "steps"), values_of(rows, "checkpoint")
    drawing, axes = figure(len(steps), len(checkpoints), 3.6, 2.9, sharex=True, sharey=True)
    for (r, n), (c, name) in itertools.product(enumerate(steps), enumerate(checkpoints)):
        ax = axes[r, c]
        for style, found in lines(rows, name, n):
            found = [row for row in found if row[across] is not None and row[up] is not None]
            ax.plot([row[across] for row in found], [row[up] for row in found], **style)
            for row in found[-1:]:
                place = (row[across], row[up])
                beside = {"textcoords": "offset points", "fontsize": 7}
                ax.annotate(f"{row['scale']:g}", place, (4, 3), **beside)
        if floor and floor[across] is not None and floor[up] is not None:
            ax.plot(floor[across], floor[up], "k*", markersize=10, label="real images")
        ax.set_title(f"{name}, {n} network calls", fontsize=9)
        if c == 0:
            ax.set_ylabel(metric_title(report, up))
    for ax in axes[-1]:
        ax.set_xlabel(metric_title(report, across))
    return finish(drawing, axes, path)
