"""A seeded part of `python -m tests.robustness --cases`: some hostile cases at every door."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.comfyui.installation import COMFYUI, HOW_TO, is_installed

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="the harness counts on Linux")
@pytest.mark.skipif(sys.platform != "linux", reason="the harness counts on Linux")
def test_hostile_files_are_refused_in_words_or_read_right():
    run_cases("--cases", "250", "--without-comfyui")


@pytest.mark.skipif(sys.platform != "linux", reason="the harness counts on Linux")
@pytest.mark.skipif(not is_installed(), reason=f"no ComfyUI in {COMFYUI}: {HOW_TO}")
def test_hostile_inputs_of_nodes_are_refused_in_words_or_read_right():
    run_cases("--cases", "80", "--only-comfyui")


def run_cases(*options):
    """Run the command; each case is judged in a child of its own."""
    command = [sys.executable, "-m", "tests.robustness", "--workers", "1", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-3000:]}"
    counted = int(re.search(r"^([\d,]+) cases", done.stdout, re.MULTILINE)[1].replace(",", ""))
    assert counted >= 50
