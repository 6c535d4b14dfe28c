"""Set up the processes that run tests: threads, workers, the Triton interpreter, a word on ComfyUI.

Without file names pytest shares the tests out among workers, one for each core. `-n 0` turns that
off, `-n 2` turns it on for single files. Each worker starts a ComfyUI server of its own; the tests
of a file in tests/comfyui stay on one worker, as they share models and pages.
"""

from __future__ import annotations

import os
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: one thread for each worker
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from xdist.scheduler import LoadScopeScheduling

from tests.comfyui.installation import comfyui_version

MOST_WORKERS = 4  # each takes some 1.5 GB with the processes that it starts
OUTCOMES = ("passed", "failed", "error", "skipped")

if not torch.cuda.is_available():
    # Triton reads this once, when it is first imported: without a GPU its kernels are interpreted
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return the number of workers for `-n auto`: 0 if files are named or there is one core."""
    if config.args_source is pytest.Config.ArgsSource.ARGS:
        return 0
    cores = os.cpu_count() or 1
    return min(cores, MOST_WORKERS) if cores > 1 else 0


class FilesOfServers(LoadScopeScheduling):
    """A schedule of single tests, but for those of a file in tests/comfyui, which stay together."""

    def _split_scope(self, nodeid: str) -> str:
        return nodeid.split("::")[0] if nodeid.startswith("tests/comfyui/") else nodeid


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> FilesOfServers | None:
    """Return the schedule; None for pytest-xdist's own if `--dist` asks for another one."""
    return FilesOfServers(config, log) if config.getvalue("dist") == "load" else None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say whether the tests in tests/comfyui ran, and against which ComfyUI."""
    found = {
        outcome: {report.nodeid for report in terminalreporter.stats.get(outcome, [])}
        for outcome in OUTCOMES
    }
    numbers = {
        outcome: sum("tests/comfyui/" in nodeid for nodeid in nodeids)
        for outcome, nodeids in found.items()
    }
    counts = ", ".join(f"{number} {outcome}" for outcome, number in numbers.items() if number)
    if not counts:
        return
    version = comfyui_version()
    ran = f"ran against ComfyUI {version}" if version else "did not run, as there is no ComfyUI"
    terminalreporter.write_line(f"ComfyUI tests {ran}: {counts}")
