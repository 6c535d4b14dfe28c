"""Read mixtures, statistics and pictures in published pickles, without running anything in them.

`pickle_arrays.py` reads the file in a process of its own and returns arrays only. That process may
take 1 GiB of memory and 6 times the file's size, and a minute and another second for each 10 MB,
which is several times what arrays need. It writes no files. Where the platform cannot limit
memory (Windows, macOS), only the time is limited.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ..files.errors import FileError, check_regular_file, printable, quoted, reading
from .pickle_arrays import most_output, most_time
from .pickle_values import TYPES, size_of
from .source import GaussianMixtureSource

LARGEST = 2**36  # bytes of a file
HEADER = 2**24  # bytes of the other process's header
SAFE = "get the mixture from where you trust, as arrays (.npz, .safetensors)"
CONVERT = (
    "where you trust the file, load it with Python and save its mean and covariance: "
    "numpy.savez('reference.npz', mu=mean, sigma=covariance)"
)
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x04\x22M\x18", b"x\x01", b"x\x9c", b"x\xda")
FOLDER = Path(__file__).parent  # the other process imports it as a package of its own
START = (
    "import sys; sys.path.append(sys.argv[1]); "
    f"from {FOLDER.name}.pickle_arrays import main; main()"
)


def read_pickle(path: str | Path) -> dict[str, Any]:
    """Read the arrays of the mixture in a pickle, in another process.

    Returns:
        `means`, `variances`, `stds`, `weights` and `log_weights`, those that there are, and `kind`,
        the covariance type.

    Raises:
        FileNotFoundError: there is no such file.
        FileError: it asks for what is not allowed, is not a whole pickle, holds no mixture, or
            takes too much memory or time.
    """
    try:
        check_regular_file(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; give the pickle of a mixture") from None
    header = _read(path, "mixture", SAFE)
    if "found" in header:
        raise FileError(
            path,
            f"holds no mixture: it has {quoted(header['found'])}, and means with variances "
            "are needed",
            "",
        )
    return {**header["fields"], "kind": str(header["kind"])}


def read_statistics_pickle(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Read mean (D,) and covariance (D, D) of features of images in a pickle, in another process.

    The pickle is that of StyleGAN's `FeatureStats`, a dict with the sums `raw_mean` and `raw_cov`
    over `num_items` images; or a dict with `mu` and `sigma`, which may lie in another one (EDM2).

    Returns:
        float64; StyleGAN's covariance divides by the number of images, as its own code does.

    Raises:
        FileNotFoundError: there is no such file.
        FileError: it is refused, see `read_pickle`, or holds no such numbers.
    """
    check_regular_file(path)
    header = _read(path, "statistics", CONVERT)
    with reading(path, CONVERT, "holds no statistics of images"):
        for bad in header.get("bad", []):
            found = f"has the {printable(bad['name'], 60)} {printable(bad['value'], 120)}"
            raise FileError(path, found, f"it must be the number of images, 1 or more; {CONVERT}")
    if "found" in header:
        raise FileError(
            path,
            f"holds no statistics of images: it has {quoted(header['found'])}, and mu with sigma, "
            "or StyleGAN's raw_mean, raw_cov and num_items are needed",
            CONVERT,
        )
    fields = header["fields"]
    with reading(path, CONVERT, "holds no statistics of images"), np.errstate(all="ignore"):
        names = ("mu", "sigma") if {"mu", "sigma"} <= set(fields) else ("sums", "products")
        mean, covariance = (fields[name].astype(np.float64) for name in names)
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            found = f"has a mean {mean.shape} and a covariance {covariance.shape}"
            raise FileError(path, found, "they must be (D,) and (D, D)")
        if names[0] == "sums":
            count = float(fields["count"].flat[0])
            if not 1 <= count < 2**53 or count % 1:
                found = f"has the num_items {count:g}"
                raise FileError(path, found, f"it must be the number of images; {CONVERT}")
            mean = mean / count
            covariance = covariance / count - np.outer(mean, mean)
        return mean, covariance


def read_pictures_pickle(
    path: str | Path, content: bytes, advice: str
) -> tuple[np.ndarray, np.ndarray]:
    """Read the arrays `data` and `labels` of CIFAR-10's dict in a pickle, in another process.

    Args:
        path: names the file in messages.
        content: of the file.
        advice: what to do with a file that is refused.

    Raises:
        FileError: it is refused, see `read_pickle`, or has no such arrays.
    """
    fields = _fields_of(path, content, "pictures", "arrays data and labels", advice)
    return fields["data"], fields["labels"]


