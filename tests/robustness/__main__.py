"""Test robustness, from the repository's root; an exit status of 1 says that a promise broke:

    python -m tests.robustness --cases 10000        # hostile files and inputs at every door
    python -m tests.robustness --cases 500 --door "checkpoint GMDiT"
    python -m tests.robustness --case "pickles:17"  # one case again, with all that it prints
    python -m tests.robustness --kills 200          # SIGKILL at random moments of every command
    python -m tests.robustness --disk-full --read-only --two-starts
    python -m tests.robustness --soak 300 --comfyui # mixed workflows in one server, and its memory
    python -m tests.robustness --prompts 2000       # hostile inputs through POST /prompt

With --out FOLDER the tables are also written there as JSON (docs/results holds the last ones).
The doors of the nodes need a ComfyUI (see the README); without one a line says that they are left
out. Linux only: children are forked, and judged by what the kernel counts.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # before torch: threads do not survive a fork
    os.environ.setdefault(_name, "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

from . import runs  # noqa: E402


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        "python -m tests.robustness",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cases", type=int, default=0, help="number of hostile cases")
    parser.add_argument("--door", action="append", default=[], help="only this door; repeatable")
    parser.add_argument("--case", default="", help="DOOR:NUMBER, one case again")
    parser.add_argument("--keep", type=Path, help="with --case: folder for the changed files")
    parser.add_argument("--without-comfyui", action="store_true", help="of --cases: no nodes")
    parser.add_argument("--only-comfyui", action="store_true", help="of --cases: only the nodes")
    parser.add_argument("--list", action="store_true", help="list the doors")
    runs.add_arguments(parser)
    parser.add_argument("--seed", type=int, default=0, help="seed of everything (default 0)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="of --cases")
    parser.add_argument("--out", type=Path, help="folder for the tables as JSON")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line names, and return the exit status."""
    chosen = parse(arguments)
    statuses = []
    if chosen.cases or chosen.case or chosen.list:
        from . import run_cases

        statuses.append(run_cases.run(chosen))
    others = ("kills", "disk_full", "read_only", "two_starts", "soak", "prompts")
    if any(getattr(chosen, name) for name in others):
        statuses.append(runs.run(chosen))
    if not statuses:
        print("nothing was asked for; see --help", file=sys.stderr)
        return 2
    return max(statuses)


if __name__ == "__main__":
    sys.exit(main())
