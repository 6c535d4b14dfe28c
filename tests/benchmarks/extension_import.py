"""Measure what the extension adds to ComfyUI's start: milliseconds, and newly imported modules.

    python -m tests.benchmarks.extension_import [REPEATS]

Looks for ComfyUI where the tests do. Every repeat is a new process. Writes no file.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess

from tests.comfyui.installation import COMFYUI, REPOSITORY, comfyui_python

HEAVY = (
    "accelerate",
    "bitsandbytes",
    "diffusers",
    "huggingface_hub",
    "matplotlib",
    "tensorboard",
    "transformers",
)
SCRIPT = """
import asyncio, json, pathlib, sys, tempfile, time
start = time.perf_counter()
root, repository = sys.argv[1:3]
sys.path.insert(0, root)
sys.argv = [sys.argv[0], "--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import comfy.samplers, comfy.sd, comfy_api.latest, latent_preview, nodes
empty = pathlib.Path(tempfile.mkdtemp()) / "empty"
empty.mkdir()
(empty / "__init__.py").write_text("NODE_CLASS_MAPPINGS = {}")
(empty / "pyproject.toml").write_text("[project]\\nname = 'empty'\\nversion = '1'")
asyncio.run(nodes.load_custom_node(str(empty)))  # ComfyUI's own imports for the first extension
before, ready = set(sys.modules), time.perf_counter()
loaded = asyncio.run(nodes.load_custom_node(repository))
done = time.perf_counter()
new = sorted(name for name in set(sys.modules) - before if not name.startswith((repository, "/")))
found = {"loaded": loaded, "comfyui": ready - start, "extension": done - ready, "modules": new}
print(json.dumps(found))
"""


def measure() -> dict:
    """Import the extension in a new process.

    Returns:
        loaded; seconds as `comfyui` and `extension`; `modules` that came with the extension.
    """
    command = [comfyui_python(), "-c", SCRIPT, str(COMFYUI), str(REPOSITORY)]
    done = subprocess.run(
        command,
        cwd=COMFYUI,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Print the median of several imports, their spread, and the modules."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("repeats", type=int, nargs="?", default=5, help="new processes (5)")
    repeats = parser.parse_args().repeats
    runs = [measure() for _ in range(repeats)]
    extension, comfyui = (
        statistics.median(run[key] for run in runs) for key in ("extension", "comfyui")
    )
    print(
        f"extension {1000 * extension:.0f} ms, {extension / comfyui:.1%} of the {comfyui:.1f} s "
        "of ComfyUI's own imports"
    )
    times = sorted(1000 * run["extension"] for run in runs)
    print(f"spread {times[0]:.0f} to {times[-1]:.0f} ms, {repeats} runs")
    print("modules that come with it:", ", ".join(runs[0]["modules"]) or "none")


if __name__ == "__main__":
    main()
