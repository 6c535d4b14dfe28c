"""Sample the same noise with several samplers and numbers of steps, and lay the results out."""

from __future__ import annotations

import re
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import comfy.samplers
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...gmflow_core.files.errors import quoted
from ...gmflow_core.pictures import contact_sheet, reduced, to_picture
from ...gmflow_core.sampling.solvers import SOLVERS
from .adapter_info import final_step_size_for
from .cells import Progress, Subject
from .gm_sampler import gm_sampler
from .plain_model import sampling_of
from .previews import batch_grid
from .sample_pictures import Decode
from .sizes import check_size
from .time_shift import own_sigmas

KEY = "gmflow_calls"  # of the wrapper that counts network calls
MOST_SAMPLERS, MOST_STEP_COUNTS, MOST_CALLS = 16, 12, 10_000
WIDEST = 10  # letters in a line of a row's name


@dataclass(frozen=True)
class Row:
    """One sampler of a comparison.

    Args:
        final_step_size: of its time grid, see `own_sigmas`.
        ours: a solver of this extension.
    """

    name: str
    sampler: comfy.samplers.Sampler
    final_step_size: float = 1.0
    ours: bool = False


@dataclass(frozen=True)
class Cell:
    """One result: a picture (H, W, 3), the network calls, and the seconds that it took."""

    row: str
    steps: int
    picture: Tensor
    calls: int
    seconds: float


def rows_of(names: str, samplers: Sequence[tuple[str, object]], model, shift: float) -> list[Row]:
    """Return the samplers of a comparison.

    Args:
        names: of this extension's solvers and of ComfyUI's samplers, on lines or between commas.
        samplers: further ones, with their names.
        model: the MODEL that is sampled.
        shift: time shift of the sigmas.

    Raises:
        ValueError: a name is unknown; or there is none, or too many.
    """
    rows = []
    for name in filter(None, re.split(r"[,;\s]+", names)):
        if name in SOLVERS:
            sampler, size = gm_sampler(name, shift, quiet=True), final_step_size_for(model, name)
            rows.append(Row(name, sampler, size, ours=True))
        elif name in comfy.samplers.SAMPLER_NAMES:
            rows.append(Row(name, comfy.samplers.sampler_object(name)))
        else:
            raise ValueError(
                f"there is no sampler {quoted(name)}; this extension has {', '.join(SOLVERS)}, and "
                f"ComfyUI {', '.join(comfy.samplers.SAMPLER_NAMES)}"
            )
    rows += [Row(name, sampler) for name, sampler in samplers]
    if not 1 <= len(rows) <= MOST_SAMPLERS:
        raise ValueError(
            f"{len(rows)} samplers cannot be compared on one sheet; name 1 to {MOST_SAMPLERS}"
        )
    return rows


def step_counts(text: str) -> list[int]:
    """Return the numbers in a list such as "1, 2, 4, 8".

    Raises:
        ValueError: the text is no such list, or is too long.
    """
    items = [item for item in re.split(r"[,;\s]+", text) if item]
    wrong = [item for item in items if not re.fullmatch(r"[0-9]{1,4}", item) or int(item) < 1]
    if wrong or not 1 <= len(items) <= MOST_STEP_COUNTS:
        found = f"{quoted(wrong[0])} in steps is no number" if wrong else f"{len(items)} numbers"
        raise ValueError(
            f"{found}: give 1 to {MOST_STEP_COUNTS} numbers from 1 to 9999, such as 1, 2, 4, 8"
        )
    return [int(item) for item in items]


def compare(
    subject: Subject, rows: list[Row], counts: list[int], shift: float, seed: int, decode: Decode
) -> list[Cell]:
    """Sample once with every sampler and number of steps, all from the same noise.

    The seconds are those of the sampling alone, without the VAE. Before that each solver of this
    extension has run once, with the fewest steps, so that the model is loaded and no start-up is
    measured.

    Raises:
        ValueError: there are more network calls than MOST_CALLS.
    """
    calls = sum(counts) * len(rows)
    if calls > MOST_CALLS:
        raise ValueError(
            f"too many network calls, {calls:,}, for {len(rows)} samplers with {counts} steps; the "
            f"most is {MOST_CALLS:,}: choose fewer"
        )
    model, counted, sampling = subject.model.clone(), [0], sampling_of(subject.model)

    def counting(executor, *args, **kwargs):
        counted[0] += 1
        return executor(*args, **kwargs)

    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, counting)
    subject, fewest = replace(subject, model=model), min(counts)
    warm = [row for row in rows if row.ours] or rows[:1]
    progress = Progress(calls + fewest * len(warm))
    for row in warm:
        sigmas = own_sigmas(sampling, fewest, shift, final_step_size=row.final_step_size)
        subject.sample(row.sampler, sigmas, seed, progress)
    cells = []
    for row in rows:
        for steps in counts:
            sigmas = own_sigmas(sampling, steps, shift, final_step_size=row.final_step_size)
            counted[0], start = 0, time.perf_counter()
            samples = subject.sample(row.sampler, sigmas, seed, progress)
            seconds = time.perf_counter() - start
            pictures = decode(samples)
            picture = batch_grid(pictures.movedim(-1, 1))
            cells.append(Cell(row.name, steps, reduced(picture, 1024), counted[0], seconds))
    return cells


def comparison_sheet(cells: list[Cell], title: str, size: int) -> Tensor:
    """Draw the cells of a comparison, (H, W, 3) in [0, 1]: samplers down, steps across.

    Args:
        size: pixels from side to side of each picture.

    Raises:
        ValueError: the sheet would be too large.
    """
    names = list(dict.fromkeys(cell.row for cell in cells))
    check_size("pictures", len(cells), (2 * size, size, 3), "choose a smaller size")
    rows = []
    for name in names:
        row = [(_caption(cell), cell.picture) for cell in cells if cell.row == name]
        rows.append((_row_name(name), row))
    return to_picture(contact_sheet(rows, None, title, size))


def comparison_table(cells: list[Cell]) -> str:
    """Return the cells' figures as a table in Markdown."""
    lines = ["| sampler | steps | network calls | seconds |", "|---|---|---|---|"]
    lines += [f"| {c.row} | {c.steps} | {c.calls} | {c.seconds:.3g} |" for c in cells]
    return "\n".join(lines)


def _caption(cell: Cell) -> str:
    calls = "" if cell.calls == cell.steps else f", {cell.calls} calls"
    return f"{cell.steps} step{'s' * (cell.steps > 1)}{calls}   {cell.seconds:.3g} s"


def _row_name(name: str) -> str:
    title = SOLVERS[name].title if name in SOLVERS else name.replace("_", " ")
    return textwrap.fill(title, WIDEST)
