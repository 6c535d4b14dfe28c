"""Run a command in one process or several: errors, signals, workers."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

MOST_WORKERS = 8  # loader processes for each GPU, unless the user asks for more


@contextmanager
def command() -> Iterator[None]:
    """Run the body of a command, with errors in one line that a user can act on.

    Raises:
        SystemExit: the body raised such an error, or was stopped by the user (status 130).
    """
    try:
        yield
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt as stop:
        reason = str(stop) or "stopped"
        print(f"\n{reason}; run the same command again to go on", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        leave()


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
def stop_signals() -> Iterator[threading.Event]:
    """Yield an event that Ctrl-C and SIGTERM set, instead of interrupting the code in the block.

    The block checks the event where it can stop without loss. Only the main thread can handle
    signals: in another one the event stays unset.
    """
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    before = {
        number: signal.signal(number, lambda *_: stopped.set())
        for number in (signal.SIGINT, signal.SIGTERM)
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
    """
    if workers is not None:
        return workers
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))
    return min(MOST_WORKERS, (os.cpu_count() or 1) // processes)
