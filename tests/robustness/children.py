"""Run pieces of work in a forked child, with limits on the time and memory of each."""

from __future__ import annotations

import gc
import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

ADDRESS_SPACE = 4 * 2**30  # bytes that a child may reserve beyond what it starts with
PAGE = os.sysconf("SC_PAGE_SIZE")
MOST_REPORTED = 20_000  # characters of a text that a child sends

Work = Callable[[], dict[str, Any]]


class Limits(NamedTuple):
    """Limits of one piece of work."""

    seconds: float = 30
    megabytes: float = 600  # growth of the resident memory


class Ending(NamedTuple):
    """How a piece of work ended."""

    how: str  # "answered", "hang", or "crash"
    answer: dict[str, Any]  # what the work returned, if it answered
    seconds: float
    megabytes: float  # growth of the resident memory at its peak
    signal: int  # that ended the child, 0 for none


def run_child(
    works: Sequence[Work], log: Path, limits: Limits, goes_on: Callable[[dict], bool]
) -> list[Ending]:
    """Run pieces of work in a forked child one after the other, and wait for its end.

    Args:
        works: each returns something that JSON can hold.
        log: file for what the child prints; each piece begins with an empty one.
        limits: of each piece; when it takes too long, the child and all that it started are killed.
        goes_on: tells from an answer whether the same child may do the next piece.

    Returns:
        The endings of the first pieces, at least of one: the last is where the child stopped.
    """
    read, write = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        _child(works, log, write, goes_on)
    os.close(write)
    descriptor = os.pidfd_open(pid)
    started, endings, rest = time.monotonic(), [], b""
    hangs = False
    with os.fdopen(read, "rb", buffering=0) as pipe:
        os.set_blocking(read, False)
        while True:
            left = started + limits.seconds - time.monotonic()
            ready = select.select([pipe, descriptor], [], [], max(0, left))[0]
            hangs = not ready
            chunk = pipe.read(2**16) if pipe in ready else b""
            *lines, rest = (rest + (chunk or b"")).split(b"\n")
            for line in lines:
                answer, now = json.loads(line), time.monotonic()
                grown = answer.pop("grown") / 2**20
                endings.append(Ending("answered", answer, now - started, grown, 0))
                started = now
            if hangs or (descriptor in ready and not chunk):
                break
    os.close(descriptor)
    _kill_group(pid)
    _, status = os.waitpid(pid, 0)
    stopped = endings and not goes_on(endings[-1].answer)
    if len(endings) < len(works) and not stopped:
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) and not hangs else 0
        how = "hang" if hangs else "crash"
        endings.append(Ending(how, {}, time.monotonic() - started, 0, number))
    return endings


def _kill_group(pid: int) -> None:
    """Kill a child's whole group; the child is not reaped yet, so the number is still its own."""
    for kill in (os.killpg, os.kill):
        with suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)


def _child(works: Sequence[Work], log: Path, write: int, goes_on: Callable[[dict], bool]) -> None:
    """Do the child's work, send the answers, and end without any clean-up."""
    gc.disable()  # or it would copy all the pages that it looks at
    os.setsid()
    file = os.open(log, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(file, 1)
    os.dup2(file, 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open("/proc/self/statm") as sizes:
        most = int(sizes.read().split()[0]) * PAGE + ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    for work in works:
        os.ftruncate(file, 0)
        os.lseek(file, 0, os.SEEK_SET)
        before = _memory(reset=True)
        try:
            answer = work()
        except BaseException:
            answer = {"harness": traceback.format_exc()[-MOST_REPORTED:]}
        sys.stdout.flush()
        sys.stderr.flush()
        grown = max(0, _memory() - before)
        os.set_blocking(write, True)
        os.write(write, json.dumps({**answer, "grown": grown}).encode() + b"\n")
        if not goes_on(answer):
            break
    os._exit(0)


def _memory(reset: bool = False) -> int:
    """Return the peak of this process's resident memory in bytes; or reset it to what it is now."""
    if reset:
        with suppress(OSError), open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    with open("/proc/self/status") as file:
        (peak,) = (line.split()[1] for line in file if line.startswith("VmHWM:"))
    return int(peak) * 1024
