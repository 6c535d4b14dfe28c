"""Run seeded cases at the doors: change sound files, use them in a child, judge the end."""

from __future__ import annotations

import functools
import multiprocessing
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from random import Random
from typing import NamedTuple

from gmflow_core.files.errors import printable

from .children import Limits
from .doors.door import Door, copy_folder, names_in
from .verdicts import GOOD, Outcome, Trial, judge

TOGETHER = 8  # cases in one child, which saves time
WARM_UP = Limits(300, 8000)
FAST = Path("/dev") / "shm"  # a file system in memory


class Case(NamedTuple):
    """One finished case."""

    door: str
    number: int
    change: str
    outcome: Outcome

    @property
    def good(self) -> bool:
        """Return whether the project kept its promise."""
        return self.outcome.verdict in GOOD


class Cases:
    """Cases at some doors.

    Args:
        doors: by name; their sound files are written at once.
        seed: every case depends on this seed, its door and its number alone.
    """

    def __init__(self, doors: Iterable[Door], seed: int = 0):
        self.doors, self.seed = {door.name: door for door in doors}, seed
        base = FAST if os.access(FAST, os.W_OK) else None
        self.place = Path(tempfile.mkdtemp(prefix="gmflow-cases-", dir=base))

    def __enter__(self) -> Cases:
        return self

    def __exit__(self, *_: object) -> None:
        remove(self.place)

    def make(self) -> None:
        """Write the sound files, and check that each door takes them.

        Raises:
            RuntimeError: a door does not, so that its cases would show nothing.
        """
        for number, door in enumerate(self.doors.values()):
            folder = self.place / f"sound{number}"
            folder.mkdir()
            with (
                open(os.devnull, "w") as nothing,
                redirect_stdout(nothing),
                redirect_stderr(nothing),
            ):
                door.make(folder)
        for name in self.doors:
            outcome = self.run(name, -1).outcome
            if outcome.verdict != "right":
                raise RuntimeError(f"{name} does not take sound files: {outcome}")

    def run(self, name: str, number: int, keep: Path | None = None, show: bool = False) -> Case:
        """Run one case; number -1 leaves the files as they are.

        Args:
            keep: folder that the changed files are copied to.
            show: print what the child printed.
        """
        (case,) = self._together(name, [number], keep, show)
        return case

    def run_some(self, name: str, numbers: list[int]) -> list[Case]:
        """Run cases of one door, several in each child; one that ends badly is run again alone."""
        done: list[Case] = []
        while len(done) < len(numbers):
            found = self._together(name, numbers[len(done) :])
            if len(found) > 1 and not found[-1].good:
                found[-1] = self.run(name, found[-1].number)
            done += found
        return done

    def _together(
        self, name: str, numbers: list[int], keep: Path | None = None, show: bool = False
    ) -> list[Case]:
        """Run cases of one door in one child, up to the first that ends badly."""
        door, log = self.doors[name], Path(tempfile.mkdtemp(prefix="log", dir=self.place)) / "log"
        scratches = [Path(tempfile.mkdtemp(prefix="case", dir=self.place)) for _ in numbers]
        try:
            made = [
                self._make_case(door, number, scratch)
                for number, scratch in zip(numbers, scratches, strict=True)
            ]
            if keep is not None:
                shutil.copytree(scratches[0], keep, symlinks=True)
            limits = WARM_UP if numbers == [-1] else door.limits
            outcomes = judge([trial for _, trial in made], log, limits)
            if show:
                print(printable(log.read_text(errors="replace"), 20_000))
        finally:
            for folder in (*scratches, log.parent):
                remove(folder)
        return [
            Case(name, number, change, outcome)
            for number, (change, _), outcome in zip(numbers, made, outcomes, strict=False)
        ]

    def _make_case(self, door: Door, number: int, scratch: Path) -> tuple[str, Trial]:
        """Write the changed files of a case, and return the change and what to do with them."""
        rng, folder = Random(f"{self.seed}:{door.name}:{number}"), scratch / "files"
        copy_folder(self.place / f"sound{list(self.doors).index(door.name)}", folder)
        (scratch / "out").mkdir()
        if door.inputs is None:
            change = door.change(folder, rng) if number >= 0 else "nothing"
            names = (*names_in(folder), *door.names)
            return change, Trial(functools.partial(door.use, folder), names, door.command)
        change, value, names = door.inputs(rng) if number >= 0 else ("nothing", None, ())
        return change, Trial(functools.partial(door.use, folder, value), names, door.command)

    def run_all(self, count: int, workers: int) -> list[Case]:
        """Run `count` cases, shared out by the doors' shares, in some worker processes."""
        total = sum(door.share for door in self.doors.values())
        todo = []
        for name, door in self.doors.items():
            numbers = list(range(max(1, round(count * door.share / total))))
            todo += [(name, numbers[i : i + TOGETHER]) for i in range(0, len(numbers), TOGETHER)]
        Random(self.seed).shuffle(todo)
        global _current
        _current = self
        done: list[Case] = []
        with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
            for cases in pool.map(_run, todo):
                done += cases
                if len(done) % 500 < len(cases):
                    bad = sum(not case.good for case in done)
                    print(f"{len(done):,} of {count:,}, {bad} failures", file=sys.stderr)
        return done


_current: Cases | None = None  # what the forked workers work on


def _run(each: tuple[str, list[int]]) -> list[Case]:
    """Run some cases in a worker."""
    return _current.run_some(*each)


def remove(folder: Path) -> None:
    """Remove a case's folder, also what has no permissions."""
    for place, folders, _ in os.walk(folder):
        for name in folders:
            path = Path(place) / name
            mode = path.lstat().st_mode
            if stat.S_ISDIR(mode) and not mode & stat.S_IRWXU:
                path.chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)
