"""Count cases by door and verdict, print the table, write it as JSON."""

from __future__ import annotations

import datetime
import os
import platform
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gmflow_core.files.json_files import write_json

from .cases import Case
from .verdicts import VERDICTS

PACKAGES = ("torch", "numpy", "safetensors", "pillow", "diffusers", "transformers", "scikit-learn")


def count(cases: Sequence[Case]) -> dict[str, Counter]:
    """Return the number of cases of each verdict, by door."""
    rows: dict[str, Counter] = {}
    for case in cases:
        rows.setdefault(case.door, Counter())[case.outcome.verdict] += 1
    return dict(sorted(rows.items()))


def text_of(rows: dict[str, Counter]) -> str:
    """Return the table as text."""
    width = max(map(len, [*rows, "door"]))
    total = sum(rows.values(), Counter())
    lines = ["  ".join([f"{'door':{width}}", " cases", *(f"{v:>10}" for v in VERDICTS)])]
    for name, row in [*rows.items(), ("all", total)]:
        numbers = [f"{row[verdict]:>10,}" for verdict in VERDICTS]
        lines.append("  ".join([f"{name:{width}}", f"{row.total():>6,}", *numbers]))
    return "\n".join(lines)


def failures_of(cases: Sequence[Case], seed: int, most: int) -> str:
    """Return what is needed to look into the cases that are neither right nor clear."""
    bad = [case for case in cases if not case.good]
    lines = []
    for case in bad[:most]:
        outcome = case.outcome
        lines += [
            f"{outcome.verdict}: {case.change[:300]}",
            f"    {outcome.message[:700]}",
            f"    {outcome.seconds:.1f} s, {outcome.megabytes:.0f} MB; again: python -m "
            f'tests.robustness --seed {seed} --case "{case.door}:{case.number}"',
        ]
    if len(bad) > most:
        lines.append(f"and {len(bad) - most} more")
    return "\n".join(lines)


def versions() -> dict[str, str]:
    """Return the versions of what the cases ran on."""
    found = {"python": platform.python_version(), "system": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return {**found, "cores": str(os.cpu_count())}


def write_table(
    path: Path, rows: dict[str, Counter], command: str, seed: int, seconds: float, **more: Any
) -> None:
    """Write the table with date, command, seed and versions."""
    write_json(
        path,
        {
            "date": datetime.date.today().isoformat(),
            "command": command,
            "seed": seed,
            "seconds": round(seconds),
            "versions": versions(),
            **more,
            "doors": {
                name: {"cases": row.total(), **{v: row[v] for v in VERDICTS}}
                for name, row in rows.items()
            },
        },
    )