def read_classes_pickle(path: str | Path, content: bytes, advice: str) -> bytes:
    """Read the `label_names` of CIFAR-10's dict in a pickle, as lines, in another process.

    Args and Raises: see `read_pictures_pickle`.
    """
    return _fields_of(path, content, "classes", "short texts label_names", advice)[
        "names"
    ].tobytes()


def _fields_of(
    path: str | Path, content: bytes, kind: str, needed: str, advice: str
) -> dict[str, np.ndarray]:
    """Return the fields of a kind in the content of a pickle; `needed` names them in messages."""
    with reading(path, advice, "cannot be read"), tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        header = _read_file(path, file, kind, advice)
    if "found" in header:
        raise FileError(path, f"holds no {needed}: it has {quoted(header['found'])}", advice)
    return header["fields"]


def _read(path: str | Path, kind: str, safe: str) -> dict[str, Any]:
    """Return the header of a pickle, see `_read_file`."""
    with reading(path, safe, "cannot be read"), open(path, "rb") as file:
        return _read_file(path, file, kind, safe)


def _read_file(path: str | Path, file: BinaryIO, kind: str, safe: str) -> dict[str, Any]:
    """Return the header of a pickle, see `pickle_arrays`, with the arrays in it.

    Args:
        path: names the file in messages.
        kind: of the arrays, one of its `KINDS`.
        safe: what to do with a file that is refused.

    Raises:
        FileError: it is refused.
    """
    about = os.fstat(file.fileno())
    if not stat.S_ISREG(about.st_mode) or about.st_size > LARGEST:
        raise FileError(path, f"has {about.st_size:,} bytes; the most is {LARGEST:,}", safe)
    file.seek(0)
    _check_start(path, file.read(8))
    file.seek(0)
    header = _run(path, file, about.st_size, kind, safe)
    if "refused" in header:
        raise FileError(path, f"is refused: {header['refused']}", safe)
    return header


def _check_start(path: str | Path, start: bytes) -> None:
    """Check that a file does not begin like a kind of file that is no bare pickle."""
    if start[:2] == b"PK":
        raise FileError(
            path,
            "is a file of torch.save; only pickles of NumPy arrays are read",
            "save it as one, or as safetensors",
        )
    if start.startswith(COMPRESSED):
        raise FileError(path, "is compressed", "decompress it, or save it without compression")


