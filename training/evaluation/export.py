"""Write samples as others read them: .npz files in ADM's form, and folders of PNG files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from gmflow_core.files.atomic import atomic_folder, atomic_write
from gmflow_core.files.errors import printable
from gmflow_core.files.json_files import write_json
from training.common.arrays import Rows, write_npz
from training.evaluation.given_samples import LABELS

EXPORTED = re.compile(r"\d{6,}\.png")
Parts = Iterable[tuple[Tensor, Tensor]]  # images uint8 (n, 3, H, W) and labels (n,), in order


def export_path(out: Path, kind: str, name: str) -> Path:
    """Return where the samples of a setting are written: OUT/npz/NAME.npz, or OUT/png/NAME."""
    return out / "npz" / f"{name}.npz" if kind == "npz" else out / "png" / name


def export_npz(parts: Parts, count: int, size: int, labelled: bool, path: Path) -> None:
    """Write samples to an .npz file in ADM's form, atomically; one part is in memory at a time.

    It has `arr_0` (N, H, W, 3) uint8 and, if the labels are classes, `arr_1` (N,) int64.

    Args:
        count, size: number of the images, and their width and height.
        labelled: the labels are classes.
    """
    labels: list[np.ndarray] = []

    def pixels() -> Iterator[np.ndarray]:
        for x, y in parts:
            labels.append(y.numpy())
            yield x.permute(0, 2, 3, 1).numpy()

    arrays = {"arr_0": Rows((count, size, size, 3), np.dtype(np.uint8), pixels())}
    if labelled:
        arrays["arr_1"] = Rows((count,), np.dtype(np.int64), labels)
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        write_npz(file, arrays)


def export_png(parts: Parts, count: int, size: int, labelled: bool, path: Path) -> None:
    """Write samples to a folder of PNG files, atomically; samples there are replaced.

    They are 000000.png, 000001.png, ... and, if the labels are classes, dataset.json has them as
    StyleGAN's tools do. Arguments as `export_npz`.

    Raises:
        ValueError: the folder holds something else too.
    """
    pairs: list[tuple[str, int]] = []
    digits = max(6, len(str(count - 1)))
    remove_exported(path)
    with atomic_folder(path) as folder:
        for images, labels in parts:
            for image, label in zip(images, labels.tolist(), strict=True):
                pairs.append((f"{len(pairs):0{digits}d}.png", label))
                picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
                picture.save(folder / pairs[-1][0], format="png", compress_level=3)
        if labelled:
            write_json(folder / LABELS, {"labels": pairs})


def exported_files(path: Path) -> list[Path]:
    """Return the files in a folder that `export_png` wrote."""
    found = [file for file in path.glob("*.png") if EXPORTED.fullmatch(file.name)]
    return found + [file for file in [path / LABELS] if found and file.exists()]


def remove_exported(path: Path) -> None:
    """Delete what `export_png` wrote to a folder, and the folder.

    Raises:
        ValueError: it holds something else too; nothing is deleted.
    """
    own = exported_files(path)
    others = [file for file in path.glob("*") if file not in own]
    if others:
        text = f"{path} holds {others[0].name}, which no export wrote; move it, or give another "
        raise ValueError(printable(f"{text}--out"))
    for file in own:
        file.unlink()
    if path.is_dir():
        path.rmdir()


EXPORTS = {"npz": export_npz, "png": export_png}
