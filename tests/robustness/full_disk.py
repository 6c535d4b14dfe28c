"""Run commands and savers on disks that are too small, or that may not be written.

    python -m tests.robustness --disk-full
    python -m tests.robustness --read-only

Each job runs on disks of several sizes, so that the failure hits different writes. It must end with
exit status 1 and one line that begins with "error:" and holds the path, the need and what stays.
What lies there under final names is whole, and after room is made the same command finishes with
the result of an undisturbed run. Then the disk is filled to its last byte, and the command started
again: its result stays intact.
"""

from __future__ import annotations

import random
import re
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext

from . import forks
from .contents import broken, leftovers
from .disks import Disk, can_mount, mounted, without_permission
from .jobs import Job, chosen
from .place import Place, finish, new_place, print_table, rng_of, write_results

SHARES = (0.0, 0.05, 0.2, 0.4, 0.6, 0.8, 0.95)  # of the room that a run needs
STAYS = re.compile(r"unchanged|nothing was written|still holds|intact|is kept|are kept|stays?\b")
NEED = re.compile(r"\bneeds?\b|File too large")  # the second where a limit stands in for the disk
REFUSED = re.compile(r"exists already|is there already")  # by jobs that run once
FILLER = "filler.bin"


class Findings:
    """Counts and failures of one job."""

    def __init__(self, place: Place):
        self.place, self.counts, self.failures = place, Counter(), []

    def note(self, when: str, *texts: str) -> None:
        """Add failures."""
        self.failures += [f"{self.place.job.name}, {when}: {text}" for text in texts]

    def judge(self, when: str, end: forks.End, *patterns: re.Pattern) -> bool:
        """Judge the end of a run that may fail, and return whether it succeeded."""
        self.counts["runs"] += 1
        if end.status == 0:
            self.counts["had room"] += 1
            return True
        texts = []
        if end.status != 1:
            texts.append(f"it ended with {end.status}")
        if "Traceback" in end.text:
            texts.append(f"it printed a traceback: {end.text.strip().splitlines()[-1][:300]}")
        elif len(end.errors) != 1:
            texts.append(f"it printed {len(end.errors)} error lines: {end.text[-300:]}")
        else:
            line = end.errors[0]
            wanted = {"the path": re.compile(re.escape(str(self.place.trial)))}
            wanted |= {f"{p.pattern!r}": p for p in patterns}
            texts += [f"{n} is not in: {line}" for n, p in wanted.items() if not p.search(line)]
        self.counts["clear" if not texts else "unclear"] += 1
        self.note(when, *texts)
        return False

    def check_result(self, when: str) -> None:
        """Check that the result is that of an undisturbed run."""
        found = [text for text in self.place.result() if FILLER not in text]
        self.counts["same result" if not found else "another result"] += 1
        self.note(when, *found)

    def check_whole(self, when: str) -> None:
        """Check that final files are whole, and that nothing is left over."""
        self.note(when, *broken(self.place.trial, self.place.expected))
        left = leftovers(self.place.trial, self.place.expected)
        hidden = [n for n in left if n.split("/")[-1].startswith(".") or ".tmp" in n]
        self.note(when, *(f"{name} is left over" for name in hidden))


def run(arguments: Namespace, jobs: list[Job] | None = None) -> int:
    """Run the jobs on full disks, print the table, and return the exit status."""
    mount = can_mount() and not arguments.no_mount
    each = on_small_disks if mount else with_small_files
    how = "a tmpfs" if mount else "the largest size of a file (RLIMIT_FSIZE), as no disk is mounted"
    return _run(arguments, jobs, each, "disk_full", f"full disks: {how}")


def run_read_only(arguments: Namespace, jobs: list[Job] | None = None) -> int:
    """Run the jobs on read-only disks, print the table, and return the exit status."""
    mount = can_mount() and not arguments.no_mount
    how = "a read-only tmpfs" if mount else "folders without permission"
    each = read_only_disk if mount else read_only_folder
    return _run(arguments, jobs, each, "read_only", f"read-only: {how}")


