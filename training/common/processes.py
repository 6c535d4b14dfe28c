"""Several processes of one command."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import PartialState
from accelerate.utils import gather_object


@contextmanager
def together(state: PartialState) -> Iterator[None]:
    """All processes leave the block together, or with an error if one of them has one: the others would wait for it, which
    only some launchers notice. Nothing in the block may wait for other processes.

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
def command() -> Iterator[None]:
    """What a command does, with errors that a user can act on in a line, and status 130 where the user stops it."""
    try:
        yield
    except (ValueError, OSError, FloatingPointError, ModuleNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        print("\nstopped; run the same command again to go on", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        leave()


def leave() -> None:
    """End the process group, if there is one: a process that ends with it may be aborted when another ends first."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
