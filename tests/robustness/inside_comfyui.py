"""Run the cases of the nodes' doors inside ComfyUI's process; `run_cases.py` starts this.

COMFYUI/.venv/bin/python tests/robustness/inside_comfyui.py --cases N --write FILE
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def main() -> int:
    """Run the cases that the command line names, and write them as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--door", action="append", default=[])
    parser.add_argument("--case", default="")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--write", type=Path)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gmflow-comfyui-") as base:
        start_comfyui(Path(base))
        from tests.robustness.cases import Cases
        from tests.robustness.doors import node_files, node_inputs

        doors = [*node_files.doors(), *node_inputs.doors()]
        if chosen.case:
            from tests.robustness.one_case import one_case

            name, _, number = chosen.case.rpartition(":")
            found = [door for door in doors if door.name == name]
            if not found:
                print(f"there is no door {name!r}: {[door.name for door in doors]}")
                return 2
            return one_case(found[0], chosen, int(number))
        doors = [door for door in doors if not chosen.door or door.name in chosen.door]
        with Cases(doors, chosen.seed) as work:
            work.make()
            cases = work.run_all(chosen.cases, chosen.workers)
    chosen.write.write_text(json.dumps(cases))
    return 0


def start_comfyui(base: Path) -> None:
    """Import ComfyUI with folders of its own for the models, and load the extension."""
    import tests.comfyui.installation  # now, as ComfyUI has a package `tests` too

    comfyui = tests.comfyui.installation.COMFYUI
    for name in ("input", "models", "output", "user", "temp"):
        (base / name).mkdir()
    os.chdir(comfyui)
    here = str(Path(__file__).parent)
    sys.path[:] = [str(comfyui), *(path for path in sys.path if path != here)]
    sys.argv = ["main.py", "--cpu", "--disable-api-nodes", "--base-directory", str(base)]
    import comfy.options

    comfy.options.enable_args_parsing()
    import torch

    import nodes

    torch.set_num_threads(1)
    for place in (REPOSITORY / "tests" / "comfyui" / "text_stand_in", REPOSITORY):
        if not asyncio.run(nodes.load_custom_node(str(place))):
            raise RuntimeError(f"{place.name} did not load")


if __name__ == "__main__":
    sys.exit(main())
