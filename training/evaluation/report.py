"""What training.evaluate shows: sheets of samples, a table, plots."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from gmflow_core.files.atomic import atomic_write
from training.common.plots import figure, finish
from training.evaluation.inception import InceptionFeatures

METRICS = (
    "frechet_distance",
    "inception_score",
    "precision",
    "recall",
    "nearest_distance",
    "class_accuracy",
    "saturation",
    "saturation_distance",
)
COLUMNS = (
    "name",
    "checkpoint",
    "num_components",
    "solver",
    "steps",
    "substeps",
    "guidance",
    "scale",
    "network_calls",
)
COLUMNS += ("count", *METRICS, "out_of_range", "seconds")
COLOURS = {"euler": "#b0413e", "dpmpp-2m": "#d98c1f", "gm-ode": "#2a6fb0", "gm-sde": "#2f8f5b"}
TITLES = {"euler": "Euler", "dpmpp-2m": "DPM-Solver++ 2M", "gm-ode": "GM-ODE", "gm-sde": "GM-SDE"}
KINDS = {"probabilistic": "probabilistic", "cfg": "CFG"}


def sheet(
    images: Tensor, labels: Tensor, classes: int, rows: int = 6, columns: int = 10
) -> Image.Image:
    """Samples side by side; with up to 10 classes, each has its column.

    Args:
        images: uint8 (n, 3, H, W).
        labels: (n,).
    """
    if classes <= columns:
        grid = [(labels == label).nonzero().flatten().tolist()[:rows] for label in range(classes)]
    else:
        grid = [
            list(range(column, min(len(images), rows * columns), columns))
            for column in range(columns)
        ]
    side = max(images.shape[2:])
    tile = side * max(1, 48 // side) if side < 128 else 128
    picture = Image.new(
        "RGB", (len(grid) * (tile + 2) + 2, max(map(len, grid)) * (tile + 2) + 2), "white"
    )
    for column, members in enumerate(grid):
        for row, member in enumerate(members):
            image = Image.fromarray(images[member].permute(1, 2, 0).numpy())
            how = Image.Resampling.NEAREST if tile >= side else Image.Resampling.BOX
            picture.paste(
                image.resize((tile, tile), how), (2 + column * (tile + 2), 2 + row * (tile + 2))
            )
    return picture


def write_csv(report: dict[str, Any], path: Path) -> None:
    """The rows as a table; the real images', if there are any, first."""
    rows = [*([report["floor"]] if report.get("floor") else []), *report["results"]]
    with (
        atomic_write(path) as temporary,
        open(temporary, "w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def write_plots(report: dict[str, Any], out: Path) -> list[Path]:
    """The plots of what there is to plot: over network calls, over guidance, and one figure against another."""
    plots = []
    if len({row["network_calls"] for row in report["results"]}) > 1:
        plots.append(plot_calls(report, out / "calls.png"))
    if any(row["guidance"] != "none" for row in report["results"]):
        plots.append(plot_guidance(report, out / "guidance.png"))
        if any(row["precision"] is not None for row in report["results"]):
            plots.append(plot_pair(report, out / "precision.png", "precision", "frechet_distance"))
        if all(
            any(row[m] is not None for row in report["results"])
            for m in ("class_accuracy", "saturation_distance")
        ):
            plots.append(
                plot_pair(report, out / "saturation.png", "saturation_distance", "class_accuracy")
            )
    return plots


def metric_title(report: dict[str, Any], metric: str) -> str:
    if metric != "frechet_distance":
        return {
            "saturation_distance": "saturation: total variation distance",
            "saturation": "mean saturation",
        }.get(metric, metric.replace("_", " "))
    return (
        "FID"
        if report["features"]["name"] == InceptionFeatures.name
        else f"Fréchet distance ({report['features']['name']})"
    )


def of_rows(rows: list[dict[str, Any]], key: str) -> list[Any]:
    """The values of `key` that occur; checkpoints in their order, numbers rising."""
    found = list(dict.fromkeys(row[key] for row in rows))
    return found if key == "checkpoint" else sorted(found)


def lines(
    rows: list[dict[str, Any]], checkpoint: str, steps: int
) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """(how to draw it, rows by rising scale) for each solver and kind of guidance; each begins at the row without guidance."""
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
                    "label": f"{TITLES[solver]}, {title}",
                }
                yield style, [r for r in same if r["guidance"] == "none"] + guided


def plot_calls(report: dict[str, Any], path: Path) -> Path:
    """Fréchet distance and class accuracy against network calls, a column of panels for each checkpoint; without guidance, or
    with the best where there is none without."""
    from matplotlib.ticker import LogFormatter

    rows, floor = report["results"], report.get("floor")
    metrics = ["frechet_distance"] + ["class_accuracy"] * any(
        r["class_accuracy"] is not None for r in rows
    )
    checkpoints, ticks = of_rows(rows, "checkpoint"), of_rows(rows, "network_calls")
    drawing, axes = figure(
        len(metrics),
        len(checkpoints),
        2.6 if len(checkpoints) > 1 else 3.8,
        2.8,
        sharex=True,
        sharey="row",
    )
    for (r, metric), (c, name) in itertools.product(enumerate(metrics), enumerate(checkpoints)):
        ax = axes[r, c]
        for solver, colour in COLOURS.items():
            best = best_by_calls(
                [row for row in rows if (row["checkpoint"], row["solver"]) == (name, solver)]
            )
            calls = sorted(n for n in best if best[n][metric] is not None)
            if calls:
                label = TITLES[solver] + " (guided)" * any(
                    best[n]["guidance"] != "none" for n in calls
                )
                ax.plot(
                    calls,
                    [best[n][metric] for n in calls],
                    label=label,
                    color=colour,
                    marker="o",
                    markersize=4,
                )
        if floor and floor[metric] is not None:
            ax.axhline(
                floor[metric],
                color="black",
                linewidth=1,
                linestyle=(0, (1, 2)),
                label="real images",
            )
        if 0 in ticks:
            ax.set_xscale("symlog", linthresh=1)  # logarithmic from 1 on
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
    if (
        min([r["frechet_distance"] for r in rows] + ([floor["frechet_distance"]] if floor else []))
        > 0
    ):
        axes[0, 0].set_yscale("log")
        axes[0, 0].yaxis.set_major_formatter(LogFormatter())
        axes[0, 0].yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False))
    return finish(drawing, axes, path)