def _run(path: str | Path, file: BinaryIO, size: int, kind: str, safe: str) -> dict[str, Any]:
    """Read the file in another process; return its header with the arrays in it.

    Raises:
        FileError: the process was stopped, or what it wrote is not what it should be.
    """
    seconds = most_time(size)
    # isolated, without packages: nothing but Python's own modules and this folder's
    command = [sys.executable, "-I", "-S", "-B", "-c", START, str(FOLDER.parent), kind]
    late = threading.Event()
    with subprocess.Popen(  # noqa: S603 the interpreter that runs this
        command,
        stdin=file,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as child:

        def stop() -> None:
            late.set()
            child.kill()

        timer = threading.Timer(seconds, stop)
        timer.daemon = True
        timer.start()
        try:
            return _receive(child.stdout, most_output(size))
        except (struct.error, ValueError, TypeError, LookupError, EOFError) as error:
            with suppress(subprocess.TimeoutExpired):
                child.wait(timeout=5)  # its own end tells more than that it was killed
            child.kill()
            end = _end_of(child.wait(), seconds if late.is_set() else None)
            raise FileError(path, f"is refused: reading it {end}", safe) from error
        finally:
            timer.cancel()
            child.kill()


def _end_of(status: int, seconds: int | None) -> str:
    """Say how the other process ended, by its exit status and the time it had if it was late."""
    if seconds is not None:
        return f"took longer than {seconds} s"
    if -status == getattr(signal, "SIGXCPU", None):
        return "took more time than arrays of its size do"
    if status < 0:
        name = next((each.name for each in signal.Signals if each == -status), str(-status))
        return f"was ended by the system ({name}): it takes too much memory, or was overwritten"
    return f"failed (exit status {status}): it takes too much memory, or was overwritten"


def _receive(pipe: BinaryIO, most: int) -> dict[str, Any]:
    """Read what the other process writes: the header, with at most so many bytes of arrays in it.

    Raises:
        struct.error, ValueError, TypeError, LookupError, EOFError: it writes something else.
    """
    (length,) = struct.unpack("<Q", pipe.read(8))
    if length > HEADER:
        raise ValueError("the header is too long")
    header = json.loads(pipe.read(length))
    for name, field in header.get("fields", {}).items():
        parts = field if isinstance(field, list) else [field]
        most -= sum(part["size"] for part in parts)
        if most < 0:
            raise ValueError("the arrays are too large")
        arrays = [_read_array(pipe, **part) for part in parts]
        header["fields"][name] = np.stack(arrays) if isinstance(field, list) else arrays[0]
    return header


def _read_array(
    pipe: BinaryIO, type: str, shape: list[int], order: str | list[int], size: int
) -> np.ndarray:
    """Read one array; the arguments are a part of the header.

    Raises:
        ValueError, LookupError, EOFError: they do not belong together, or the data end too early.
    """
    if type[1:] not in TYPES or size_of(type, shape) != size:
        raise ValueError("an array's size is not that of its shape")
    raw = bytearray(size)
    view, filled = memoryview(raw), 0
    while filled < size:
        count = pipe.readinto(view[filled:])
        if not count:
            raise EOFError
        filled += count
    array = np.frombuffer(raw, type)
    if isinstance(order, str):
        return array.reshape(shape, order=order)
    return array.reshape(shape).transpose(order)


def convert_pickle(
    path: str | Path, assigner: GaussianMixtureSource | None = None
) -> GaussianMixtureSource:
    """Convert the mixture in a pickle to a source.

    The pickle holds an estimator of scikit-learn (or of a class with its attributes), or a dict of
    arrays. Names of the means (M, *shape): means_, means, mean or mu; of the variances, one for
    each mode or for each of its dimensions: covariances_, covariances, covs, variances, vars,
    variance or var, or their roots stds or std; of the weights: weights_, weights, pi, or their
    logarithms log_weights.

    Args:
        path: the pickle.
        assigner: the mixture of the tokens, for a source of latents; its weights are taken if the
            file has none.

    Raises:
        FileNotFoundError: there is no such file.
        FileError: it is refused, or holds no such mixture; the message lists what it holds.
    """
    return mixture_of(read_pickle(path), path, assigner)


def mixture_of(
    arrays: dict[str, Any], path: str | Path, assigner: GaussianMixtureSource | None = None
) -> GaussianMixtureSource:
    """Return the source of a mixture's arrays, named as `read_pickle` does.

    Other arguments and errors as `convert_pickle`.
    """
    if arrays["kind"] not in ("diag", "spherical"):
        raise FileError(
            path,
            f"has covariances of the type {arrays['kind']}",
            "a source is diagonal or spherical: fit one of these",
        )
    if not {"weights", "log_weights"} & set(arrays) and assigner is None:
        raise FileError(
            path,
            "has no weights of its modes",
            "give the mixture of the tokens, which has them, with --assigner",
        )
    with reading(path, SAFE, "holds a mixture that is none"), np.errstate(all="ignore"):
        means, std = torch.from_numpy(arrays["means"].astype(np.float32)), _std(arrays, path)
        if "log_weights" in arrays:
            log_weights = _float64(arrays["log_weights"])
        elif "weights" in arrays:
            log_weights = _float64(arrays["weights"]).log()
        else:
            log_weights = assigner.log_weights.double()
        log_weights = log_weights.flatten().float()
        return GaussianMixtureSource(means, std.float(), log_weights, assigner)


def _float64(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.float64))


def _std(arrays: dict[str, Any], path: str | Path) -> Tensor:
    """Return standard deviations that broadcast to the means."""
    shape, roots = arrays["means"].shape, "stds" in arrays
    std = _float64(arrays["stds"]) if roots else _float64(arrays["variances"]).sqrt()
    if shape and std.numel() == shape[0]:
        std = std.reshape(-1, *[1] * (len(shape) - 1))
    if std.ndim != len(shape) or any(
        n not in (1, size) for n, size in zip(std.shape, shape, strict=True)
    ):
        kind = "standard deviations" if roots else "variances"
        raise FileError(
            path,
            f"has {kind} {tuple(std.shape)} for means {shape}",
            "a spherical source has one for each mode, a diagonal one has one for each of its "
            "dimensions",
        )
    return std