def _run(
    arguments: Namespace,
    jobs: list[Job] | None,
    each: Callable[[Place, Findings, random.Random], None],
    name: str,
    title: str,
) -> int:
    rows, failures = [], []
    with new_place() as place:
        for job in chosen(arguments.jobs) if jobs is None else jobs:
            try:
                place.take(job)
            except RuntimeError as error:
                failures.append(str(error))
                continue
            findings = Findings(place)
            each(place, findings, rng_of(arguments.seed, name, job.name))
            names = ("runs", "had room", "clear", "unclear", "same result", "another result")
            rows.append({"job": job.name, **{key: findings.counts[key] for key in names}})
            failures += findings.failures
    print_table(title, rows)
    write_results(arguments, name, how=title, rows=rows, failures=failures)
    return finish(failures)


def on_small_disks(place: Place, findings: Findings, rng: random.Random) -> None:
    """Run a job on a tmpfs of several sizes, and on a full one after its end."""
    with mounted(place.trial) as disk:
        place.job.begin(place.inputs / place.job.name, place.trial)
        before = disk.used()
        place.start().wait()
        need = disk.used() - before
    for share in SHARES:
        room = round(need * min(1, share + rng.uniform(0, 0.05)))
        when = f"{room:,} bytes of room of {need:,}"
        with mounted(place.trial) as disk:
            place.job.begin(place.inputs / place.job.name, place.trial)
            disk.leave_room(room)
            done = findings.judge(when, place.start().wait(), NEED, STAYS)
            findings.check_whole(when)
            disk.leave_room(2 * need + 2**24)
            if not (done and place.job.once):
                findings.judge(f"{when}, then enough", place.start().wait())
            findings.check_result(f"{when}, then enough")
            if share == SHARES[-1]:
                again_on_a_full_disk(place, findings, disk)


def again_on_a_full_disk(place: Place, findings: Findings, disk: Disk) -> None:
    """Start a job that has finished on a disk without any room, and once more with room."""
    when = "finished, then on a full disk"
    filler = place.trial / FILLER
    disk.leave_room(2**16)
    with filler.open("wb") as file:
        try:
            while True:
                file.write(bytes(1024))
                file.flush()
        except OSError:
            pass
    end = place.start().wait()
    findings.judge(when, end, *(() if REFUSED.search(end.text) else (NEED, STAYS)))
    findings.check_result(when)
    filler.unlink()


def with_small_files(place: Place, findings: Findings, rng: random.Random) -> None:
    """Run a job with limits on the size of a file."""
    sizes = [p.stat().st_size for p in place.trial.rglob("*") if p.is_file()]
    for share in SHARES:
        most = round(max(sizes) * min(1, share + rng.uniform(0, 0.05)))
        when = f"files of at most {most:,} bytes"
        place.begin()
        findings.judge(when, place.start(most_bytes=most).wait(), NEED, STAYS)
        findings.check_whole(when)
        if not (place.job.once and not place.result()):
            findings.judge(f"{when}, then any", place.start().wait())
        findings.check_result(f"{when}, then any")


def read_only_disk(place: Place, findings: Findings, _: random.Random) -> None:
    """Run a job on a read-only tmpfs: an empty one, and one with its result."""
    with mounted(place.trial) as disk:
        place.job.begin(place.inputs / place.job.name, place.trial)
        _read_only(place, findings, lambda on: disk.set_read_only(on))


def read_only_folder(place: Place, findings: Findings, _: random.Random) -> None:
    """Run a job on folders without the permission to write."""
    place.begin()
    context = [nullcontext()]

    def switch(on: bool) -> None:
        if on:
            context[0] = without_permission(place.trial)
            context[0].__enter__()
        else:
            context[0].__exit__(None, None, None)

    _read_only(place, findings, switch)


def _read_only(place: Place, findings: Findings, switch: Callable[[bool], None]) -> None:
    for when in ("new", "finished"):
        switch(True)
        end = place.start().wait()
        refused = REFUSED.search(end.text) and when == "finished"
        findings.judge(f"read-only, {when}", end, *(() if refused else (STAYS,)))
        if when == "finished":
            findings.check_result("read-only, finished")
        switch(False)
        if when == "new":
            findings.judge("writable again", place.start().wait())
            findings.check_result("writable again")
