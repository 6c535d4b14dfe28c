"""Write the tables of the pages (*.md, docs/*.md) from the files that hold their figures.

    python -m tests.docs_tables        # after a file in docs/results has changed

Rewrites the cells of every table below a comment of this form. The labels, which are the leading
columns, stay as they are:

    <!-- table docs/results/steps.csv
    cell {frechet_distance:.1f}
    row solver=euler; steps=2
    row solver=gm-ode; steps=2
    column checkpoint=digits_k1
    column checkpoint=digits_k8
    -->

A row and a column are conditions on the records of the file. The column's conditions replace the
row's on the same key. A cell shows the one record that meets them, in the format of its column,
else of its row, else of the table. It is empty if there is no such record. Formats are Python's, so
there is one rule of rounding: Python rounds the number that the file holds.

Records are the lines of a CSV file, the timings of a benchmark (`benchmark_records`), or the report
in a checkpoint's metadata (`checkpoint_records`). A comment without rows quotes the table that
`tests.benchmarks` prints.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open

from tests.benchmarks import report

REPOSITORY = Path(__file__).resolve().parents[1]
TABLE = re.compile(r"<!-- table (\S+)\n?(.*?)-->\n((?:\|[^\n]*\n)+)", re.DOTALL)

Record = dict[str, Any]


def pages() -> list[Path]:
    """Return README.md and its neighbours, and the pages in docs."""
    return [*sorted(REPOSITORY.glob("*.md")), *sorted((REPOSITORY / "docs").glob("*.md"))]


def main() -> None:
    """Rewrite the tables, and name the pages that changed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    for page in pages():
        old = page.read_text(encoding="utf-8")
        new = with_tables(old)
        if new != old:
            page.write_text(new, encoding="utf-8")
            print(f"wrote {page.relative_to(REPOSITORY)}")


def with_tables(page: str) -> str:
    """Return the text of a page with the cells of its marked tables as their files have them.

    Raises:
        ValueError: a mark does not fit its table, or a cell has several records.
    """

    def rewrite(match: re.Match) -> str:
        file, lines, table = match.groups()
        mark = match.group(0)[: -len(table)]
        if not lines.strip():
            return mark + quoted(REPOSITORY / file)
        return mark + filled(table, lines, records_of(REPOSITORY / file), file)

    return TABLE.sub(rewrite, page)


def quoted(path: Path) -> str:
    """Return the table of a benchmark without its caption."""
    return report.markdown(json.loads(path.read_text())).split("\n\n", 1)[1].strip() + "\n"


class Selection(NamedTuple):
    """Conditions on a record, and the format of its cells: None leaves it to others."""

    conditions: dict[str, str]
    cell: str | None


def selection(text: str) -> Selection:
    """Read "key=value; key=value; {format}"."""
    parts = text.split("; ")
    cells = [part for part in parts if "{" in part]
    conditions = dict(part.split("=", 1) for part in parts if "{" not in part)
    return Selection(conditions, cells[0] if cells else None)


def filled(table: str, lines: str, records: list[Record], file: str) -> str:
    """Return a table with the cells that its mark asks for.

    Args:
        table: header, rule and rows in markdown.
        lines: of the mark: at most one "cell"; a "row" for each row, a "column" for each column.
    """
    said: dict[str, list[Selection]] = {"cell": [], "row": [], "column": []}
    for line in lines.strip().splitlines():
        kind, _, text = line.partition(" ")
        said[kind].append(selection(text))
    header, rule, *rows = table.splitlines()
    if len(rows) != len(said["row"]):
        raise ValueError(f"{file}: {len(rows)} rows below a mark of {len(said['row'])}: {header}")
    labels = header.count("|") - 1 - len(said["column"])
    written = [header, rule]
    for row, wanted in zip(rows, said["row"], strict=True):
        kept = [part.strip() for part in row.split("|")[1 : 1 + labels]]
        cells = [one_cell(records, wanted, column, *said["cell"]) for column in said["column"]]
        written.append(f"| {' | '.join([*kept, *cells])} |")
    return "\n".join(written) + "\n"


def one_cell(records: list[Record], row: Selection, column: Selection, *table: Selection) -> str:
    """Return the text of one cell; "" if no record meets the conditions."""
    conditions = {**row.conditions, **column.conditions}
    found = [
        r for r in records if all(str(r.get(key, "")) == text for key, text in conditions.items())
    ]
    if len(found) > 1:
        raise ValueError(f"{len(found)} records meet {conditions}, where a cell shows one")
    form = next(s.cell for s in (column, row, *table) if s.cell is not None)
    return form.format_map(Numbers(found[0])) if found else ""


class Blank(str):
    """What a record lacks: nothing in any format."""

    def __format__(self, spec: str) -> str:
        return ""


class Numbers(dict):
    """A record whose texts read as numbers where they are numbers."""

    def __missing__(self, key: str) -> Any:
        raise ValueError(f"no column {key!r} among {', '.join(self)}")

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        if value == "":
            return Blank()
        try:
            return float(value)
        except ValueError:
            return value


# Records


def records_of(path: Path) -> list[Record]:
    """Return the records of a file."""
    if path.suffix == ".json":
        results = json.loads(path.read_text(encoding="utf-8"))
        if "machines" in results:
            return list(benchmark_records(results))
        return list(robustness_records(results))
    if path.suffix == ".safetensors":
        return list(checkpoint_records(path))
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def robustness_records(results: dict) -> Iterator[Record]:
    """Yield the rows of a table of `tests.robustness`; of its cases by door, then all together."""
    doors = results.get("doors", {})
    yield from results.get("rows", [])
    yield from ({"door": door, **counts} for door, counts in doors.items())
    if doors:
        names = next(iter(doors.values()))
        yield {"door": "all", **{name: sum(c[name] for c in doors.values()) for name in names}}


def benchmark_records(results: dict) -> Iterator[Record]:
    """Yield a record for each machine ("row" is "machine"), and for each pair of forms of a row.

    Figures of a pair: "ms", the median time of "form"; "faster", the median of the ratios "other" /
    "form" of paired repeats; "of_floor", the time of "form" as a multiple of the floor. Exactly one
    record of each form has "other" equal to "form".
    """
    for device, machine in results["machines"].items():
        rates = results["rates"][device]
        yield {
            **machine,
            "row": "machine",
            "device": device,
            "name": machine["device"],
            "gb_per_second": rates["bytes_per_second"] / 1e9,
            "gflop_per_second": rates["flops_per_second"] / 1e9,
        }
    for line in report.lines_of(results):
        timed = {name: about for name, about in line["forms"].items() if "seconds" in about}
        for form, other in itertools.product(timed, repeat=2):
            pairs = zip(timed[other]["seconds"], timed[form]["seconds"], strict=True)
            yield {
                "row": line["row"],
                "case": line["case"],
                "device": line["device"],
                "form": form,
                "other": other,
                "ms": 1e3 * timed[form]["median"],
                "faster": statistics.median(theirs / ours for theirs, ours in pairs),
                "of_floor": timed[form]["median"] / (line.get("floor", {}).get("seconds") or 1),
            }


def checkpoint_records(path: Path) -> Iterator[Record]:
    """Yield a record for each solver and number of calls in the report of a model of points."""
    with safe_open(path, "pt") as file:
        found = json.loads(file.metadata()["training"])["report"]
    for solver, by_calls in found.items():
        if isinstance(by_calls, dict) and "1" in by_calls:
            for calls, figures in by_calls.items():
                yield {"solver": solver, "calls": calls, **figures}


if __name__ == "__main__":
    main()
