"""Run a command at its terminal: streams that are closed or full, signals that end it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from .files.errors import reason

ENDING = ("SIGTERM", "SIGHUP")  # a request to end, and a terminal that was closed


@contextmanager
def at_terminal() -> Iterator[None]:
    """Run the body of a command, so that its streams and signals cannot cost it its results.

    A closed standard stream leads nowhere, as with /dev/null, and any text can be printed. SIGTERM
    and SIGHUP end the body like Ctrl-C.

    Raises:
        OSError: what was printed cannot be written; the message says so.
        KeyboardInterrupt: a signal ended the body; the message names it.
    """
    open_streams()
    try:
        with _signals_as_interrupts():
            yield
            sys.stdout.flush()
    except BrokenPipeError as error:
        raise OSError("the program that read this command's output ended") from error
    except OSError as error:
        if _broken_streams():
            text = f"the output of this command cannot be written ({reason(error)})"
            raise OSError(text) from error
        raise
    finally:
        for number in _broken_streams():
            _lead_nowhere(number)


def open_streams() -> None:
    """Open standard streams that are closed on the null device; let all others take any text.

    While one is closed, the next file to be opened gets its number, and what libraries print there
    goes into that file.
    """
    for number in range(3):  # all of them before the first file is opened
        try:
            os.fstat(number)
        except OSError:
            _lead_nowhere(number)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):  # names of files need not fit a terminal's encoding
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _broken_streams() -> list[int]:
    """Return the numbers of the output streams that cannot be written."""
    broken = []
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with suppress(OSError, ValueError):
                broken.append(stream.fileno())
        except ValueError:  # closed by the program itself
            pass
    return broken


def _lead_nowhere(number: int) -> None:
    """Open the null device under the number of a stream."""
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_RDWR)
        if nowhere != number:
            os.dup2(nowhere, number)
            os.close(nowhere)


@contextmanager
def _signals_as_interrupts() -> Iterator[None]:
    """Raise KeyboardInterrupt for the signals that end a process, so that it can tidy up.

    In the main thread only, and only for signals that nobody else handles or ignores, as nohup
    does.
    """

    def stop(number: int, _: object) -> None:
        raise KeyboardInterrupt(f"stopped by {signal.Signals(number).name}")

    ours = []
    if threading.current_thread() is threading.main_thread():
        known = [getattr(signal, name) for name in ENDING if hasattr(signal, name)]
        ours = [number for number in known if signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)
