"""A seeded part of `python -m tests.robustness --cases`: some hostile cases at every door."""

import functools
import math
import mmap
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest

from gmflow_core.files.json_files import read_json
from tests import forked
from tests.comfyui.installation import COMFYUI, HOW_TO, is_installed
from training.common.processes import command
from training.data.index_check import checked_index


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="the harness counts on Linux")
@pytest.mark.skipif(sys.platform != "linux", reason="the harness counts on Linux")
def test_hostile_files_are_refused_in_words_or_read_right():
    run_cases("--cases", "24", "--without-comfyui")


@pytest.mark.skipif(sys.platform != "linux", reason="the harness counts on Linux")
@pytest.mark.skipif(not is_installed(), reason=f"no ComfyUI in {COMFYUI}: {HOW_TO}")
def test_hostile_inputs_of_nodes_are_refused_in_words_or_read_right():
    run_cases("--cases", "20", "--only-comfyui")


def refuse(folder):
    read_json(folder / "list.json")


def convert(folder):
    with command():
        int("x of list.json")


def grow(folder):
    """Fill 256 MB of fresh pages: a heap may hold freed ones, which the process has already."""
    with mmap.mmap(-1, 2**28) as pages:
        pages[:: mmap.PAGESIZE] = bytes(2**28 // mmap.PAGESIZE)


BAD = {  # what a door does, and what it is: words of a message that fit by chance do not help
    "refused": (refuse, "clear"),
    "Python's own error": (lambda folder: int("list.json"), "raw"),
    "Python's own error in a command": (convert, "raw"),
    "no name": (lambda folder: checked_index([], Path("x"), "f", {}), "raw"),
    "not finite": (lambda folder: [os.write(1, b"nan, not finite"), math.nan], "not finite"),
    "not finite, and said": (
        lambda folder: [os.write(1, b"it holds 3 of 4 numbers that are not finite"), math.nan],
        "clear",
    ),
    "hang": (lambda folder: time.sleep(100), "hang"),
    "memory": (lambda folder: bytearray(2**40), "memory"),
    "grows": (grow, "memory"),
    "crash": (lambda folder: os.kill(os.getpid(), signal.SIGKILL), "crash"),
}


@pytest.mark.skipif(sys.platform != "linux", reason="the harness counts on Linux")
@pytest.mark.parametrize("kind", BAD)
def test_verdicts(tmp_path, kind):
    from tests.robustness.children import Limits
    from tests.robustness.verdicts import Trial, judge

    (tmp_path / "list.json").write_text("[")
    use, verdict = BAD[kind]
    trial = Trial(functools.partial(use, tmp_path), ("list.json",), "command" in kind)
    (outcome,) = judge([trial], tmp_path / "log", Limits(2, 100))
    assert outcome.verdict == verdict, outcome


@pytest.mark.skipif(sys.platform != "linux", reason="the harness counts on Linux")
def test_no_case_at_all_is_a_failure():
    done = command_of_cases("--cases", "5", "--door", "nothing", "--without-comfyui")
    assert done.returncode == 2


def command_of_cases(*options):
    """Run the command, which imports the hub's client after it has switched it off."""
    return forked.run("-m", "tests.robustness", *options, imports=forked.LIBRARY)


def run_cases(*options):
    """Run the command; each case is judged in a child of its own."""
    done = command_of_cases("--workers", "1", *options)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-3000:]}"
    counted = int(re.search(r"^([\d,]+) cases", done.stdout, re.MULTILINE)[1].replace(",", ""))
    assert counted >= 15
