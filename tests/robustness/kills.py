"""Kill commands and savers at random moments, start them again, and compare the results.

    python -m tests.robustness --kills 200

Half of the kills (SIGKILL, to the whole process group) come at a moment drawn uniformly from the
run's length, the other half before a change to files drawn uniformly from all of them: the creation
of a temporary folder, the sync, the rename, the removal. After one to three kills the command is
started once more, to its end.
"""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections import Counter

from . import eight_bit
from .contents import broken, leftovers, temporary
from .forks import KILLED
from .jobs import Job, chosen
from .place import Place, finish, new_place, print_table, rng_of, write_results

FEWEST = 4  # kills of a job


@dataclasses.dataclass
class Tally:
    """Counts of one job."""

    kills: int = 0
    at_a_change: int = 0
    results: int = 0
    counts: Counter = dataclasses.field(default_factory=Counter)
    most_left: int = 0
    failures: list[str] = dataclasses.field(default_factory=list)


def run(arguments: Namespace) -> int:
    """Kill every job, print the table, and return the exit status."""
    rows, failures = collect(arguments, chosen(getattr(arguments, "jobs", None)))
    if not getattr(arguments, "jobs", None):
        more, found = eight_bit.collect("kills", arguments)
        rows, failures = rows + more, failures + found
    print_table(f"kills, seed {arguments.seed}", rows)
    left = sum(each["temporary bytes left by kills"] for each in rows)
    print(f"{sum(each['kills'] for each in rows)} kills left {left:,} bytes in temporary files")
    write_results(arguments, "kills", rows=rows, failures=failures)
    return finish(failures)


def collect(arguments: Namespace, jobs: list[Job]) -> tuple[list[dict], list[str]]:
    """Kill every job; return the rows of the table, and failures."""
    rows, failures = [], []
    with new_place() as place:
        shares = share_out(arguments.kills, len(jobs))
        for job, share in zip(jobs, shares, strict=True):
            try:
                place.take(job)
            except RuntimeError as error:
                failures.append(str(error))
                continue
            tally = kill_job(place, share, arguments.seed)
            rows.append(row(place, tally))
            failures += tally.failures
            print(f"{job.name}: {tally.kills} kills, {len(tally.failures)} failures", flush=True)
    return rows, failures


def share_out(kills: int, jobs: int) -> list[int]:
    """Divide kills among jobs; the first ones, the training commands, get the remainder."""
    each, more = divmod(kills, jobs)
    return [max(FEWEST if kills >= jobs * FEWEST else 1, each + (n < more)) for n in range(jobs)]


def row(place: Place, tally: Tally) -> dict[str, object]:
    """Return a line of the table."""
    return {
        "job": place.job.name,
        "seconds": round(place.seconds, 2),
        "kills": tally.kills,
        "at a change": tally.at_a_change,
        "same result": f"{tally.counts['same']}/{tally.results}",
        "broken final files": tally.counts["broken"],
        "temporary bytes left by kills": tally.counts["bytes"],
        "most at once": tally.most_left,
        "left after the next start": tally.counts["left"],
    }


def kill_job(place: Place, kills: int, seed: int) -> Tally:
    """Kill a job so many times, in several trials."""
    tally, rng, trial = Tally(), rng_of(seed, place.job.name), 0
    while tally.kills < kills and trial < 4 * kills:
        trial += 1
        place.begin()
        before = []
        for _ in range(min(rng.choice((1, 1, 2, 3)), kills - tally.kills)):
            at_a_change = rng.random() < 0.5
            if at_a_change:
                step = rng.randint(1, max(1, place.steps))
                end = place.start(last_step=step).wait()
                when = f"before change {step} of {place.steps}"
            else:
                moment = rng.uniform(0, place.seconds)
                end = place.start().wait(moment, kill=True)
                when = f"after {moment:.3f} s of {place.seconds:.3f}"
            before.append(when)
            if end.status != KILLED:
                if end.status:
                    text = end.text[-600:]
                    tally.failures.append(f"{place.job.name}, {before}: {end.status}\n{text}")
                break
            tally.kills += 1
            tally.at_a_change += at_a_change
            look(place, tally, before)
            if place.job.once and not place.result():
                break
        else:
            complete(place, tally, before)
    if tally.kills < kills:
        tally.failures.append(f"{place.job.name}: only {tally.kills} of {kills} kills met it alive")
    return tally


def look(place: Place, tally: Tally, before: list[str]) -> None:
    """Look at what a kill left: files under final names must be whole."""
    found = broken(place.trial, place.expected)
    tally.counts["broken"] += len(found)
    tally.failures += [f"{place.job.name}, killed {before}: {text}" for text in found]
    size = sum(temporary(leftovers(place.trial, place.expected)).values())
    tally.counts["bytes"] += size
    tally.most_left = max(tally.most_left, size)


def complete(place: Place, tally: Tally, before: list[str]) -> None:
    """Start the job once more, to its end, and compare."""
    end = place.start().wait()
    tally.results += 1
    left = leftovers(place.trial, place.expected)
    tally.counts["left"] += len(left)
    found = place.result()
    if end.status or found:
        text = "; ".join(found) if not end.status else f"{end.status}\n{end.text[-600:]}"
        tally.failures.append(f"{place.job.name}, killed {before}, then: {text}")
    else:
        tally.counts["same"] += 1
