"""Do in at most eight minutes, on one NVIDIA GPU, what the pages call "not run on a GPU".

    python -m tests.gpu                              # all parts; writes docs/results/gpu.json
    python -m tests.gpu --only forms waits           # some parts; the others stay in the file
    python -m tests.gpu --device cpu                 # the same parts at tiny sizes; writes nothing

Each part prints a line for every case, with the time since the start, and what was measured; the
file is written after every part. The first thing that is wrong ends the command with status 1 and a
line that names the part, what was expected and what was found. A part whose package or memory is
missing is "not run", and the others go on.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

PARTS = {  # name -> module here, what it does
    "forms": ("forms", "Triton's kernel and compiled forms against float64"),
    "policy": ("sampling", "solvers on the device against the CPU, from the same seeds"),
    "commands": ("sampling", "gmflow sample and training.evaluate, in bf16 on a GPU"),
    "solvers": ("sampling", "GM-ODE and GM-SDE of GM-DiT XL beside Euler"),
    "training": ("training", "training steps of XL in bf16, with 8-bit and 32-bit AdamW"),
    "distillation": ("training", "distillation of the digits, some steps"),
    "processes": ("training", "DDP and FSDP 2 in one process against a plain run"),
    "int8": ("layers", "8-bit layers at FLUX.1's sizes beside bf16 and fp8"),
    "waits": ("waits", "waits for the device in steps of solvers and of training"),
    "benchmarks": ("rows", "a short subset of tests.benchmarks"),
}
OUT = Path(__file__).resolve().parents[2] / "docs" / "results" / "gpu.json"
LIMIT, TOTAL = 150.0, 480.0  # seconds of a part, and of all parts together
DAY = 86400.0
GRACE = 20.0  # seconds after which a part that hangs ends the process


class LateError(BaseException):
    """A part takes too long; no `Exception`, so that no machine form takes it for its own."""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        SystemExit: an argument is unknown or invalid, or asks for the help text.
    """
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    about = "; ".join(f"{name}: {said}" for name, (_, said) in PARTS.items())
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=about
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny sizes (default cuda)"
    )
    parser.add_argument(
        "--time-limit",
        type=float,
        metavar="SECONDS",
        help="a part that takes longer is wrong (default 150, all parts 480 together; none on a "
        "CPU)",
    )
    parser.add_argument(
        "--out", type=Path, help="file for the results (docs/results/gpu.json; on a CPU none)"
    )
    options = parser.parse_args(arguments)
    if options.time_limit is None:
        options.time_limit = LIMIT if options.device == "cuda" else DAY
    if not 0 < options.time_limit <= DAY:  # NaN is not either
        raise SystemExit(
            f"error: --time-limit is {options.time_limit:g}; it must be a number of seconds above "
            f"0, at most {DAY:.0f}"
        )
    return options


def prepare(device: str) -> None:
    """Set what has to be set before torch and Triton are imported, or CUDA is started.

    Raises:
        SystemExit: there is no CUDA device, and one is asked for.
    """
    os.environ.pop("GMFLOW_METHOD", None)  # the forms that are chosen by themselves
    os.environ.pop("TRITON_INTERPRET", None)
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: torch finds no CUDA device; --device cpu runs tiny sizes")


