"""Measure time, memory and error of functions that compute the same, and the machine's limits."""

from __future__ import annotations

import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # do not log the profiler's start and stop
REPOSITORY = Path(__file__).resolve().parents[2]
SHORTEST = 0.005  # seconds of a reading; a quick function is called several times for one reading


def wait(device: str) -> None:
    """Wait until the device has finished all its work."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(function: Callable, device: str, count: int = 1) -> float:
    """Return the seconds of one of `count` calls in a row; on a GPU by events of its own clock."""
    wait(device)
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            function()
        end.record()
        wait(device)
        return start.elapsed_time(end) / 1000 / count
    start = time.perf_counter()
    for _ in range(count):
        function()
    return (time.perf_counter() - start) / count


def take_turns(
    functions: dict[str, Callable], device: str, budget: float, least: int = 5, most: int = 30
) -> dict[str, list[float]]:
    """Return the seconds of every function in every repeat.

    The functions take turns, every other time in reverse, so that other load on the machine meets
    all of them. As many repeats as fit into `budget` seconds, between `least` and `most`.
    """
    counts, total = {}, 0.0
    for name, function in functions.items():
        for _ in range(3):  # the first calls compile
            once = seconds(function, device)
        counts[name] = max(1, math.ceil(SHORTEST / max(once, 1e-9)))
        total += counts[name] * once
    found: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(min(most, max(least, int(budget / total)))):
        for name in list(functions)[:: 1 if repeat % 2 == 0 else -1]:
            found[name].append(seconds(functions[name], device, counts[name]))
    return found


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the lower quartile, the median and the upper quartile."""
    if len(values) == 1:
        return (values[0],) * 3
    return tuple(statistics.quantiles(values, n=4, method="inclusive"))


def ratios(slow: Sequence[float], fast: Sequence[float]) -> tuple[float, float, float]:
    """Return the quartiles of slow / fast over paired repeats: above 1 where `fast` is faster."""
    return quartiles([a / b for a, b in zip(slow, fast, strict=True)])


def extra_memory(function: Callable, device: str) -> int:
    """Return the bytes that a call holds at its peak beyond those held before, with its result.

    Measured by the profiler's record of allocations on a CPU, and by the allocator's statistics on
    a GPU.
    """
    function()
    if device == "cuda":
        wait(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = function()
        wait(device)
        del result
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    events = [
        event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def relative_error(x: Tensor, exact: Tensor) -> float:
    """Return the largest error relative to the largest exact value."""
    return ((x.double() - exact).abs().max() / exact.abs().max()).item()


def products_of(function: Callable) -> int:
    """Return the floating-point operations of the matrix products in a call."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def floor(rates: dict[str, float], bytes_moved: float, flops: float) -> dict:
    """Return the least time at these rates, and whether memory or arithmetic sets it.

    Args:
        rates: see `measure_rates`.
        bytes_moved: bytes read and written.
        flops: floating-point operations.
    """
    times = {
        "memory": bytes_moved / rates["bytes_per_second"],
        "arithmetic": flops / rates["flops_per_second"],
    }
    bound = max(times, key=times.get)
    return {"seconds": times[bound], "bound": bound, "bytes": bytes_moved, "flops": flops}


def measure_rates(device: str, quick: bool = False) -> dict[str, float]:
    """Measure the device's limits.

    Returns:
        bytes_per_second (the faster of a copy and a sum of a large tensor), flops_per_second of a
        float32 matrix product, and seconds_of_a_call of the smallest operation.
    """
    count, side = {"cpu": (2**26, 1024), "cuda": (2**29, 8192)}[device]
    count, side = (count // 16, side // 4) if quick else (count, side)
    source, target = torch.ones(2, count, device=device)
    a, b, out = torch.randn(3, side, side, device=device)
    one = torch.ones(1, device=device)

    def best(function: Callable, calls: int = 1) -> float:
        seconds(function, device)
        return min(seconds(function, device, calls) for _ in range(5))

    moved = max(8 * count / best(lambda: target.copy_(source)), 4 * count / best(source.sum))
    product = best(lambda: torch.mm(a, b, out=out))
    return {
        "bytes_per_second": moved,
        "flops_per_second": 2 * side**3 / product,
        "seconds_of_a_call": best(lambda: one.add_(1), 1000),
    }


def machine(device: str) -> dict:
    """Return the facts about the machine that figures are published with."""
    about = {
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "cores": os.cpu_count(),
    }
    about |= {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    return about | {"date": datetime.now(timezone.utc).strftime("%Y-%m-%d"), "revision": revision()}


def processor() -> str:
    """Return the CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def revision() -> str | None:
    """Return the commit that is checked out, with "+" if files differ; None outside of git."""
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=REPOSITORY, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


class Bench:
    """One device, its limits, and the sizes and repeats of a run.

    Args:
        device: "cpu" or "cuda".
        quick: use tiny sizes and few repeats, to see that everything runs.
        compiled: also measure the forms that torch.compile makes.
        budget: seconds of the turns that the forms of a line take.
    """

    def __init__(
        self, device: str, quick: bool = False, compiled: bool = True, budget: float = 8.0
    ):
        self.device, self.quick, self.compiled, self.budget = device, quick, compiled, budget
        self.rates = measure_rates(device, quick)
        # method of a rollout -> why it does not run here; the log says it only once
        self.problems: dict[str, str] = {}

    def size(self, usual: tuple, quick: tuple) -> tuple:
        """Return the size for this run."""
        return quick if self.quick else usual

    def compare(
        self,
        row: str,
        case: str,
        forms: dict[str, Callable | str],
        *,
        work: tuple[float, float],
        unit: tuple[str, float] = ("", 0),
        exact: Callable[[], Tensor] | None = None,
        results: dict[str, Callable[[], Tensor]] | None = None,
        reference: str = "naive",
        gradient: bool = False,
    ) -> dict:
        """Measure forms of one computation, and return a line of the table.

        Args:
            row, case: what is computed, and on which size.
            forms: functions to compare, by name, "ours" among them; a text in place of a function
                says why it is not run.
            work: bytes that have to be read and written, and floating-point operations.
            unit: name and bytes of the unit for the extra memory.
            exact: computes the result in float64.
            results: functions for the error, by name, where a form's own result does not serve.
            reference: name of the form that all are compared with.
            gradient: run with gradients instead of in inference mode.
        """
        line = {
            "row": row,
            "case": case,
            "device": self.device,
            "reference": reference,
            "unit": unit[0],
            "forms": {},
        }
        line["floor"] = floor(self.rates, *work)
        ready = {name: form for name, form in forms.items() if callable(form)}
        with torch.inference_mode(not gradient):
            errors = {}
            if exact is not None:
                expected, results = exact(), {**ready, **(results or {})}
                errors = {name: relative_error(results[name](), expected) for name in ready}
            limits = {"budget": 0.2, "least": 2} if self.quick else {"budget": self.budget}
            times = take_turns(ready, self.device, **limits)
            for name, form in forms.items():
                if not callable(form):
                    line["forms"][name] = {"not_run": form}
                    continue
                about = {"seconds": times[name], "median": quartiles(times[name])[1]}
                if reference in times:
                    about["ratio"] = ratios(times[reference], times[name])
                about["over_ours"] = ratios(times[name], times["ours"])
                if unit[1]:
                    about["memory"] = extra_memory(form, self.device) / unit[1]
                if name in errors:
                    about["error"] = errors[name]
                line["forms"][name] = about
        return line
