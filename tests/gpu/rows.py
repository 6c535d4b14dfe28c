"""A short subset of the rows of tests.benchmarks, cut off where the time ends."""

from __future__ import annotations

from collections.abc import Iterator

from tests.benchmarks import loops, report, rows
from tests.benchmarks.measure import Bench

from .run import Run, check

ROWS = {
    "rollout": rows.rollout_rows,
    "transport": rows.transport_rows,
    "guided": rows.guided_rows,
    "loss": rows.loss_rows,
    "sampler": loops.sampler_rows,
}
QUICK = ("rollout", "guided")
BUDGET, LONGEST = 2.0, 20.0  # seconds of the turns of a line; a line takes less than the second
ALLOWED = 2e-3  # error of ours in float32


def benchmarks(run: Run) -> Iterator[tuple[str, dict | str]]:
    """Measure rollouts, transport, guided steps, losses and a sampler beside naive forms."""
    bench = Bench(run.device, run.quick, compiled=False, budget=BUDGET)
    yield "limits of the device", bench.rates
    for name in run.size(tuple(ROWS), QUICK):
        lines = ROWS[name](bench)
        while True:
            if run.left() < LONGEST:
                yield name, "not run: no time is left"
                break
            line = next(lines, None)
            if line is None:
                break
            yield of_line(line)


def of_line(line: dict) -> tuple[str, dict]:
    """Return the figures of a line, and check the error of our form.

    Raises:
        WrongError: it is too large.
    """
    case = report.title(line)
    ours = line["forms"]["ours"]
    error = ours.get("error", 0.0)
    check(error <= ALLOWED, f"error of {case}", f"at most {ALLOWED:g}", f"{error:.3g}")
    figures = {}
    for name, about in line["forms"].items():
        if "not_run" in about:
            figures[name] = about["not_run"]
            continue
        kept = ("median", "error", "memory", "over_ours")
        figures[name] = {key: about[key] for key in kept if key in about}
    return case, figures | {"floor": line["floor"]["seconds"]}
