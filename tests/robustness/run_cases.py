"""Run --cases: in this Python the library's and the trainers' doors, in ComfyUI's the nodes'."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from tests.comfyui.installation import COMFYUI, HOW_TO, comfyui_python, is_installed

from .cases import Case, Cases
from .doors import data, models, resumed, sources
from .one_case import one_case
from .table import count, failures_of, text_of, write_table
from .verdicts import Outcome

DOORS = [*models.DOORS, *sources.DOORS, *data.DOORS, *resumed.DOORS]
NODES_SHARE = 0.3  # of the cases, for the doors in ComfyUI
MOST_SHOWN = 60  # failures in full


def run(chosen: argparse.Namespace) -> int:
    """Run the cases that the command line names, and return the exit status."""
    torch.set_num_threads(1)
    started = time.monotonic()
    if chosen.list:
        print("\n".join(door.name for door in DOORS))
        return 0
    if chosen.case:
        return again(chosen)
    here = [door for door in DOORS if not chosen.door or door.name in chosen.door]
    here = [] if chosen.only_comfyui else here
    nodes = is_installed() and (not chosen.door or len(here) < len(chosen.door))
    nodes = nodes and not chosen.without_comfyui
    share = 1 - NODES_SHARE if nodes and here else 1
    cases: list[Case] = []
    if here:
        with Cases(here, chosen.seed) as work:
            work.make()
            cases += work.run_all(round(chosen.cases * share), chosen.workers)
    if nodes:
        cases += in_comfyui(chosen, round(chosen.cases * (NODES_SHARE if here else 1)))
    elif not chosen.door and not chosen.without_comfyui:
        print(f"the nodes' doors are left out: no ComfyUI in {COMFYUI}; {HOW_TO}")
    return show(cases, chosen, time.monotonic() - started)


def show(cases: list[Case], chosen: argparse.Namespace, seconds: float) -> int:
    """Print the table and the failures, write the table, and return the exit status."""
    if not cases:
        print(f"no case was run: there is no door {', '.join(chosen.door)}; --list names them")
        return 2
    rows = count(cases)
    print(text_of(rows))
    bad = [case for case in cases if not case.good]
    print(f"{len(cases):,} cases in {seconds:.0f} s, seed {chosen.seed}; {len(bad)} failures")
    if bad:
        print(failures_of(cases, chosen.seed, MOST_SHOWN))
    if chosen.out is not None:
        command = f"python -m tests.robustness --cases {chosen.cases} --seed {chosen.seed}"
        write_table(chosen.out / "robustness.json", rows, command, chosen.seed, seconds)
    return int(bool(bad))


def again(chosen: argparse.Namespace) -> int:
    """Run one case again, and print how it ends, with the traceback of an error."""
    name, _, number = chosen.case.rpartition(":")
    found = [door for door in DOORS if door.name == name]
    if not found:
        if is_installed():
            return subprocess.call(_inside(chosen))  # a door of the nodes
        print(f"there is no door {name!r}; --list names them", file=sys.stderr)
        return 2
    return one_case(found[0], chosen, int(number))


def in_comfyui(chosen: argparse.Namespace, number: int) -> list[Case]:
    """Run the cases of the nodes' doors with ComfyUI's Python, inside its modules."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "cases.json"
        command = [*_inside(chosen), "--cases", str(number), "--write", str(out)]
        log = Path(folder) / "log"
        with log.open("wb") as file:
            status = subprocess.call(command, stdout=file, stderr=subprocess.STDOUT)
        if not out.exists():
            lines = log.read_text(errors="replace").splitlines()[-30:]
            raise RuntimeError("\n".join(["the cases in ComfyUI broke off:", str(status), *lines]))
        found = json.loads(out.read_text())
    return [Case(*case[:3], Outcome(*case[3])) for case in found]


def _inside(chosen: argparse.Namespace) -> list[str]:
    """Return the command that runs cases inside ComfyUI."""
    repository = Path(__file__).resolve().parents[2]
    os.environ["PYTHONPATH"] = str(repository)
    command = [comfyui_python(), str(repository / "tests" / "robustness" / "inside_comfyui.py")]
    command += ["--seed", str(chosen.seed), "--workers", str(chosen.workers)]
    command += [part for door in chosen.door for part in ("--door", door)]
    command += ["--case", chosen.case] if chosen.case else []
    return command + (["--keep", str(chosen.keep)] if chosen.keep else [])
