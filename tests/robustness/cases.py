"""Run seeded cases at the doors: change sound files, use them in a child, judge the end."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from random import Random
from typing import NamedTuple

from gmflow_core.files.errors import printable

from .children import Limits
from .doors.door import Door, copy_folder, names_in
from .verdicts import GOOD, Outcome, judge

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
        door, rng = self.doors[name], Random(f"{self.seed}:{name}:{number}")
        scratch = Path(tempfile.mkdtemp(prefix="case", dir=self.place))
        folder = scratch / "files"
        copy_folder(self.place / f"sound{list(self.doors).index(name)}", folder)
        (scratch / "out").mkdir()
        try:
            if door.inputs is None:
                change = door.change(folder, rng) if number >= 0 else "nothing"
                names = [*names_in(folder), *door.names]
                given: tuple = (folder,)
            else:
                change, value, names = door.inputs(rng) if number >= 0 else ("nothing", None, ())
                given = (folder, value)
            if keep is not None:
                shutil.copytree(scratch, keep, symlinks=True)
            limits = door.limits if number >= 0 else WARM_UP
            log = scratch / "log"
            outcome = judge(lambda: door.use(*given), names, log, limits, door.command)
            if show:
                print(printable(log.read_text(errors="replace"), 20_000))
        finally:
            remove(scratch)
        return Case(name, number, change, outcome)

    def run_all(self, count: int, workers: int, until: float | None = None) -> list[Case]:
        """Run `count` cases, shared out by the doors' shares, in some worker processes.

        Args:
            until: time.monotonic() after which no further case begins.
        """
        total = sum(door.share for door in self.doors.values())
        todo = [
            (name, number)
            for name, door in self.doors.items()
            for number in range(max(1, round(count * door.share / total)))
        ]
        Random(self.seed).shuffle(todo)
        if workers == 0:
            return [self.run(*each) for each in todo if until is None or time.monotonic() < until]
        context = multiprocessing.get_context("fork")
        global _current
        _current = self
        with ProcessPoolExecutor(workers, context) as pool:
            done = []
            for case in pool.map(_run, todo, chunksize=8):
                done.append(case)
                if len(done) % 500 == 0:
                    bad = sum(not case.good for case in done)
                    print(f"{len(done):,} of {len(todo):,}, {bad} failures", file=sys.stderr)
            return done


_current: Cases | None = None  # what the forked workers work on


def _run(each: tuple[str, int]) -> Case:
    """Run one case in a worker."""
    return _current.run(*each)


def remove(folder: Path) -> None:
    """Remove a case's folder, also what has no permissions."""
    for place, folders, _ in os.walk(folder):
        for name in folders:
            path = Path(place) / name
            mode = path.lstat().st_mode
            if stat.S_ISDIR(mode) and not mode & stat.S_IRWXU:
                path.chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)
