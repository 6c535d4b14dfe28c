"""Keep figures and write tables of them, for the benchmarks that compare samplers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gmflow_core.files.json_files import read_json, write_json
from training.common.tables import write_table

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
Row = dict[str, Any]


def write(rows: list[Row], path: Path) -> None:
    """Write rows to a csv file, a column for each name in the order of appearance."""
    write_table(rows, list(dict.fromkeys(name for row in rows for name in row)), path)
    print(f"{path}: {len(rows)} rows")


def means_of(rows: list[Row], kind: tuple[str, ...], figure: str, *more: str) -> list[Row]:
    """Return a row for each kind: the mean of a figure over seeds, its lowest and its highest.

    Args:
        kind: names of the entries that rows of one kind have in common.
        more: figures of which the mean is returned too; without those that a row lacks.
    """
    kinds: dict[tuple, list[Row]] = {}
    for row in rows:
        kinds.setdefault(tuple((key, row[key]) for key in kind if key in row), []).append(row)
    return [
        {
            **dict(common),
            "seed": "mean",
            "seeds": len(same),
            figure: mean([row[figure] for row in same]),
            "low": min(row[figure] for row in same),
            "high": max(row[figure] for row in same),
            **{
                name: mean([row[name] for row in same])
                for name in more
                if all(row.get(name) is not None for row in same)
            },
        }
        for common, same in kinds.items()
    ]


def mean(values: list[float]) -> float:
    """Return the mean of some values."""
    return sum(values) / len(values)


def kept(path: Path, key: Row, make: Callable[[], list[Row]]) -> list[Row]:
    """Return the rows in a JSON file if they belong to a key; make and write them otherwise.

    Args:
        key: what the rows depend on, in types of JSON.
    """
    if path.is_file():
        known = read_json(path)
        if known["key"] == key:
            return known["rows"]
    rows = make()
    write_json(path, {"key": key, "rows": rows})
    return rows
