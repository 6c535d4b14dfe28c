"""Check that a fit replaces no files of others in its folder."""

from __future__ import annotations

from pathlib import Path

from gmflow_core.files.errors import FileError, printable
from gmflow_core.files.safetensors_files import open_safetensors
from gmflow_core.source.em import FORMAT
from gmflow_core.source.files import read_source_metadata
from training.data.given_files import check_kept
from training.source.config import Config
from training.source.labels import FILE as LABELS

SOURCE, STATE = "source.safetensors", "state.safetensors"
REPORT, WEIGHTS = "report.png", "weights.png"


def check_own_files(config: Config) -> None:
    """Check that what a fit would replace in OUT is of a fit, and none of its inputs.

    Raises:
        ValueError: it is not.
    """
    files = [config.out / name for name in (SOURCE, STATE, LABELS, REPORT, WEIGHTS)]
    parts = [*config.out.glob("labels_*.safetensors"), *config.out.glob("moments_*.safetensors")]
    files += [path for path in parts if path.stem.rpartition("_")[2].isdigit()]
    given = {name: getattr(config, name) for name in ("data", "tokens", "images")}
    check_kept(files, "replaced", **given)
    found = [path for path in files if path.exists()]
    of_a_fit = {STATE: is_state, SOURCE: is_fitted}
    own = [path for path in found if path.name in of_a_fit and of_a_fit[path.name](path)]
    others = [path for path in found if path.name in of_a_fit and path not in own]
    for path in others or (found if not own else []):
        text = f"{path} is there, and no fit of this command wrote it; move it, or give another "
        raise ValueError(printable(f"{text}--out"))


def is_state(path: Path) -> bool:
    """Return whether a file is the state of a fit, or too damaged to tell."""
    try:
        with open_safetensors(path) as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (FileError, OSError):
        return True


def is_fitted(path: Path) -> bool:
    """Return whether a file is a source that was fitted, or too damaged to tell."""
    try:
        open_safetensors(path)
    except (FileError, OSError):
        return True
    try:
        return "converted" not in read_source_metadata(path)["training"]
    except (FileError, OSError):
        return False
