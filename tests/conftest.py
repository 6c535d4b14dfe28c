"""Set up the processes that run tests: threads, workers, the Triton interpreter, a word on ComfyUI.

Without file names pytest shares the tests out among workers, one more than cores. `-n 0` turns that
off, `-n 2` turns it on for single files. What tests share stays on one worker with them: ComfyUI's
server and its models; ComfyUI's page and the server behind it; the process of ComfyUI that scripts
run in; the process that others are forks of; imports of diffusers and transformers, with tiny
encoders; the start of torch.compile. What takes longest begins first, so that all end together.
"""

from __future__ import annotations

import os
import random
import re
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: one thread for each worker
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from xdist.scheduler import LoadScopeScheduling

from tests.comfyui.installation import OF_ONE_PROCESS, OF_THE_PAGE, comfyui_version
from tests.forked import OF_FORKS

MOST_WORKERS = 4  # each takes some 1.5 GB with the processes that it starts
PAGE, INSIDE, SERVER = "the page", "inside ComfyUI", "the server"
FORKS, ENCODERS, COMPILED = "forks", "encoders", "compiled"
ALONE = "tests/comfyui/test_import.py", "tests/comfyui/test_message_texts.py"  # need no server
SECONDS = {  # of a core, measured: of what stays together, or of a single test
    SERVER: 195,
    INSIDE: 135,
    PAGE: 150,
    ENCODERS: 45,
    FORKS: 115,
    COMPILED: 75,
    "test_parts_run_at_tiny_sizes_and_write_their_figures": 13,
    "test_import": 12,
}
OF_ENCODERS = re.compile(
    r"tests/(core/test_(diffusers_pipelines|vae)"
    r"|training/test_(encode_tokens|encoded_images|prepare|rae))\.py"
)
OF_COMPILING = re.compile(
    r"tests/\w+/test_\w+\.py::test_(a_compiled|compiled|it_compiles|the_loss_can)_"
)
SCOPES = (
    (OF_THE_PAGE, PAGE),
    (OF_ONE_PROCESS, INSIDE),
    (OF_FORKS, FORKS),
    (OF_ENCODERS, ENCODERS),
    (OF_COMPILING, COMPILED),
)
OUTCOMES = ("passed", "failed", "error", "skipped")

if not torch.cuda.is_available():
    # Triton reads this once, when it is first imported: without a GPU its kernels are interpreted
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Begin every test with the same random numbers, whichever ran before it on the worker."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return the number of workers for `-n auto`: 0 if files are named or there is one core.

    It is one more than the cores, as a worker often waits for its server or its page.
    """
    if config.args_source is pytest.Config.ArgsSource.ARGS:
        return 0
    cores = os.cpu_count() or 1
    return min(cores + 1, MOST_WORKERS) if cores > 1 else 0


def scope_of(nodeid: str) -> str:
    """Return what stays on one worker with a test: what it shares, its file, or itself alone."""
    for tests, scope in SCOPES:
        if tests.match(nodeid):
            return scope
    if nodeid.startswith("tests/comfyui/") and not nodeid.startswith(ALONE):
        return SERVER
    return nodeid.split("::")[0] if nodeid.startswith(ALONE) else nodeid


def seconds_of(scope: str) -> float:
    """Return about how long the tests of a scope take; 0 for most single tests."""
    name = scope.split("::")[-1].split("[")[0].removesuffix(".py").split("/")[-1]
    return SECONDS.get(name, 0)


class LongestFirst(LoadScopeScheduling):
    """A schedule of single tests, but for those that share a server, its page or slow imports."""

    def _split_scope(self, nodeid: str) -> str:
        return scope_of(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LongestFirst | None:
    """Return the schedule; None for pytest-xdist's own if `--dist` asks for another one."""
    if config.getvalue("dist") != "load":
        return None
    config.option.loadscopereorder = False  # the order is that of the workers' collections
    return LongestFirst(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a worker, put the tests that take longest first."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: -seconds_of(scope_of(item.nodeid)))


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
