"""Run jobs in one working folder: inputs, a trial's folder, the result of an undisturbed run."""

from __future__ import annotations

import importlib
import json
import platform
import random
import signal
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from . import forks
from .contents import content_of, differences, emptied
from .jobs import Job


class Place:
    """A working folder for one job after the other.

    The trial's folder has the same path in all trials, as paths are part of some results.

    Attributes:
        trial: where the job works.
        expected: content of the trial's folder after an undisturbed run.
        seconds, steps: length of that run, in seconds and in changes to files.
    """

    def __init__(self, folder: Path):
        self.folder, self.trial, self.inputs = folder, folder / "trial", folder / "inputs"
        self.modules = folder / "modules.txt"

    def take(self, job: Job) -> None:
        """Write the job's inputs, and run it twice undisturbed.

        Raises:
            RuntimeError: the job fails, or the runs differ.
        """
        self.job, self.function = job, job.main()
        inputs = self.inputs / job.name
        if not inputs.exists():
            end = forks.run(lambda _: job.inputs(inputs), [], folder=inputs)
            if end.status:
                raise RuntimeError(f"{job.name}: no inputs\n{end.text}")
        runs = [self._undisturbed(self._and_note_modules), self._undisturbed(self.function)]
        self.expected = runs[0][1]
        if found := differences(runs[1][1], self.expected):
            raise RuntimeError(f"{job.name}: two runs differ: {'; '.join(found)}")
        end = runs[1][0]  # the first one imports what is imported late
        self.seconds, self.steps = end.seconds, end.steps

    def _undisturbed(self, function: Callable) -> tuple[forks.End, dict[str, Any]]:
        self.begin()
        arguments = self.job.arguments(self.inputs, self.trial)
        end = forks.run(function, arguments, folder=self.trial)
        if end.status != 0:
            raise RuntimeError(f"{self.job.name} ended with {end.status}\n{end.text[-3000:]}")
        if self.modules.exists():
            for name in self.modules.read_text().split():
                with suppress(Exception):
                    importlib.import_module(name)
            self.modules.unlink()
        return end, content_of(self.trial)

    def _and_note_modules(self, arguments: list[str]) -> None:
        """Run the job, and write the names of modules that it imports late, in their order.

        The parent imports them, so that later runs spend their time on work.
        """
        before = set(sys.modules)
        self.function(arguments)
        names = [n for n in sys.modules if n not in before and not n.startswith("torch._inductor")]
        self.modules.write_text("\n".join(names))

    def begin(self) -> None:
        """Empty the trial's folder, and copy what the job changes into it."""
        emptied(self.trial)
        self.job.begin(self.inputs / self.job.name, self.trial)

    def start(self, **options: Any) -> forks.Child:
        """Start the job; the options are those of `Child`."""
        arguments = self.job.arguments(self.inputs, self.trial)
        return forks.Child(self.function, arguments, self.trial, **options)

    def result(self) -> list[str]:
        """Say how the trial's folder differs from that of an undisturbed run."""
        try:
            return differences(content_of(self.trial), self.expected)
        except ValueError as error:
            return [str(error)]


@contextmanager
def new_place() -> Iterator[Place]:
    """Yield a working folder of its own, and delete it at the end."""
    torch.set_num_threads(1)  # a child cannot use the threads of its parent
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that disks are unmounted
    with tempfile.TemporaryDirectory(prefix="gmflow_robustness_") as folder:
        yield Place(Path(folder).resolve())


def rng_of(seed: int, *names: object) -> random.Random:
    """Return a random generator of this seed for a part of a run."""
    return random.Random(f"{seed} {names}")


def print_table(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows with the same keys as a table."""
    if not rows:
        return
    heads = list(rows[0])
    cells = [heads, *([str(row[head]) for head in heads] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(heads))]
    print(f"\n{title}")
    for line in cells:
        print("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip())


def write_results(arguments: Namespace, name: str, **content: Any) -> None:
    """Write results as JSON to --out, if it was given."""
    if arguments.out is None:
        return
    words = " ".join(sys.argv[1:]).replace(f"--out {arguments.out}", "").split()
    about = {
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python -m tests.robustness", *words]),
        "seed": arguments.seed,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**about, **content}, indent=1, ensure_ascii=False)
    (out / f"robustness_{name}.json").write_text(text + "\n", encoding="utf-8")


def finish(failures: list[str]) -> int:
    """Print the failures, and return the exit status."""
    for text in failures:
        print(f"FAILED {text}")
    return int(bool(failures))