def best_by_calls(rows: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The row of each number of network calls: that without guidance, or that of the least Fréchet distance."""
    ranked = sorted(
        rows, key=lambda row: (row["guidance"] != "none", row["frechet_distance"]), reverse=True
    )
    return {row["network_calls"]: row for row in ranked}


def plot_guidance(report: dict[str, Any], path: Path) -> Path:
    """Mean saturation against the weight of probabilistic guidance and the scale of classifier-free guidance; a row of panels
    for each number of steps."""
    rows, floor = report["results"], report.get("floor")
    steps = of_rows(rows, "steps")
    kinds = [kind for kind in KINDS if any(row["guidance"] == kind for row in rows)]
    columns = [(name, kind) for name in of_rows(rows, "checkpoint") for kind in kinds]
    drawing, axes = figure(len(steps), len(columns), 2.9, 2.5, sharey=True)
    data = report["saturation"].get("reference", floor and floor["saturation"])
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
        ax.set_xlabel(
            "probabilistic guidance w"
            if kind == "probabilistic"
            else "classifier-free guidance scale"
        )
        if c == 0:
            ax.set_ylabel(metric_title(report, "saturation"))
    return finish(drawing, axes, path)


def plot_pair(report: dict[str, Any], path: Path, across: str, up: str) -> Path:
    """One metric against another, along rising guidance, the real images' as a star; a panel for each checkpoint and number of
    steps."""
    rows, floor = report["results"], report.get("floor")
    steps, checkpoints = of_rows(rows, "steps"), of_rows(rows, "checkpoint")
    drawing, axes = figure(len(steps), len(checkpoints), 3.6, 2.9, sharex=True, sharey=True)
    for (r, n), (c, name) in itertools.product(enumerate(steps), enumerate(checkpoints)):
        ax = axes[r, c]
        for style, found in lines(rows, name, n):
            found = [row for row in found if row[across] is not None and row[up] is not None]
            ax.plot([row[across] for row in found], [row[up] for row in found], **style)
            for row in found[-1:]:
                ax.annotate(
                    f"{row['scale']:g}",
                    (row[across], row[up]),
                    (4, 3),
                    textcoords="offset points",
                    fontsize=7,
                )
        if floor and floor[across] is not None and floor[up] is not None:
            ax.plot(floor[across], floor[up], "k*", markersize=10, label="real images")
        ax.set_title(f"{name}, {n} network calls", fontsize=9)
        if c == 0:
            ax.set_ylabel(metric_title(report, up))
    for ax in axes[-1]:
        ax.set_xlabel(metric_title(report, across))
    return finish(drawing, axes, path)
