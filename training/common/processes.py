"""Run a command in one process or several: errors, signals, workers."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors import SafetensorError

from gmflow_core.files.atomic import DISK_FULL
from gmflow_core.files.errors import MOST_SAID, is_out_of_memory, printable
from gmflow_core.files.locks import locked, locked_file
from gmflow_core.terminal import ENDING, at_terminal
from training.common.devices import on_cpu
from training.common.settings import LARGEST, require

MOST_WORKERS = 8  # loader processes for each GPU, unless the user asks for more
PATIENCE = timedelta(days=7)  # that processes wait for each other, where one may work alone
# errors that come from files, arguments, devices and processes, not from mistakes in the code
EXPECTED = (ValueError, OSError, FloatingPointError, ImportError, SafetensorError)
FROM_OUTSIDE = {"FileError", "WriteError", "LockedError"}  # of them, what a loader cannot rebuild
WORKER_ERROR = re.compile(r"Caught (\w+) in DataLoader worker process")
LOST = re.compile(r"Connection (closed|reset) by peer|gloo/transport")
kept_work = threading.Event()  # cleared while --restart has not yet replaced an earlier run's work
kept_work.set()
LOWER = (
    "the memory is not enough: give --batch-size a smaller number where the command has it, close "
    "other programs, or use a machine with more"
)


@contextmanager
def command() -> Iterator[None]:
    """Run the body of a command, with errors in one line that a user can act on.

    What comes from files, arguments, devices and other processes ends in such a line; any other
    exception is a mistake in the code, and keeps its traceback. For streams and signals see
    `at_terminal`.

    Raises:
        SystemExit: the body raised such an error (status 1), or was stopped (status 130).
    """
    kept_work.set()
    try:
        with at_terminal():
            yield
    except KeyboardInterrupt as stop:
        reason = str(stop) or "stopped"
        print(f"\n{printable(reason)}; {again()} to go on", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        message = message_of(error)
        if message is None:
            raise
        raise SystemExit(f"error: {message}") from error
    finally:
        leave()


def again() -> str:
    """Return the advice to repeat this command, which must not throw its own work away."""
    without = "--restart" in sys.argv and kept_work.is_set()
    return f"run the same command {'without --restart' if without else 'again'}"


def message_of(error: Exception) -> str | None:
    """Return one line about an error that is not a mistake in the code; None if it is one."""
    text = str(error)
    if is_out_of_memory(error):
        return f"{printable(_one_line(text) or 'out of memory', 500)}; {LOWER}"
    worker = WORKER_ERROR.match(text)
    if worker:  # the traceback is part of the text, and the error's own line its end
        if worker[1] not in FROM_OUTSIDE and not isinstance(error, EXPECTED):
            return None
        last = text.rsplit(f"{worker[1]}: ", 1)
        return printable(_one_line(last[-1]), MOST_SAID) if len(last) == 2 else worker[1]
    if isinstance(error, OSError) and error.errno in DISK_FULL and error.strerror:
        where = f" ({printable(str(error.filename))})" if error.filename else ""
        return f"the disk is full{where}: make room, and {again()}"
    if isinstance(error, EXPECTED):
        return printable(_one_line(text), MOST_SAID) or type(error).__name__
    if isinstance(error, RuntimeError) and "DataLoader worker" in text:
        return (
            f"{printable(_one_line(text), 500)}: a process that reads data was killed, most "
            f"likely for its memory; give --workers a smaller number (0: none), and {again()} to "
            "go on"
        )
    if isinstance(error, torch.distributed.DistError) or LOST.search(text):
        return (
            f"another process of this command ended ({printable(_one_line(text), 200)}); its own "
            f"message says why; {again()} to go on"
        )
    return None


def _one_line(text: str) -> str:
    return " ".join(text.split())


def leave() -> None:
    """End the process group, if there is one.

    A process that exits without doing so may be aborted when another process exits first.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextmanager
def together(state: PartialState) -> Iterator[None]:
    """If one process fails, raise in all; otherwise the others hang.

    Only some launchers notice a failed process. Nothing in the block may wait for other processes.

    Raises:
        ValueError: another process had an error; the message is its own.
    """
    if state.num_processes == 1:
        yield
        return
    mine: Exception | None = None
    try:
        yield
    except Exception as error:
        mine = error
    found = gather_object([None if mine is None else str(mine) or type(mine).__name__])
    if mine is not None:
        raise mine
    others = [f"process {number}: {message}" for number, message in enumerate(found) if message]
    if others:
        raise ValueError("; ".join(others))


@contextmanager
def owned(
    out: Path, device: str, timeout: timedelta | None = None, file: bool = False
) -> Iterator[PartialState]:
    """Start the processes of a command, and hold the lock of what it writes in the main one.

    If another command holds it, all processes raise.

    Args:
        out: the command's folder.
        device: --device.
        timeout: that processes wait for each other; PyTorch's own if None.
        file: `out` is a file.

    Raises:
        LockedError, WriteError: as `locked`.
    """
    waits = {} if timeout is None else {"timeout": timeout}
    state = PartialState(cpu=on_cpu(device), **waits)
    with held_by_main(state, locked_file(out) if file else locked(out)):
        yield state


@contextmanager
def held_by_main(state: PartialState, lock: AbstractContextManager) -> Iterator[None]:
    """Hold a lock in the main process; if that fails, raise in all."""
    with ExitStack() as stack:
        with together(state):
            if state.is_main_process:
                stack.enter_context(lock)
        yield


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """Yield an event that Ctrl-C, SIGTERM and SIGHUP set, instead of interrupting the block.

    The block checks the event where it can stop without loss. Only the main thread can handle
    signals: in another one the event stays unset. A signal that is ignored stays so, such as
    SIGHUP under nohup.
    """
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    ending = [getattr(signal, name) for name in ENDING if hasattr(signal, name)]
    handled = [n for n in ending if signal.getsignal(n) is not signal.SIG_IGN]
    before = {
        number: signal.signal(number, lambda *_: stopped.set())
        for number in (signal.SIGINT, *handled)
    }
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_interrupt(_: int = 0) -> None:
    """Ignore Ctrl-C in a loader's worker (its `worker_init_fn`).

    The terminal sends Ctrl-C to all processes; the main one handles it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def loader_workers(workers: int | None, state: PartialState) -> int:
    """Return how many processes read data for each GPU.

    Args:
        workers: the user's --workers; if None, as many as this machine has cores for, up to 8.

    Raises:
        ValueError: they are negative, or more than any machine has cores for.
    """
    if workers is not None:
        most = LARGEST["workers"]
        require(0 <= workers <= most, "workers", workers, f"from 0 to {most}")
        return workers
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))
    return min(MOST_WORKERS, (os.cpu_count() or 1) // processes)
