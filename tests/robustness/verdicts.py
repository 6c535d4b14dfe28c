"""Judge how a piece of work on hostile input ended."""

from __future__ import annotations

import functools
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from gmflow_core.files.errors import printable

from .children import Ending, Limits, run_child

VERDICTS = ("right", "clear", "raw", "not finite", "hang", "memory", "crash")
GOOD = ("right", "clear")
OURS = ("FileError", "WriteError", "LockedError", "ValueError", "FileNotFoundError")
ERROR = re.compile(r"(gmflow: )?error: ")
LONGEST = 2500  # characters of a message
REPOSITORY = Path(__file__).resolve().parents[2]
CODE = tuple(str(REPOSITORY / name) + os.sep for name in ("gmflow_core", "nodes", "training"))
SAID = re.compile(r"numbers that are not finite|result is not finite")  # as our notices say it
NO_MEMORY = ("can't allocate memory", "not enough memory", "Unable to allocate", "out of memory")


class Outcome(NamedTuple):
    """Verdict of one case, with the reason for it."""

    verdict: str
    message: str
    seconds: float
    megabytes: float


class Refusal(Exception):
    """What a door raises for a refusal that is not an exception, such as a node's validation."""


class Trial(NamedTuple):
    """One piece of work on hostile input.

    Args:
        use: returns the values that must be finite, in lists and dicts of tensors and arrays.
        names: a message must hold one of them, as a whole word: names of the files, or of the
            input.
        command: errors arrive as SystemExit with a line "error: ...".
    """

    use: Callable[[], Any]
    names: tuple[str, ...]
    command: bool


def judge(trials: Sequence[Trial], log: Path, limits: Limits) -> list[Outcome]:
    """Run trials in one child until one of them ends badly, and judge them.

    Args:
        log: file for what the child prints.
        limits: of each trial.

    Returns:
        The outcomes of the first trials, at least of one.
    """
    works = [functools.partial(_work, trial, log) for trial in trials]
    endings = run_child(works, log, limits, lambda answer: answer.get("verdict") in GOOD)
    return [_outcome(ending, limits) for ending in endings]


def _outcome(ending: Ending, limits: Limits) -> Outcome:
    """Judge how a child ended."""
    verdict, message = ending.answer.get("verdict", ""), ending.answer.get("message", "")
    if ending.how == "hang":
        verdict, message = "hang", f"no end within {limits.seconds:.0f} s"
    elif ending.how == "crash":
        verdict, message = "crash", f"ended by signal {ending.signal}"
    elif "harness" in ending.answer:
        verdict, message = "raw", ending.answer["harness"]
    elif ending.megabytes > limits.megabytes:
        verdict, message = "memory", f"grew by {ending.megabytes:.0f} MB; {message}"
    return Outcome(verdict, message, ending.seconds, ending.megabytes)


def _work(trial: Trial, log: Path) -> dict:
    """Call `use`, and return verdict and message."""
    names = trial.names
    try:
        result = trial.use()
    except Refusal as refusal:
        return _judged_text(str(refusal), names)
    except SystemExit as stop:
        return _judged_exit(stop, names, log, trial.command)
    except BaseException as error:
        return _judged_error(error, names)
    bad = not_finite(result)
    if bad and not _said(log):
        return {"verdict": "not finite", "message": f"the result {bad} has values not finite"}
    if bad:
        return {"verdict": "clear", "message": "the result is not finite, and the log says so"}
    return {"verdict": "right", "message": ""}


def _said(log: Path) -> bool:
    """Return whether the child printed or logged our sentence that a result is not finite."""
    sys.stdout.flush()
    sys.stderr.flush()
    return bool(SAID.search(log.read_text(errors="replace")))


def _judged_error(error: BaseException, names: tuple[str, ...]) -> dict:
    """Judge an exception."""
    if _wanted_memory(error):
        return {"verdict": "memory", "message": _last_lines(error)}
    if not _is_ours(error):
        return {"verdict": "raw", "message": _last_lines(error)}
    judged = _judged_text(str(error), names)
    if judged["verdict"] == "raw":
        judged["message"] += "\n" + _last_lines(error)
    return judged