@contextlib.contextmanager
def time_limit(name: str, seconds: float) -> Iterator[None]:
    """End a part after `seconds`; where it hangs in a library, end the process soon after.

    Raises:
        LateError: the part took longer.
    """

    def late(number: int, frame: FrameType | None) -> None:
        raise LateError(f"time of {name}: expected at most {seconds:.0f} s, found more")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(seconds + GRACE, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()


def run_part(name: str, run: Any, started: float, own: float, left: float) -> dict[str, Any]:
    """Run a part; return its state ("right", "not run: ..." or "wrong: ..."), time and figures.

    Args:
        started: when the command started, by time.monotonic().
        own: seconds that the part may take.
        left: seconds that all parts have left.
    """
    from .run import NotRunError, WrongError, said

    part: dict[str, Any] = {"about": PARTS[name][1], "state": "right", "cases": {}}
    begun, limit = time.monotonic(), max(1.0, min(own, left))
    run.deadline = begun + limit
    try:
        with time_limit(name, limit):
            cases = getattr(importlib.import_module(f"tests.gpu.{PARTS[name][0]}"), name)
            for case, figures in cases(run):
                part["cases"][case] = figures
                passed = time.monotonic() - started
                print(f"[{passed:5.0f} s] {name}: {case}: {said(figures)}", flush=True)
    except NotRunError as error:
        part["state"] = f"not run: {error}"
    except WrongError as error:
        part["state"] = f"wrong: {error}"
    except LateError as error:
        over = f"not run to its end: the {TOTAL:.0f} s of all parts are over"
        part["state"] = over if left < own else f"wrong: {error}"
    except Exception as error:
        traceback.print_exc()
        what = str(error).splitlines()[0] if str(error) else "without a word"
        part["state"] = f"wrong: expected to run, found {type(error).__name__}: {what}"
    part["seconds"] = time.monotonic() - begun
    run.release()
    return part


def kept(path: Path | None, names: list[str]) -> dict[str, Any]:
    """Return the parts of an earlier run's file that this one does not run again.

    Raises:
        SystemExit: the file cannot be written, or holds something else.
    """
    from gmflow_core.files.atomic import check_target, create_folder
    from gmflow_core.files.errors import WriteError, printable, reading, reason

    if path is None:
        return {}
    try:
        check_target(path)
        create_folder(path.parent)
        with tempfile.TemporaryDirectory(prefix=".gmflow-gpu-", dir=path.parent):
            pass
    except WriteError as error:
        raise SystemExit(f"error: {printable(str(error))} (--out)") from error
    except OSError as error:
        said = printable(f"{path} cannot be written ({reason(error)}); give another --out")
        raise SystemExit(f"error: {said}") from error
    if not path.exists():
        return {}
    try:
        with reading(path, "move it, or give another --out", "holds no results of this command"):
            earlier = json.loads(path.read_text())
            own = {key: earlier["machine"][key] for key in ("device", "date", "revision")}
            return {
                name: {"from": own, **part}
                for name, part in earlier["parts"].items()
                if name in PARTS and name not in names
            }
    except ValueError as error:
        raise SystemExit(f"error: {printable(str(error))}") from error


def main(arguments: list[str] | None = None) -> None:
    """Run the parts that are asked for, in their order; stop at the first that is wrong."""
    options = parse(arguments)
    prepare(options.device)
    from tests.benchmarks.__main__ import command_of

    from .run import NOT_COVERED, Run, facts, write

    path = options.out or (OUT if options.device == "cuda" else None)
    command = command_of(sys.argv[1:] if arguments is None else arguments, "tests.gpu")
    results: dict[str, Any] = {"command": command, "machine": facts(options.device)}
    results |= {"parts": kept(path, options.only), "not covered": list(NOT_COVERED)}
    print(", ".join(f"{key} {value}" for key, value in results["machine"].items()), flush=True)
    names = [name for name in PARTS if name in options.only]
    started, wrong = time.monotonic(), ""
    with tempfile.TemporaryDirectory(prefix="gmflow-gpu-") as folder:
        run = Run(options.device, Path(folder))
        for number, name in enumerate(names, 1):
            print(f"\n{number}/{len(names)} {name}: {PARTS[name][1]}", flush=True)
            left = (TOTAL if options.device == "cuda" else DAY) - (time.monotonic() - started)
            part = run_part(name, run, started, options.time_limit, left)
            results["parts"][name] = part
            write(results, path)
            print(f"{name}: {part['state']} ({part['seconds']:.0f} s)", flush=True)
            if part["state"].startswith("wrong"):
                wrong = f"the part {name} is {part['state']}"
                break
    print(f"\n{time.monotonic() - started:.0f} s in all", *([f"; wrote {path}"] if path else []))
    print("not covered:", *NOT_COVERED, sep="\n- ")
    if wrong:
        raise SystemExit(wrong)


if __name__ == "__main__":
    main()
