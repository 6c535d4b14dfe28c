"""Python processes of their own that begin with their imports made, as forks of one process.

Importing torch takes 3 s of a core, and the trainers take 7 s. Where a test needs another process,
but not its start, it asks for a fork of one that has imported them: one for each set of modules
and pytest worker. Nothing has run in that one but imports.

    python -m tests.forked MODULE ...

is that process. Its stdin is a socket: each line of it is a job, as JSON, that comes with four
descriptors: stdin, stdout and stderr of the fork, and where its number and exit status go.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import re
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[1]
LIBRARY = ("gmflow_core", "gmflow_core.cli")  # without the hub's client, which reads HF_HOME once
TRAINERS = tuple(
    f"training.{name}" for name in ("checkerboard", "evaluate", "fit_source", "imagenet", "prepare")
)
OF_FORKS = re.compile(  # tests that ask for forks: on one worker, there is one process of them
    r"tests/(core/test_(fetch|hub_file)\.py|\w+/test_\w+\.py::test_(resumes_after_sigkill"
    r"|(two|other_batches_and)_processes|a_process_may|an_error_of_one_process|a_file_that_shrinks"
    r"|leftovers_of_ended|a_second_process)|test_robustness(_runs)?\.py::test_(hostile_|no))"
)
RANKS = ("RANK", "LOCAL_RANK"), ("WORLD_SIZE", "LOCAL_WORLD_SIZE")  # as torchrun sets them


class Process:
    """A fork, with the methods of `subprocess.Popen` that tests need; its output is text.

    Args:
        command: what would follow the interpreter: "-c", code, or "-m", module, and arguments.
        imports: modules that are imported already.
        environment: further variables.
        cwd: its folder.
    """

    def __init__(
        self,
        *command: object,
        imports: Sequence[str] = TRAINERS,
        environment: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
    ):
        variables = {"OMP_NUM_THREADS": "1", **os.environ, **(environment or {})}
        job = {"command": [*map(str, command)], "environment": variables, "cwd": str(cwd)}
        self.returncode: int | None = None
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        (stdin, writer), (reader, stdout), (status, told) = os.pipe(), os.pipe(), os.pipe()
        given = stdin, stdout, self._errors.fileno(), told
        socket.send_fds(_server(tuple(imports)), [json.dumps(job).encode() + b"\n"], given)
        for each in (stdin, stdout, told):
            os.close(each)
        self.stdin, self.stdout = os.fdopen(writer, "w"), os.fdopen(reader, errors="replace")
        self._status = os.fdopen(status)
        self.pid = int(self._status.readline())

    def poll(self) -> int | None:
        """Return the exit status, as `Popen.returncode`; None while the process runs."""
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            self.returncode = int(self._status.readline())
        return self.returncode

    def wait(self, timeout: float = 600) -> int:
        """Return the exit status when the process has ended; kill it after `timeout` seconds."""
        if self.returncode is None and not select.select([self._status], [], [], timeout)[0]:
            self.kill()
            raise TimeoutError(f"process {self.pid} still runs after {timeout:g} s")
        return self.poll()

    def communicate(self, timeout: float = 600) -> tuple[str, str]:
        """Close its input, wait for its end, and return the rest of its stdout, and its stderr."""
        self.stdin.close()
        parts, deadline = [], time.monotonic() + timeout
        while select.select([self.stdout], [], [], deadline - time.monotonic())[0]:
            parts.append(os.read(self.stdout.fileno(), 2**16))
            if not parts[-1]:
                break
        self.wait(max(0.0, deadline - time.monotonic()))
        self._errors.seek(0)
        return b"".join(parts).decode(errors="replace"), self._errors.read()

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End the process at once."""
        self.send_signal(signal.SIGKILL)


def run(*command: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a fork to its end; arguments as those of `Process`."""
    process = Process(*command, **options)
    stdout, stderr = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def run_ranks(*command: object, count: int = 2, **options: Any) -> list[tuple[str, str, int]]:
    """Run a program in several processes, as torchrun starts them.

    Returns:
        Stdout, stderr and exit status of each.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    own, shared = RANKS
    where |= dict.fromkeys(shared, str(count))
    processes = [
        Process(*command, **options, environment={**where, **dict.fromkeys(own, str(rank))})
        for rank in range(count)
    ]
    try:
        return [(*each.communicate(), each.returncode) for each in processes]
    finally:
        for each in processes:
            each.kill()


@cache
def _server(modules: tuple[str, ...]) -> socket.socket:
    """Start the process that imports modules, and return the socket that takes its jobs."""
    ours, its = socket.socketpair()
    command = [sys.executable, "-m", "tests.forked", *modules]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=its, stdout=subprocess.DEVNULL
    )
    its.close()
    atexit.register(process.wait)
    atexit.register(ours.close)  # before that
    return ours


def serve(modules: Sequence[str]) -> None:
    """Import modules, and fork for each job until the socket is closed."""
    for name in modules:
        importlib.import_module(name)
    with socket.socket(fileno=os.dup(0)) as jobs:
        while True:
            text, files, *_ = socket.recv_fds(jobs, 2**16, 4)
            while text and not text.endswith(b"\n"):
                text += jobs.recv(2**16)
            _reap()
            if not text:
                return
            if os.fork() == 0:
                _watch(json.loads(text), *files)
            for each in files:
                os.close(each)


def _reap() -> None:
    """Take note of the children that have ended, so that their time counts as this process's."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _watch(job: dict[str, Any], *files: int) -> NoReturn:
    """Run a job in a child, and tell its number and its exit status."""
    *streams, told = files
    child = os.fork()
    if child == 0:
        os.close(told)
        for number, each in enumerate(streams):
            os.dup2(each, number)
            os.close(each)
        sys.stdin, sys.stdout, sys.stderr = (
            open(number, mode, encoding="utf-8", closefd=False)  # noqa: SIM115
            for number, mode in enumerate("rww")
        )
        _work(**job)
    for each in streams:
        os.close(each)
    os.write(told, f"{child}\n".encode())
    os.write(told, f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n".encode())
    os._exit(0)


def _work(command: list[str], environment: dict[str, str], cwd: str) -> NoReturn:
    """Do what the interpreter does with a command line, and end."""
    status = exit_status(partial(_run, command, environment, cwd))
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _run(command: list[str], environment: dict[str, str], cwd: str) -> None:
    """Run a program in its own environment and folder."""
    import torch

    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    kind, what, *arguments = command
    sys.argv = [kind, *arguments]
    if kind == "-m":
        sys.modules.pop(what, None)
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(compile(what, "<string>", "exec"), vars(main))  # noqa: S102


def exit_status(program: Callable[[], Any]) -> int:
    """Call a program, and return the exit status that the interpreter would give it.

    What ends it is printed to stderr: its message, or a traceback.
    """
    try:
        program()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    serve(sys.argv[1:])
