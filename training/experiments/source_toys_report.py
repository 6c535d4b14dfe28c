"""Measure the runs of `source_toys`, and write their tables and pictures."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from gmflow_core.files.atomic import atomic_write
from gmflow_core.files.json_files import write_json
from gmflow_core.pictures import contact_sheet
from gmflow_core.toys.checkerboard import on_board
from gmflow_core.toys.density_picture import density_picture
from training.common.tables import write_table
from training.experiments.source_toys import (
    CORNERS,
    DIRECTIONS,
    MODES,
    RING_STD,
    SCALE,
    SOURCES,
    TABLE,
    Config,
    Run,
    draw_data,
    sample,
    sliced_wasserstein,
)
from training.experiments.source_toys_networks import (
    FIT_SAMPLES,
    FIT_TOLERANCE,
    network_of,
    source_of,
)

SOURCE_CALLS, CORNER_CALLS = (1, 2, 4, 8, 16), (1, 2, 4, 8)
CORNER_ROWS = [(run, solver) for run in CORNERS for solver in run.solvers]
SOLVER_TITLES = {"": "0 calls", "euler": "Euler", "gm-ode": "GM-ODE 2", "gm-sde": "GM-SDE 2"}
CASE = ("data", "source", "modes", "coupling", "output", "solver", "calls")
COLUMNS = (*CASE, "sliced_w1", "smallest", "largest", "off_board")
Case = tuple[Run, str, int]  # run, solver, calls
Line = dict[str, Any]  # a line of the table


@dataclasses.dataclass(frozen=True)
class Results:
    """Results of all runs.

    Attributes:
        lines: of the table.
        floor: for each toy, the distance of two draws of the data, by seed.
        points: samples (n, 2) of the first seed.
    """

    lines: list[Line]
    floor: dict[str, list[float]]
    points: dict[Case, Tensor]


def write(config: Config) -> list[Line]:
    """Run everything, and write the tables and pictures to OUT.

    Returns:
        The lines of the table.
    """
    results = measure(config)
    path, lines = config.out / "source_toys", results.lines
    rounded = (
        {k: f"{v:.4f}" if isinstance(v, float) else v for k, v in line.items()} for line in lines
    )
    write_table(rounded, COLUMNS, path.with_suffix(".csv"))
    settings = {
        name: value
        for name, value in dataclasses.asdict(config).items()
        if name not in ("out", "restart")
    }
    settings |= {
        "directions": DIRECTIONS,
        "modes": MODES,
        "fit_samples": FIT_SAMPLES,
        "fit_tolerance": FIT_TOLERANCE,
    }
    record = {"settings": settings, "data_against_data": results.floor, "lines": lines}
    write_json(path.with_suffix(".json"), record)
    text = markdown(lines)
    with atomic_write(path.with_suffix(".md")) as temporary:
        temporary.write_text(text, encoding="utf-8")
    names = {"gaussian": "", "independent": ",\nany mode", "mode": ",\nown mode"}
    rows = [(run.title + names[run.noise], run, "euler") for run in TABLE]
    save(draw_sheet(rows, (0, *SOURCE_CALLS), results, config), path.with_suffix(".png"))
    rows = [
        (f"{SOURCES[run.noise]}\nto {run.about()['output']},\n{SOLVER_TITLES[solver]}", run, solver)
        for run, solver in CORNER_ROWS
    ]
    corners = config.out / "source_toys_corners.png"
    save(draw_sheet(rows, (0, *CORNER_CALLS), results, config), corners)
    print(text)
    for toy, distances in results.floor.items():
        print(f"{toy}: the data against itself {statistics.mean(distances):.3f}")
    print(f"figures and pictures: {path}.*")
    return lines


def save(picture: Image.Image, path: Path) -> None:
    """Write a picture as PNG."""
    with atomic_write(path) as temporary:
        picture.save(temporary, format="png")


def cases(run: Run, calls: tuple[int, ...]) -> Iterator[tuple[str, int]]:
    """Yield (solver, calls) of a run, the source itself first."""
    yield "", 0
    yield from itertools.product(run.solvers, calls)


def measure(config: Config) -> Results:
    """Train or load all networks, sample them, and measure the samples."""
    calls = {run: SOURCE_CALLS for run in TABLE}
    calls |= {run: CORNER_CALLS for run in CORNERS if run not in TABLE}
    figures: dict[Case, list[tuple[float, float]]] = {}
    points, floor = {}, {}
    bar = tqdm(total=config.seeds * len(calls), desc="networks", dynamic_ncols=True)
    for seed in range(config.seeds):
        sources = {
            (toy, modes): source_of(toy, modes, seed, config)
            for toy, sizes in MODES.items()
            for modes in sizes
        }
        generator = torch.Generator().manual_seed(3000 + seed)
        data = {toy: draw_data(toy, config.samples, generator) for toy in MODES}
        for toy in MODES:
            other = draw_data(toy, config.samples, generator)
            floor.setdefault(toy, []).append(sliced_wasserstein(other, data[toy]))
        for run in calls:
            source = sources.get((run.toy, run.modes))
            network = network_of(run, seed, config, source)
            for solver, n in cases(run, calls[run]):
                x = sample(network, run, source, config.samples, solver, n, 4000 + seed)
                off = 1 - on_board(x * SCALE, slack=0.05).double().mean().item()
                found = (sliced_wasserstein(x, data[run.toy]), off)
                figures.setdefault((run, solver, n), []).append(found)
                points.setdefault((run, solver, n), x)
            bar.update()
    bar.close()
    lines = [line_of(case, values) for case, values in figures.items()]
    return Results(lines, floor, points)


def line_of(case: Case, values: list[tuple[float, float]]) -> Line:
    """Return the line of a case from (distance, share off the board) of each seed."""
    run, solver, calls = case
    distances, off = zip(*values, strict=True)
    line = run.about() | {
        "solver": solver,
        "calls": calls,
        "sliced_w1": statistics.mean(distances),
        "smallest": min(distances),
        "largest": max(distances),
    }
    return line | ({"off_board": statistics.mean(off)} if run.toy == "checkerboard" else {})


def markdown(lines: list[Line]) -> str:
    """Return the two tables as Markdown."""
    sources = [
        (f"{run.toy}, {run.title}, {run.about()['coupling']}", run, "euler") for run in TABLE
    ]
    corners = []
    for run, solver in CORNER_ROWS:
        about = run.about()
        name = f"{about['source']} to {about['output']}, {SOLVER_TITLES[solver]}"
        corners.append((name, run, solver))
    first = markdown_table("data, source, coupling", (0, *SOURCE_CALLS), sources, lines)
    title = "source to output, solver (off the board)"
    return first + "\n" + markdown_table(title, (0, *CORNER_CALLS), corners, lines, shares=True)


def markdown_table(
    title: str,
    calls: tuple[int, ...],
    rows: list[tuple[str, Run, str]],
    lines: list[Line],
    shares: bool = False,
) -> str:
    """Return a Markdown table of distances, a column for each number of calls.

    Args:
        title: of the first column.
        rows: (name, run, solver) of each row.
        shares: add the share of points off the board.
    """
    text = ["| " + " | ".join([title, *map(str, calls)]) + " |", "|" + "---|" * (1 + len(calls))]
    for name, run, solver in rows:
        about = run.about()
        by_calls = {
            line["calls"]: line
            for line in lines
            if about.items() <= line.items() and line["solver"] in ("", solver)
        }
        cells = []
        for n in calls:
            share = f" ({by_calls[n]['off_board']:.1%})" if shares else ""
            cells.append(f"{by_calls[n]['sliced_w1']:.3f}{share}")
        text.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(text) + "\n"


def draw_sheet(
    rows: list[tuple[str, Run, str]], calls: tuple[int, ...], results: Results, config: Config
) -> Image.Image:
    """Draw samples of the first seed; the captions give the distance, averaged over the seeds.

    Args:
        rows: (caption, run, solver) of each row.
        calls: a column each; 0 is the source itself.
    """
    seeds = f"mean over {config.seeds} seed{'s' * (config.seeds > 1)}"
    title = (
        "W1: sliced Wasserstein distance to the data,\n"
        f"{config.samples:,} points, {seeds}. Lower is better."
    )
    w1 = {tuple(line[name] for name in CASE): line["sliced_w1"] for line in results.lines}
    data = draw_data("checkerboard", config.samples, torch.Generator().manual_seed(5000))
    content = []
    for caption, run, solver in rows:
        cells = []
        for n in calls:
            used = solver if n else ""
            name = f"{n} call{'s' * (n > 1)}" if n else "the source"
            distance = w1[(*run.about().values(), used, n)]
            picture = picture_of(results.points[run, used, n], run.toy)
            cells.append((f"{name}   W1 {distance:.3f}", picture))
        content.append((caption, cells))
    return contact_sheet(content, ("data", picture_of(data, "checkerboard")), title, tile=192)


def picture_of(x: Tensor, toy: str) -> Tensor:
    """Draw the density of points (n, 2)."""
    peak = None if toy == "checkerboard" else 0.4 / (16 * math.pi * (RING_STD * SCALE) ** 2)
    return density_picture(x * SCALE, size=256, bins=64, peak=peak)
