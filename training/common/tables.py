"""Write tables of figures."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gmflow_core.files.atomic import atomic_write


def write_table(rows: Iterable[dict[str, Any]], columns: Sequence[str], path: Path) -> None:
    """Write rows as a csv file, atomically.

    Raises:
        ValueError: a row has what is no column.
        WriteError: it cannot be written.
    """
    with (
        atomic_write(path) as temporary,
        open(temporary, "w", newline="", encoding="utf-8") as file,
    ):
        table = csv.DictWriter(file, columns, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