def _is_ours(error: BaseException) -> bool:
    """Return whether an error is one that this project raises on purpose.

    Python and its libraries raise ValueError too: of an error class that is not ours, the last call
    has to be a `raise` in our own code.
    """
    if type(error).__name__ not in OURS:
        return False
    if type(error).__module__ != "builtins":
        return ".files." in type(error).__module__
    calls = traceback.extract_tb(error.__traceback__)
    last = calls[-1] if calls else None
    return last is not None and last.filename.startswith(CODE) and last.line.startswith("raise ")


def _judged_text(text: str, names: tuple[str, ...]) -> dict:
    """Judge a message."""
    wrong = ""
    if printable(text) != text:
        wrong = "cannot be printed"
    elif len(text) > LONGEST:
        wrong = f"has {len(text):,} characters"
    elif not any(_names(name, text) for name in names):
        wrong = f"names none of {', '.join(names[:6])}"
    shown = printable(text, 2000)
    if wrong:
        return {"verdict": "raw", "message": f"the message {wrong}: {shown}"}
    return {"verdict": "clear", "message": shown}


def _names(name: str, text: str) -> bool:
    """Return whether a text holds a name as a whole, not as a part of another word."""
    return bool(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text))


def _judged_exit(stop: SystemExit, names: tuple[str, ...], log: Path, command: bool) -> dict:
    """Judge the end of a command: one line "error: ...", or with the command's name before it."""
    if isinstance(stop.code, str):
        lines = stop.code.splitlines()
    else:
        sys.stderr.flush()
        lines = log.read_text(errors="surrogateescape").splitlines()
        lines = [line for line in lines if ERROR.match(line)] or lines[-3:]
    text = "\n".join(lines)
    if not command or stop.code == 0:
        return {"verdict": "raw", "message": f"SystemExit({stop.code!r}): {printable(text, 2000)}"}
    if len(lines) != 1 or not ERROR.match(text):
        wrong = "the command does not end with one line that begins with error"
        return {"verdict": "raw", "message": f"{wrong}: {printable(text, 2000)}"}
    cause = stop.__cause__ or stop.__context__
    if cause is not None and _wanted_memory(cause):
        return {"verdict": "memory", "message": _last_lines(cause)}
    if type(cause) is ValueError and not _is_ours(cause):
        return {"verdict": "raw", "message": _last_lines(cause)}
    return _judged_text(text, names)


def _wanted_memory(error: BaseException) -> bool:
    """Return whether an allocation failed on the way to this error."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        try:
            text = str(current)
        except Exception:
            text = ""
        if isinstance(current, MemoryError) or any(sign in text for sign in NO_MEMORY):
            return True
        current = current.__cause__ or current.__context__
    return False


def _last_lines(error: BaseException) -> str:
    """Return type, message and the last calls of an error, in a printable text."""
    calls = traceback.extract_tb(error.__traceback__)
    shown = []
    for call in calls[-4:]:
        name = call.filename.removeprefix(f"{REPOSITORY}{os.sep}")
        shown.append(f"{name}:{call.lineno} {call.name}")
    try:
        text = str(error)
    except Exception:
        text = "?"
    return printable(f"{type(error).__name__}: {text[:500]} [{' < '.join(reversed(shown))}]")


def not_finite(value: Any, where: str = "value", depth: int = 0) -> str:
    """Return the place of the first value that is not finite; "" if all are."""
    if isinstance(value, torch.Tensor):
        floats = value.is_floating_point() or value.is_complex()
        return "" if not floats or bool(value.detach().float().isfinite().all()) else where
    if isinstance(value, np.ndarray):
        floats = np.issubdtype(value.dtype, np.floating)
        return "" if not floats or bool(np.isfinite(value.astype(np.float64)).all()) else where
    if isinstance(value, float):
        return "" if np.isfinite(value) else where
    if isinstance(value, torch.nn.Module):
        value = value.state_dict()
    if isinstance(value, dict) and depth < 10:
        parts = [(f"{where}.{name}", part) for name, part in value.items()]
    elif isinstance(value, (list, tuple)) and depth < 10:
        parts = [(f"{where}[{i}]", part) for i, part in enumerate(value)]
    else:
        return ""
    return next((bad for name, part in parts if (bad := not_finite(part, name, depth + 1))), "")
