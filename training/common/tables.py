"""Write tables of figures, in the place of earlier ones only."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gmflow_core.files.atomic import atomic_write
from gmflow_core.files.targets import check_is_own


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


def check_table(path: Path, columns: Sequence[str], command: str) -> None:
    """Check that a table is missing, or is an earlier one of the same columns.

    Args:
        command: that writes it, as in python -m COMMAND.

    Raises:
        FileExistsError: it is another file.
    """

    def is_table(path: Path) -> bool:
        with open(path, newline="", encoding="utf-8") as file:
            return next(csv.reader(file), None) == list(columns)

    check_is_own(path, is_table, command)
