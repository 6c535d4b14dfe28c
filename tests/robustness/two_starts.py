"""Start each command twice on one output: one works, the other says who holds it.

    python -m tests.robustness --two-starts

The second start comes at a random moment of the first. Both may succeed only one after the other.
Then a third start, after the holder was killed, has to work at once.
"""

from __future__ import annotations

import re
import time
from argparse import Namespace
from collections import Counter

from . import forks
from .jobs import chosen
from .place import Place, finish, new_place, print_table, rng_of, write_results

TRIALS = 3  # double starts of a job
COUNTS = ("refused", "one after the other", "both worked", "unclear", "same result")


def run(arguments: Namespace) -> int:
    """Start the jobs twice, print the table, and return the exit status."""
    rows, failures = [], []
    with new_place() as place:
        for job in chosen(getattr(arguments, "jobs", None)):
            if not job.locks:
                continue
            try:
                place.take(job)
            except RuntimeError as error:
                failures.append(str(error))
                continue
            counts, found = start_twice(place, arguments.seed)
            rows.append(
                {"job": job.name, "trials": TRIALS} | {name: counts[name] for name in COUNTS}
            )
            failures += found
            print(f"{job.name}: {len(found)} failures", flush=True)
    print_table(f"two starts, seed {arguments.seed}", rows)
    write_results(arguments, "two_starts", rows=rows, failures=failures)
    return finish(failures)


def start_twice(place: Place, seed: int) -> tuple[Counter, list[str]]:
    """Start a job twice in several trials, and return counts and failures."""
    rng, counts, failures = rng_of(seed, "two starts", place.job.name), Counter(), []
    for trial in range(TRIALS):
        place.begin()
        offset = 0.0 if trial == 0 else rng.uniform(0, 0.6 * place.seconds)
        when = f"{place.job.name}, second start after {offset:.3f} s"
        ends = both(place, offset)
        texts = judge(ends, counts)
        again = place.result() and not place.job.once and _rerun(place)
        texts += again or []
        found = place.result()
        counts["same result"] += not found
        failures += [f"{when}: {text}" for text in [*texts, *found]]
    place.begin()
    text = after_a_kill(place, rng.uniform(0.2, 0.6) * place.seconds)
    failures += [f"{place.job.name}, {text}"] if text else []
    return counts, failures


def both(place: Place, offset: float) -> dict[int, forks.End]:
    """Start a job twice, the second one later; return both ends by process number."""
    first = place.start()
    time.sleep(offset)
    second = place.start()
    ends = {second.process: None, first.process: None}
    for child in (second, first):
        ends[child.process] = child.wait()
    return ends


def judge(ends: dict[int, forks.End], counts: Counter) -> list[str]:
    """Judge the ends of two starts, count what they were, and return failures."""
    (one, a), (two, b) = ends.items()
    worked = [process for process, end in ends.items() if end.status == 0]
    if len(worked) == 2:
        if a.first > b.last or b.first > a.last:
            counts["one after the other"] += 1
            return []
        counts["both worked"] += 1
        return ["both worked at the same time"]
    if not worked:
        counts["unclear"] += 1
        return [f"neither worked: {a.text[-300:]} / {b.text[-300:]}"]
    holder, loser = worked[0], ends[two if worked[0] == one else one]
    found = [line for line in loser.errors if re.search(rf"process {holder}\b", line)]
    exists = [line for line in loser.errors if "exists already" in line]
    if loser.status == 1 and len(loser.errors) == 1 and (found or exists):
        counts["refused" if found else "one after the other"] += 1
        return []
    counts["unclear"] += 1
    return [f"the second one ended with {loser.status}: {loser.text[-400:]}"]


def after_a_kill(place: Place, moment: float) -> str:
    """Kill the holder while it works, and start at once; return what is wrong."""
    place.start().wait(moment, kill=True)
    if place.job.once and not place.result():
        return ""
    end = place.start().wait()
    found = place.result()
    if end.status or found:
        return f"start after a kill: {end.status}, {found} {end.text[-300:]}"
    return ""


def _rerun(place: Place) -> list[str]:
    """Start the job once more: the one that worked may have been refused halfway."""
    end = place.start().wait()
    return [] if end.status == 0 else [f"a later start fails: {end.text[-300:]}"]
