"""One run of the checks: its device and sizes, what counts as wrong, what it writes."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import math
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from gmflow_core.files.atomic import atomic_write
from tests.benchmarks.measure import machine, relative_error

PACKAGES = ("triton", "bitsandbytes", "accelerate", "diffusers", "numpy")
GB = 1e9
NOT_COVERED = (  # by no part, on any device
    "published weights: GMFlow's, MM-FM's, FLUX.1, Qwen-Image and adapters for them",
    "the nodes inside ComfyUI, but for their 8-bit layers: samplers, memory, GM Train Adapter",
    "training compiled with torch.compile",
    "quantised transformers in pipelines of diffusers",
    "downloads from the hub",
    "several GPUs: DDP and FSDP run as one process, in which nothing is divided",
    "pictures of ImageNet, and training at its size to the end",
    "GPUs of other makers than NVIDIA",
)
Size = TypeVar("Size")


class WrongError(AssertionError):
    """A part came out otherwise than expected; its text says in what."""

    def __init__(self, what: str, expected: str, found: str):
        super().__init__(f"{what}: expected {expected}, found {found}")


class NotRunError(RuntimeError):
    """A part, or a case of one, cannot run here; its text says why."""


class Run:
    """The device, sizes and folder that all parts work with.

    Args:
        device: "cuda", or "cpu" for tiny sizes.
        folder: empty, for files.
    """

    def __init__(self, device: str, folder: Path):
        self.device, self.folder = device, folder
        self.quick = device == "cpu"
        self.deadline = math.inf  # by time.monotonic(): the end of the part that runs

    def size(self, usual: Size, quick: Size) -> Size:
        """Return the size for this device."""
        return quick if self.quick else usual

    def budget(self, usual: float) -> dict[str, float]:
        """Return limits for `take_turns`: some `usual` seconds on a GPU."""
        return {"budget": 0.05, "least": 2} if self.quick else {"budget": usual, "least": 3}

    def left(self) -> float:
        """Return the seconds until the part that runs must end."""
        return self.deadline - time.monotonic()

    def release(self) -> None:
        """Free what a part has left in the GPU's memory."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def require_memory(self, gigabytes: float) -> None:
        """Check that the GPU has that much memory free.

        Raises:
            NotRunError: it has less.
        """
        if self.device == "cuda":
            free = torch.cuda.mem_get_info()[0] / GB
            if free < gigabytes:
                raise NotRunError(
                    f"needs {gigabytes:g} GB of the GPU's memory, {free:.1f} are free"
                )


def require_package(name: str) -> None:
    """Check that a package is installed.

    Raises:
        NotRunError: it is not.
    """
    if version_of(name) is None:
        raise NotRunError(f"the package {name} is not installed")


def check(right: bool, what: str, expected: str, found: Any) -> None:
    """Raise unless `right`.

    Raises:
        WrongError: with `what`, what was `expected` and what was `found`.
    """
    if not right:
        raise WrongError(what, expected, str(found))


def check_near(found: Tensor, exact: Tensor, tolerance: float, what: str) -> float:
    """Check a tensor against an exact one on any device; return the error.

    The error is the largest one, relative to the largest exact value.

    Raises:
        WrongError: they differ by more than `tolerance`, or in shape; or a value is not finite.
    """
    check(found.shape == exact.shape, what, f"shape {tuple(exact.shape)}", tuple(found.shape))
    error = relative_error(found.cpu(), exact.double().cpu())
    # NaN is not below the tolerance either
    check(error <= tolerance, what, f"a relative error of at most {tolerance:g}", f"{error:.3g}")
    return error


def check_finite(values: Tensor, what: str) -> None:
    """Check that all values are finite.

    Raises:
        WrongError: one is not.
    """
    bad = (~values.isfinite()).sum().item()
    check(not bad, what, "finite values", f"{bad} of {values.numel()} that are not")


def check_falls(losses: list[float], what: str) -> None:
    """Check that losses are finite, and that the last quarter lies below the first loss.

    Raises:
        WrongError: they are not, or it does not.
    """
    last = losses[-max(1, len(losses) // 4) :]
    mean = sum(last) / len(last)
    said = ", ".join(f"{loss:.4g}" for loss in losses)
    check(all(map(math.isfinite, losses)), what, "finite losses", said)
    check(mean < losses[0], what, f"losses that fall below {losses[0]:.4g}", said)


def version_of(package: str) -> str | None:
    """Return the version of an installed package; None without it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def driver() -> str | None:
    """Return the version of NVIDIA's driver; None where it does not tell."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return said.stdout.split("\n")[0].strip() or None


def facts(device: str) -> dict[str, Any]:
    """Return what the figures of this machine are published with."""
    about = machine(device)
    about["packages"] = {name: version_of(name) for name in PACKAGES}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        about |= {
            "driver": driver(),
            "cuda": torch.version.cuda,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gb": properties.total_memory / GB,
        }
    return about


def write(results: dict[str, Any], path: Path | None) -> None:
    """Write the results atomically, unless there is no place for them."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(results, indent=1) + "\n")


def lines(figures: dict[str, Any], place: str = "") -> Iterator[str]:
    """Yield figures as "name value", those of nested ones behind their own names."""
    for name, value in figures.items():
        if isinstance(value, dict):
            yield from lines(value, f"{place}{name} ")
        elif isinstance(value, float):
            yield f"{place}{name} {value:.4g}"
        elif isinstance(value, list | tuple) and value and isinstance(value[0], float):
            yield f"{place}{name} {' '.join(f'{each:.4g}' for each in value)}"
        else:
            yield f"{place}{name} {value}"


def said(figures: dict[str, Any] | str) -> str:
    """Return a case's figures, or the reason why it is not run, as one line."""
    return figures if isinstance(figures, str) else ", ".join(lines(figures))


def rounded(losses: Iterable[float]) -> list[float]:
    """Return losses with six digits."""
    return [float(f"{loss:.6g}") for loss in losses]
