"""Run one piece of work in a forked child, with limits on its time and memory."""

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
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ADDRESS_SPACE = 4 * 2**30  # bytes that a child may reserve beyond what it starts with
PAGE = os.sysconf("SC_PAGE_SIZE")
MOST_REPORTED = 20_000  # characters of a text that a child sends; a pipe holds 65,536


class Limits(NamedTuple):
    """Limits of one child."""

    seconds: float = 30
    megabytes: float = 600  # growth of the resident memory


class Ending(NamedTuple):
    """How a child ended."""

    how: str  # "answered", "hang", or "crash"
    answer: dict[str, Any]  # what the work returned, if it answered
    seconds: float
    megabytes: float  # growth of the resident memory at its peak
    signal: int  # that ended it, 0 for none


def run_child(work: Callable[[], dict[str, Any]], log: Path, limits: Limits) -> Ending:
    """Run `work` in a forked child, and wait for its end.

    Args:
        work: returns something that JSON can hold.
        log: file for what the child prints.
        limits: when they are exceeded the child and all that it started are killed.
    """
    started = time.monotonic()
    read, write = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    base = resident()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        _child(work, log, write)
    os.close(write)
    descriptor = os.pidfd_open(pid)
    try:
        ended = bool(select.select([descriptor], [], [], limits.seconds)[0])
    finally:
        os.close(descriptor)
        _kill_group(pid)
    _, status, usage = os.wait4(pid, 0)
    with os.fdopen(read, "rb") as pipe:
        os.set_blocking(read, False)
        raw = pipe.read() or b""
    answer = json.loads(raw) if ended and raw else {}
    base = answer.pop("started_with", base)
    grown = max(0.0, (usage.ru_maxrss * 1024 - base) / 2**20)
    how = "hang" if not ended else "answered" if answer else "crash"
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) and ended else 0
    return Ending(how, answer, time.monotonic() - started, grown, number)


def resident() -> int:
    """Return the resident memory of this process in bytes."""
    return _memory()[1]


def _memory() -> tuple[int, int]:
    """Return the address space and the resident memory of this process in bytes."""
    with open("/proc/self/statm") as file:
        whole, here, *_ = file.read().split()
    return int(whole) * PAGE, int(here) * PAGE


def _kill_group(pid: int) -> None:
    """Kill a child's whole group; the child is not reaped yet, so the number is still its own."""
    for kill in (os.killpg, os.kill):
        try:
            kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue


def _child(work: Callable[[], dict[str, Any]], log: Path, write: int) -> None:
    """Do the work of the child, send the answer, and end without any clean-up."""
    try:
        gc.disable()  # or it would copy all the pages that it looks at
        os.setsid()
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(file, 1)
        os.dup2(file, 2)
        whole, here = _memory()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        most = whole + ADDRESS_SPACE
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        answer = {**work(), "started_with": here}
        text = json.dumps(answer)
    except BaseException:
        text = json.dumps({"harness": traceback.format_exc()[-MOST_REPORTED:]})
    os.write(write, text.encode())
    os._exit(0)
