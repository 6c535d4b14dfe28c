"""Run scripts inside ComfyUI's process, and read what they found (`inside.run_cases`).

The imports of ComfyUI take some 7 s of a core, so one process makes them for the scripts of a
pytest worker, and each script runs in a fork of it (`fork_server.py`).
"""

from __future__ import annotations

import atexit
import json
import os
import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import IO, Any

from .installation import COMFYUI, comfyui_python

SERVER = Path(__file__).with_name("fork_server.py")


def results_of(
    script: Path,
    work: Path,
    unwanted: re.Pattern[str] | None = None,
    options: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Return the results of a script's cases by name, from one process.

    Args:
        work: a folder of its own.
        unwanted: what its log must not say.
        options: as of `run_inside`.
    """
    found, log = run_inside(script, work, options=options)
    assert not (unwanted and unwanted.search(log)), log[-4000:]
    return json.loads(found.splitlines()[-1])


def of(found: dict[str, Any], case: str) -> dict[str, Any]:
    """Return the results of one case; fail with its traceback if it has none."""
    assert isinstance(found[case], dict), found[case]
    return found[case]


def run_inside(script: Path, *arguments: object, options: tuple[str, ...] = ()) -> tuple[str, str]:
    """Run a script with ComfyUI's folder and further arguments; return what it printed, its log.

    It fails with the end of the log if the script does.

    Args:
        options: further ones of ComfyUI's command line; scripts with the same share a process.
    """
    process, own_log = _process(options)
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "out", Path(folder) / "log"
        given = [str(COMFYUI), *map(str, arguments)]
        print(json.dumps([str(script), given, str(out), str(log)]), file=process.stdin, flush=True)
        status = process.stdout.readline().strip()
        if not status:
            own_log.seek(0)
            raise RuntimeError(f"ComfyUI's process has ended: {own_log.read()[-4000:]}")
        said = log.read_text("utf-8", "replace")
        assert status == "0", said[-4000:]
        return out.read_text("utf-8"), said


@cache
def _process(options: tuple[str, ...]) -> tuple[subprocess.Popen[str], IO[str]]:
    """Start the process that scripts are forks of; return it and its log."""
    log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  as long as the process
    process = subprocess.Popen(
        [comfyui_python(), str(SERVER), str(COMFYUI), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
    )
    atexit.register(process.communicate)  # its input ends, and so does it
    return process, log
