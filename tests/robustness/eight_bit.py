"""Run GM Save Diffusion Model (8-bit) among the jobs, in ComfyUI's process.

    COMFYUI/.venv/bin/python -m tests.robustness.eight_bit COMFYUI MODEL ANSWER PART OPTIONS

COMFYUI is its folder, MODEL a 16-bit file, ANSWER the file for rows and failures as JSON. PART is
kills, disk_full or read_only; OPTIONS are its arguments as JSON. `collect` starts it.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
NAME, PREFIX = "GM Save Diffusion Model (8-bit)", "saved/int8"
SHARE = 15  # its part of all kills is one of so many


def collect(part: str, arguments: argparse.Namespace) -> tuple[list[dict], list[str]]:
    """Start ComfyUI's Python; return the rows of the table, and failures."""
    from tests.comfyui.installation import COMFYUI, comfyui_python, is_installed
    from tests.comfyui.stand_in_files import write_stand_in

    if not is_installed():
        print(f"{NAME}: left out, as there is no ComfyUI in {COMFYUI}")
        return [], []
    options = {"kills": max(4, (getattr(arguments, "kills", 0) or 0) // SHARE)}
    options |= {"seed": arguments.seed, "no_mount": getattr(arguments, "no_mount", False)}
    with tempfile.TemporaryDirectory() as folder:
        model = write_stand_in(Path(folder) / "flux1.safetensors", "base")
        answer = Path(folder) / "answer.json"
        command = [comfyui_python(), "-m", "tests.robustness.eight_bit", COMFYUI, model, answer]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*map(str, command), part, json.dumps(options)],
            cwd=TESTS.parent,
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode or not answer.exists():
            return [], [f"{NAME}: {done.returncode}\n{done.stdout[-500:]}\n{done.stderr[-2000:]}"]
        return tuple(json.loads(answer.read_text()))


def main(comfyui: str, model: str, answer: str, part: str, options: str) -> None:
    """Load ComfyUI and the model, and run the part."""
    # before ComfyUI's folder comes to the path, as it has a package "tests" too
    from . import full_disk, kills
    from .jobs import Job

    job = Job(NAME, "", "TRIAL", once=True, locks=False, function=new_saver(comfyui, model))
    arguments = argparse.Namespace(**json.loads(options))
    parts = (arguments, [job]) if part == "kills" else (arguments, [job], part)
    found = (kills if part == "kills" else full_disk).collect(*parts)
    Path(answer).write_text(json.dumps(found))


def new_saver(comfyui: str, model: str) -> Callable[[list[str]], None]:
    """Return a function that runs the node with a loaded model, and writes below a folder."""
    os.chdir(comfyui)
    sys.path.insert(0, comfyui)
    sys.argv[1:] = ["--cpu", "--disable-api-nodes"]
    import comfy.options

    comfy.options.enable_args_parsing()
    benchmark = runpy.run_path(str(TESTS / "benchmarks" / "eight_bit_inside.py"))
    files = benchmark["extension"]("nodes.comfyui.int8_files")
    nodes = benchmark["extension"]("nodes.eight_bit")
    runpy.run_path(str(TESTS / "comfyui" / "text_stand_in" / "__init__.py"))
    import folder_paths
    import torch

    with torch.inference_mode():
        loaded: Any = files.load_8bit(model)

    def save(arguments: list[str]) -> None:
        folder_paths.set_output_directory(arguments[0])
        try:
            with torch.inference_mode():
                nodes.GMFlowSaveDiffusionModel8bit.execute(loaded, PREFIX)
        except (ValueError, OSError) as error:
            raise SystemExit(f"error: {error}") from error

    return save


if __name__ == "__main__":
    main(*sys.argv[1:])
