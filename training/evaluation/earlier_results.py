"""Remove what earlier evaluations wrote to a folder, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from gmflow_core.files.atomic import remove_leftovers
from gmflow_core.files.errors import FileError
from gmflow_core.files.json_files import read_json
from gmflow_core.files.targets import check_is_new
from training.data.given_files import check_kept, check_outside
from training.data.shards import INDEX
from training.evaluation.chunks import FILES
from training.evaluation.config import Config, Setting
from training.evaluation.export import export_path, exported_files

FORMAT = "gmflow-evaluation-1"
RESULTS = "results.json"
TABLES = ("results.csv", "calls.png", "guidance.png", "precision.png", "saturation.png")
KINDS = ("samples", "measures")  # folders of chunks


def check_given(config: Config, settings: list[Setting]) -> None:
    """Check that the command neither replaces nor, with --restart, deletes what it was given.

    Raises:
        FileExistsError: it replaces a file of a folder where no evaluation was.
        ValueError: it does, or writes its pictures among given ones.
    """
    out = config.out
    if not is_of_evaluations(out):
        singles = (
            path
            for setting in settings
            for path in (
                out / "sheets" / f"{setting.name}.png",
                export_path(out, "npz", setting.name),
            )
        )
        for path in (*(out / name for name in TABLES), *singles):
            check_is_new(path, "no evaluation wrote it: give another --out, or move it")
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
    names, own = names_of(out), is_of_evaluations(out)
    for name in sorted(names):
        for kind in KINDS:
            yield from (out / kind / name).glob(FILES)
        npz, png = (export_path(out, kind, name) for kind in ("npz", "png"))
        single = (out / "sheets" / f"{name}.png", npz)
        yield from (path for path in single if path.exists())
        yield from exported_files(png)
    if own:
        yield from (path for name in (*TABLES, RESULTS) if (path := out / name).exists())


def names_of(out: Path) -> set[str]:
    """Return the names of settings and given samples of which a folder has samples or measures."""
    return {file.parent.name for kind in KINDS for file in out.glob(f"{kind}/*/{FILES}")}


def is_of_evaluations(out: Path) -> bool:
    """Return whether a folder holds what evaluations wrote."""
    return bool(names_of(out)) or is_of_evaluation(out / RESULTS)


def is_of_evaluation(path: Path) -> bool:
    """Return whether a file holds results of an evaluation."""
    try:
        found = read_json(path, "")
    except (FileError, OSError):
        return False
    return isinstance(found, dict) and found.get("format") == FORMAT
