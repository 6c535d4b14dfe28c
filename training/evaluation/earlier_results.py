"""Remove what earlier evaluations wrote to a folder, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from gmflow_core.files.atomic import remove_leftovers
from gmflow_core.files.errors import FileError
from gmflow_core.files.json_files import read_json
from training.data.given_files import check_kept, check_outside
from training.data.shards import INDEX
from training.evaluation.chunks import FILES
from training.evaluation.config import Config, Setting
from training.evaluation.export import export_path, exported_files

FORMAT = "gmflow-evaluation-1"
RESULTS = "results.json"
KINDS = ("samples", "measures")  # folders of chunks


def check_given(config: Config, settings: list[Setting]) -> None:
    """Check that the command neither replaces nor, with --restart, deletes what it was given.

    Raises:
        ValueError: it does, or writes its pictures among given ones.
    """
    out = config.out
    given = {name: getattr(config, name) for name in ("samples", "reference", "checkpoint", "data")}
    pictures = [path for path in (*config.samples, config.reference) if path is not None]
    for path in pictures:
        if not (path / INDEX).exists():
            check_outside(out, **{"samples" if path in config.samples else "reference": path})
    for setting in settings:
        for kind in config.export:
            path = export_path(out, kind, setting.name)
            check_kept([path, *exported_files(path)], "replaced", **given)
    if config.restart:
        check_kept(written(out), "deleted (--restart)", **given)


def clean(config: Config) -> None:
    """Remove half-written files of killed processes, and with --restart all earlier results."""
    out = config.out
    for folder in [out, *out.glob("*/"), *out.glob("*/*/")]:
        remove_leftovers(folder)
    if config.restart:
        folders = set()
        for path in list(written(out)):
            path.unlink(missing_ok=True)
            folders |= {path.parent, path.parent.parent} - {out, out.parent}
        for folder in sorted(folders, reverse=True):  # the inner ones first
            with suppress(OSError):  # other files are in it
                folder.rmdir()


def written(out: Path) -> Iterator[Path]:
    """Yield the files of results, samples, measures, sheets and exports of earlier evaluations."""
    names = {file.parent.name for kind in KINDS for file in out.glob(f"{kind}/*/{FILES}")}
    for name in sorted(names):
        for kind in KINDS:
            yield from (out / kind / name).glob(FILES)
        npz, png = (export_path(out, kind, name) for kind in ("npz", "png"))
        single = (out / "sheets" / f"{name}.png", npz)
        yield from (path for path in single if path.exists())
        yield from exported_files(png)
    results = out / RESULTS
    if results.exists() and (names or is_of_evaluation(results)):
        yield results


def is_of_evaluation(path: Path) -> bool:
    """Return whether a file holds results of an evaluation."""
    try:
        found = read_json(path, "")
    except (FileError, OSError):
        return False
    return isinstance(found, dict) and found.get("format") == FORMAT
