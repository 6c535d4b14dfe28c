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
from contextlib import nullcontext, suppress

from . import eight_bit, forks
from .contents import broken, leftovers
from .disks import Disk, can_mount, mounted, without_permission
from .jobs import Job, chosen
from .place import Place, finish, new_place, print_table, rng_of, write_results

SHARES = (0.0, 0.05, 0.2, 0.4, 0.6, 0.8, 0.95)  # of the room that a run needs
STAYS = re.compile(r"unchanged|nothing was written|still holds|intact|is kept|are kept|stays?\b")
NEED = re.compile(r"\bneeds?\b|File too large")  # the second where a limit stands in for the disk
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

    def succeed(self, when: str, end: forks.End) -> None:
        """Check that a run ended well."""
        if end.status != 0:
            self.note(when, f"it ended with {end.status}: {end.text[-300:]}")

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


def run(arguments: Namespace) -> int:
    """Run the jobs on full or read-only disks, print tables, and return the exit status."""
    parts = [part for part in ("disk_full", "read_only") if getattr(arguments, part)]
    status = 0
    for part in parts:
        rows, failures = collect(arguments, chosen(getattr(arguments, "jobs", None)), part)
        if not getattr(arguments, "jobs", None):
            more, found = eight_bit.collect(part, arguments)
            rows, failures = rows + more, failures + found
        title = HOW[part][_mounts(arguments)][0]
        print_table(title, rows)
        write_results(arguments, part, how=title, rows=rows, failures=failures)
        status |= finish(failures)
    return status


def collect(arguments: Namespace, jobs: list[Job], part: str) -> tuple[list[dict], list[str]]:
    """Run the jobs on full or read-only disks; return the rows of the table, and failures."""
    rows, failures = [], []
    _, each = HOW[part][_mounts(arguments)]
    with new_place() as place:
        for job in jobs:
            try:
                place.take(job)
            except RuntimeError as error:
                failures.append(str(error))
                continue
            findings = Findings(place)
            each(place, findings, rng_of(arguments.seed, part, job.name))
            names = ("runs", "had room", "clear", "unclear", "same result", "another result")
            rows.append({"job": job.name, **{key: findings.counts[key] for key in names}})
            failures += findings.failures
            print(f"{job.name}: {len(findings.failures)} failures", flush=True)
    return rows, failures


def _mounts(arguments: Namespace) -> bool:
    return can_mount() and not getattr(arguments, "no_mount", False)


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
                findings.succeed(f"{when}, then enough", place.start().wait())
            findings.check_result(f"{when}, then enough")
            if share == SHARES[-1] and not place.job.once:
                again_on_a_full_disk(place, findings, disk)


def again_on_a_full_disk(place: Place, findings: Findings, disk: Disk) -> None:
    """Start a job that has finished on a disk without any room, and once more with room."""
    when = "finished, then on a full disk"
    filler = place.trial / FILLER
    disk.leave_room(2**16)
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(1024)):
            pass
    end = place.start().wait()
    findings.judge(when, end, NEED, STAYS)
    findings.check_result(when)
    filler.unlink(missing_ok=True)


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
            findings.succeed(f"{when}, then any", place.start().wait())
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
    for when in ("new",) if place.job.once else ("new", "finished"):
        switch(True)
        end = place.start().wait()
        findings.judge(f"read-only, {when}", end, STAYS)
        if when == "finished":
            findings.check_result("read-only, finished")
        switch(False)
        if when == "new":
            findings.succeed("writable again", place.start().wait())
            findings.check_result("writable again")


HOW = {  # part -> whether disks can be mounted -> title, function for a job
    "disk_full": {
        True: ("full disks: a tmpfs", on_small_disks),
        False: ("full disks: largest size of a file, as no disk can be mounted", with_small_files),
    },
    "read_only": {
        True: ("read-only: a tmpfs", read_only_disk),
        False: ("read-only: folders without permission", read_only_folder),
    },
}
