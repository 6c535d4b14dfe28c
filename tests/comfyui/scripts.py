"""Run a script inside ComfyUI's process, and read what it found (`inside.run_cases`)."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

from .installation import COMFYUI, comfyui_python


def results_of(script: Path, work: Path, unwanted: re.Pattern[str] | None = None) -> dict[str, Any]:
    """Return the results of a script's cases by name, from one process.

    Args:
        work: a folder of its own.
        unwanted: what its log must not say.
    """
    done = subprocess.run(
        [comfyui_python(), str(script), str(COMFYUI), str(work)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert not (unwanted and unwanted.search(done.stderr)), done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def of(found: dict[str, Any], case: str) -> dict[str, Any]:
    """Return the results of one case; fail with its traceback if it has none."""
    assert isinstance(found[case], dict), found[case]
    return found[case]
