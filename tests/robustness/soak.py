"""Run mixed prompts on one ComfyUI server, with interrupts, and watch its memory.

    python -m tests.robustness --soak 300 --comfyui

A round holds every workflow once, in a random order, with the models that it loads. Some prompts
are interrupted; after some, /free unloads the models. The memory is read after each prompt. Its
slope, in MB a prompt, is that of a line through the readings at the ends of the rounds, where the
same work has been done and the models are unloaded; the first third warms up.
"""

from __future__ import annotations

import tempfile
import time
from argparse import Namespace
from collections import Counter
from pathlib import Path

import numpy as np

from tests.comfyui.client import Comfy
from tests.comfyui.installation import COMFYUI, is_installed
from tests.comfyui.server import running

from .graphs import every_prompt, reseeded, serve
from .place import finish, print_table, rng_of, write_results

MOST = 0.05  # MB a prompt
WARM_UP = 1 / 3  # of the rounds
FREE = {"unload_models": True, "free_memory": True}
INTERRUPTED, FREED = 0.15, 0.1  # shares of prompts


def run(arguments: Namespace) -> int:
    """Run the prompts, print what was found, and return the exit status."""
    if not is_installed():
        print(f"soak: left out, as there is no ComfyUI in {COMFYUI}")
        return 0
    with tempfile.TemporaryDirectory(prefix="gmflow_soak_") as base, running(Path(base)) as comfy:
        serve(comfy)
        soak = Soak(comfy, arguments.seed)
        deadline = time.monotonic() + arguments.soak
        while time.monotonic() < deadline:
            soak.round()
    return soak.report(arguments)


class Soak:
    """A server under load.

    Attributes:
        memory: (prompts so far, RSS in MB, its anonymous part in MB) at the ends of rounds.
    """

    def __init__(self, comfy: Comfy, seed: int):
        self.comfy, self.rng = comfy, rng_of(seed, "soak")
        self.prompts, self.counts = every_prompt(), Counter()
        self.failures: list[str] = []
        self.memory: list[tuple[int, float, float]] = []
        self.started = time.monotonic()

    def round(self) -> None:
        """Run every workflow once, unload all models, and read the memory."""
        for name in self.rng.sample(list(self.prompts), len(self.prompts)):
            self.run(name)
            if self.rng.random() < FREED:
                self.free()
        self.free()
        rss, anonymous = memory_of(self.comfy)
        self.memory.append((self.counts["prompts"], rss, anonymous))
        print(f"{self.counts['prompts']} prompts, {rss:.1f} MB, {anonymous:.1f} MB anonymous")

    def run(self, name: str) -> None:
        """Run a workflow with a new seed; interrupt some at a random moment."""
        prompt = reseeded(self.prompts[name], self.rng.randrange(2**32))
        self.counts["prompts"] += 1
        try:
            number = self.comfy.submit(prompt)
            interrupted = self.rng.random() < INTERRUPTED
            if interrupted:
                time.sleep(self.rng.uniform(0, 1))
                self.comfy.interrupt()
            result = self.comfy.wait(number, expect_error=True)
        except (AssertionError, OSError, RuntimeError) as error:
            self.failures.append(f"{name}: {error}")
            return
        self.counts[result.status] += 1
        if result.status not in ("success", "interrupted") or result.errors:
            self.failures.append(f"{name}: {result.status} {result.errors}")
        elif result.status == "interrupted" and not interrupted:
            self.failures.append(f"{name}: interrupted by nobody")

    def free(self) -> None:
        """Unload all models, and wait for it: the server does it between prompts."""
        self.counts["freed"] += 1
        self.comfy.post("/free", FREE)
        time.sleep(0.5)

    def report(self, arguments: Namespace) -> int:
        """Print and write what was found, and return the exit status."""
        kept = self.memory[round(WARM_UP * len(self.memory)) :]
        row = {"seconds": round(time.monotonic() - self.started), **self.counts}
        row |= {"failures": len(self.failures), "rounds": len(self.memory)}
        failures = list(self.failures)
        if len(kept) < 3:
            failures.append(f"{len(self.memory)} rounds are too few for a slope; give more seconds")
        else:
            for column, name in ((1, "RSS"), (2, "anonymous")):
                slope, error = slope_of([(line[0], line[column]) for line in kept])
                row[f"{name}, MB a prompt"] = round(slope, 4)
                row[f"{name}, standard error"] = round(error, 4)
                if slope >= MOST:
                    failures.append(f"{name} grows by {slope:.3f} MB a prompt")
            row["MB at the end"] = round(kept[-1][1])
        print_table(f"soak, seed {arguments.seed}", [row])
        write_results(arguments, "soak", rows=[row], memory=self.memory, failures=failures)
        return finish(failures)


def memory_of(comfy: Comfy) -> tuple[float, float]:
    """Return the server's resident memory and its anonymous part, in MB."""
    lines = Path(f"/proc/{comfy.process.pid}/status").read_text().splitlines()
    about = dict(line.split(":", 1) for line in lines)
    return tuple(int(about[name].split()[0]) * 1024 / 1e6 for name in ("VmRSS", "RssAnon"))


def slope_of(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Return the slope of a line through points by least squares, and its standard error."""
    x, y = np.array(points, float).T
    x = x - x.mean()
    slope = (x @ (y - y.mean())) / (x @ x)
    rest = y - y.mean() - slope * x
    return float(slope), float(np.sqrt((rest @ rest) / max(1, len(x) - 2) / (x @ x)))
