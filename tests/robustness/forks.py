"""Run a command in a forked child that can be killed, limited and watched.

Starting Python and importing torch takes seconds, in which no work can be lost. So a parent that
has imported everything forks for each run, and a kill lands in the work.
"""

from __future__ import annotations

import mmap
import os
import resource
import signal
import struct
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.forked import exit_status

STEPS = struct.Struct("=qdd")  # number of file-system steps, times of the first and the last one
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate", "os.link")
HANG = 300  # seconds after which a run counts as hung
KILLED = -signal.SIGKILL


@dataclass(frozen=True)
class End:
    """End of a run.

    Args:
        status: exit status; the negative number of a signal that ended it; None after a hang.
        text: what it printed.
        seconds: how long it ran.
        steps: changes to files in its folder.
        first, last: times of the first and the last of them.
    """

    status: int | None
    text: str
    seconds: float
    steps: int
    first: float
    last: float

    @property
    def errors(self) -> list[str]:
        """Lines that begin with "error:"."""
        lines = [line.strip() for line in self.text.splitlines()]
        return [line for line in lines if line.startswith(("error:", "gmflow: error:"))]


class Child:
    """A function in a forked process, the leader of its own process group.

    Args:
        function: called with `arguments`, as the `main` of a command.
        arguments: a command line.
        folder: where it works; changes to files in it are counted.
        last_step: the child kills itself before this step (counted from 1); None never.
        most_bytes: largest size of a file (RLIMIT_FSIZE); None: no limit.
    """

    def __init__(
        self,
        function: Callable[[list[str]], Any],
        arguments: list[str],
        folder: Path,
        last_step: int | None = None,
        most_bytes: int | None = None,
    ):
        self.started = time.monotonic()
        self._memory = mmap.mmap(-1, STEPS.size)  # shared with the child
        # a file would count for the limit on the size of files
        self._output, writer = os.pipe()
        os.set_blocking(self._output, False)
        self._text = b""
        sys.stdout.flush()
        sys.stderr.flush()
        self.process = os.fork()
        if self.process == 0:
            try:
                os.setsid()
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                _redirect(writer)
                if most_bytes is not None:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
                sys.addaudithook(_Steps(str(folder), self._memory, last_step))
                status = _call(function, arguments)
            except BaseException:
                status = 70
            os._exit(status)
        os.close(writer)

    def kill(self) -> None:
        """Kill the process and those it started."""
        try:
            os.killpg(self.process, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # before its setsid, or after its end
            os.kill(self.process, signal.SIGKILL)

    def wait(self, seconds: float = HANG, kill: bool = False) -> End:
        """Wait for the end, for at most `seconds`; then kill it.

        Args:
            kill: the kill is what the caller wants, not the end of a hang.
        """
        deadline, hung = time.monotonic() + seconds, False
        while True:
            found, raw = os.waitpid(self.process, os.WNOHANG)
            self._read()
            if found:
                break
            if time.monotonic() >= deadline:
                self.kill()
                hung, (_, raw) = not kill, os.waitpid(self.process, 0)
                break
            time.sleep(0.001)
        spent = time.monotonic() - self.started
        status = None if hung else os.waitstatus_to_exitcode(raw)
        steps, first, last = STEPS.unpack(self._memory[:])
        self._memory.close()
        self._read()
        os.close(self._output)
        text = self._text.decode("utf-8", "backslashreplace")
        return End(status, text, spent, steps, first, last)

    def _read(self) -> None:
        """Read what the child has printed so far."""
        with suppress(BlockingIOError):
            while part := os.read(self._output, 2**16):
                self._text += part


def run(function: Callable[[list[str]], Any], arguments: list[str], **options: Any) -> End:
    """Run a function in a child to its end; the arguments are those of `Child`."""
    return Child(function, arguments, **options).wait()


class _Steps:
    """An audit hook that counts changes to files in a folder, and dies before one of them."""

    def __init__(self, folder: str, memory: mmap.mmap, last_step: int | None):
        self.folder, self.memory, self.last_step = folder, memory, last_step
        self.steps, self.first = 0, 0.0

    def __call__(self, event: str, about: tuple) -> None:
        if event == "open":
            path, _, flags = about
            if not isinstance(flags, int) or not flags & WRITING:
                return
        elif event in CHANGES:
            path = about[0]
            if event in ("os.remove", "os.rmdir") and about[-1] != -1:
                path = self.folder  # relative to a folder's descriptor, as shutil.rmtree does
        else:
            return
        if not isinstance(path, (str, bytes, os.PathLike)):
            return
        if not os.fsdecode(path).startswith(self.folder):
            return
        self.steps += 1
        now = time.monotonic()
        self.first = self.first or now
        self.memory[:] = STEPS.pack(self.steps, self.first, now)
        if self.steps == self.last_step:
            os.kill(os.getpid(), signal.SIGKILL)


def _redirect(out: int) -> None:
    """Send the output to a descriptor, and read nothing."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115


def _call(function: Callable[[list[str]], Any], arguments: list[str]) -> int:
    """Call the function as the interpreter would call a script, and return the exit status."""
    sys.argv = [f"{function.__module__}.py", *arguments]
    status = exit_status(lambda: function(arguments))
    sys.stdout.flush()
    sys.stderr.flush()
    return status
