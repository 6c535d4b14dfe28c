"""Measure the hot paths against naive forms, other implementations and the machine's limits.

    python -m tests.benchmarks                                  # all, 5 to 10 minutes on one thread
    python -m tests.benchmarks --only rollout loss --threads 4  # some of the rows
    python -m tests.benchmarks --quick --out /tmp/quick         # tiny sizes: does it all run?
    GMFLOW_PATH=... LAKONLAB_PATH=... PIFLOW_PATH=... python -m tests.benchmarks    # see peers.py

Every row runs our form and the naive one (the papers' formulas written straight, naive.py) on the
same tensors, in turns. It reports the median ratio of paired repeats with its quartiles; the floor,
from memory bandwidth and matmul rate measured in the same run; the peak of extra memory; and the
error in float32 against float64. Both CPU and GPU are measured if there are both. Rows that need a
GPU or a ComfyUI say "not run" where there is none.

Writes benchmarks.json after every row, then benchmarks.png and benchmarks_growth.png, and prints a
markdown table. glibc's allocator is told to keep freed memory, which spares the naive forms page
faults; --stock-malloc leaves it alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import traceback
import warnings
from pathlib import Path

import torch

from training.common.devices import keep_freed_memory

from . import loops, report, rows
from .measure import REPOSITORY, Bench, machine

ROWS = {**rows.ROWS, **loops.ROWS}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS)
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of the CPU (1)")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="measure one of them (all that there are)"
    )
    parser.add_argument(
        "--no-compile", action="store_true", help="leave out the forms that torch.compile makes"
    )
    parser.add_argument(
        "--stock-malloc", action="store_true", help="leave the C library's allocator as it is"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes and few repeats")
    parser.add_argument(
        "--out", type=Path, default=REPOSITORY / "docs" / "results", help="folder for the results"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run the rows that are asked for, write the results, print the table."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # for child processes
    warnings.filterwarnings("ignore", category=FutureWarning)  # raised by the peers' code
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    if not options.stock_malloc:
        keep_freed_memory()
    options.out.mkdir(parents=True, exist_ok=True)
    gpu = torch.cuda.is_available()
    devices = [options.device] if options.device else ["cpu", *(["cuda"] if gpu else [])]
    if options.device == "cuda" and not gpu:
        raise SystemExit("error: --device cuda, but torch finds no CUDA device")
    command = command_of(sys.argv[1:] if arguments is None else arguments)
    results: dict = {"command": command, "machines": {}, "rates": {}, "rows": []}
    if not gpu:
        results["cuda"] = "not run: no CUDA device"
    failed = stopped = False
    try:
        for device in devices:
            bench = Bench(device, options.quick, not options.no_compile)
            results["machines"][device], results["rates"][device] = machine(device), bench.rates
            print(about(results, device), flush=True)
            for name in options.only:
                print(f"\n[{device}] {name}: {ROWS[name].__doc__.splitlines()[0]}", flush=True)
                try:
                    for line in ROWS[name](bench):
                        results["rows"].append(line)
                        write(results, options.out)
                        if "axis" not in line:
                            print(report.text(line), flush=True)
                except Exception:
                    failed = True
                    traceback.print_exc()
    except KeyboardInterrupt:
        stopped = True
        print("\nstopped; the rows measured so far are kept")
    write(results, options.out)
    written = report.plots(results, options.out)
    print(f"\n{report.markdown(results)}\n")
    if not gpu:
        print("The GPU's rows: not run, as there is no CUDA device.")
    print("wrote", *(options.out / "benchmarks.json", *written))
    if failed:
        raise SystemExit("some rows failed, see above")
    if stopped:
        raise SystemExit(130)


def command_of(arguments: list[str], module: str = "tests.benchmarks") -> str:
    """Return the command as the results record it, without --out, which names a local place."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--out")
    _, others = parser.parse_known_args(arguments)
    return shlex.join(["python", "-m", module, *others])


def about(results: dict, device: str) -> str:
    """Return the machine and its limits as two lines of text."""
    facts, rates = results["machines"][device], results["rates"][device]
    bandwidth, products = rates["bytes_per_second"] / 1e9, rates["flops_per_second"] / 1e9
    return (
        f"{', '.join(f'{key} {value}' for key, value in facts.items())}\n"
        f"{bandwidth:.1f} GB/s, {products:.0f} GFLOP/s (float32), "
        f"{report.duration(rates['seconds_of_a_call'])} a call at least"
    )


def write(results: dict, folder: Path) -> None:
    """Write all results atomically: a run that is killed leaves a whole file."""
    path = folder / "benchmarks.json"
    new = path.with_suffix(".tmp")
    new.write_text(json.dumps(results, indent=1) + "\n")
    new.replace(path)


if __name__ == "__main__":
    main()
