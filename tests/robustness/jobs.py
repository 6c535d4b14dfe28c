"""Commands and savers at their smallest, for kills, full disks and double starts."""

from __future__ import annotations

import dataclasses
import importlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from shlex import split

MODEL = "tiny.safetensors"


def nothing(*_: Path) -> None:
    """Write nothing."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A command, what it reads, and where it writes.

    Args:
        name: for the table.
        module: its `main` is called with the command line.
        line: the command line; INPUTS and TRIAL stand for the two folders.
        inputs: writes what the command only reads, once for all trials, into a folder.
        begin: copies what the command changes from the folder of inputs into the trial's.
        once: after it has finished, the command refuses to run again or writes another file.
        locks: of two starts at the same time one is refused.
        function: is called in the place of the module's `main`.
    """

    name: str
    module: str
    line: str
    inputs: Callable[[Path], None] = nothing
    begin: Callable[[Path, Path], None] = nothing
    once: bool = False
    locks: bool = True
    function: Callable[[list[str]], None] | None = None

    def main(self) -> Callable[[list[str]], None]:
        """Return the command's function."""
        return self.function or importlib.import_module(self.module).main

    def arguments(self, inputs: Path, trial: Path) -> list[str]:
        """Return the command line for these folders."""
        places = {"INPUTS": str(inputs / self.name), "TRIAL": str(trial)}
        words = split(self.line)
        for name, place in places.items():
            words = [word.replace(name, place) for word in words]
        return words


def write_colours(folder: Path) -> None:
    from tests.training.image_runs import write_colours

    folder.mkdir(parents=True, exist_ok=True)
    write_colours(folder / "data")


def write_images(folder: Path) -> None:
    from tests.training.image_folders import write_images

    write_images(folder / "images")


def write_rae(folder: Path) -> None:
    from tests.training.test_rae import write_images, write_rae

    (folder / "rae").mkdir(parents=True)
    write_rae(folder / "rae")
    write_images(folder / "images")


def write_ditdh(folder: Path) -> None:
    """Write a tiny DiT^DH network under its published names."""
    import torch

    from tests.helpers import golden

    net = {k[4:]: v for k, v in golden("ddt_tiny").items() if k.startswith("net.")}
    last = {k.replace("blocks.2", "blocks.3"): v for k, v in net.items() if "blocks.2" in k}
    folder.mkdir(parents=True)
    torch.save({"ema": {**net, **last}}, folder / "network.pt")


def write_prepared(folder: Path) -> None:
    from tests.training.source_runs import write_images, write_prepared

    write_images(folder / "images")
    write_prepared(folder / "images", folder / "data")


def write_encoder(folder: Path) -> None:
    from tests.training.test_encode_tokens import tiny_encoder

    write_prepared(folder)
    tiny_encoder("dinov2", folder / "encoder")


def copy_data(inputs: Path, trial: Path) -> None:
    """Copy the prepared data, to which the command adds tokens."""
    shutil.copytree(inputs / "data", trial / "data")


def write_pickle(folder: Path) -> None:
    """Write a mixture as a pickle of arrays."""
    import numpy as np

    folder.mkdir(parents=True)
    arrays = {"means": np.zeros((3, 2, 40, 40), np.float32), "variances": np.ones(3)}
    arrays["weights"] = np.full(3, 1 / 3)
    (folder / "mixture.pkl").write_bytes(pickle.dumps(arrays))


def write_place(folder: Path) -> None:
    from tests.training.evaluation_runs import write_place

    folder.mkdir(parents=True)
    write_place(folder)
    (folder / "f.safetensors").unlink()  # the command trains its own features


def write_model(folder: Path) -> None:
    from tests.training.evaluation_runs import write_model

    folder.mkdir(parents=True)
    data = {"labels": ["left", "right"], "space": "pixels"}
    write_model(folder / MODEL, data=data, num_layers=4, num_heads=4, head_dim=32)


JOBS = (
    Job(
        "checkerboard",
        "training.checkerboard",
        "-k 4 --batch-size 64 --warmup 5 --checkpoint-every 3 --log-every 5 --picture-every 99 "
        "--iterations 30 --eval-samples 100 --device cpu --out TRIAL/out",
    ),
    Job(
        "imagenet",
        "training.imagenet",
        "--preset digits --num-layers 2 --num-heads 2 --head-dim 8 --log-std-dim 8 -k 3 "
        "--batch-size 16 --warmup 3 --checkpoint-every 3 --log-every 5 --picture-every 10 "
        "--iterations 20 --precision fp32 --device cpu --data INPUTS/data --out TRIAL/out",
        write_colours,
    ),
    Job("digits", "training.digits", "--copies 1 --out TRIAL/out", once=True),
    Job(
        "prepare",
        "training.prepare",
        "--data INPUTS/images --size 8 --pixels --shard-size 2 --workers 0 --device cpu "
        "--out TRIAL/out",
        write_images,
    ),
    Job(
        "rae statistics",
        "training.rae",
        "statistics --data INPUTS/images --vae INPUTS/rae --workers 0 --batch-size 4 --device cpu "
        "--out TRIAL/statistics.safetensors",
        write_rae,
    ),
    Job(
        "rae convert",
        "training.rae",
        "convert --source INPUTS/network.pt --out TRIAL/network.safetensors",
        write_ditdh,
    ),
    Job(
        "fit_source",
        "training.fit_source",
        "--data INPUTS/data --modes 4 --tolerance 0 --max-iterations 30 --workers 0 --device cpu "
        "--out TRIAL/out",
        write_prepared,
    ),
    Job(
        "fit_source tokens",
        "training.fit_source",
        "--data TRIAL/data --encoder INPUTS/encoder --encoder-size 16 --image-size 16 --modes 3 "
        "--images INPUTS/images --tolerance 0 --max-iterations 20 --batch-size 8 --workers 0 "
        "--device cpu --out TRIAL/out",
        write_encoder,
        copy_data,
    ),
    Job(
        "fit_source convert",
        "training.fit_source",
        "convert INPUTS/mixture.pkl --out TRIAL/source.safetensors",
        write_pickle,
    ),
    Job(
        "evaluate",
        "training.evaluate",
        "--checkpoint INPUTS/tiny.safetensors --data INPUTS/train --test-data INPUTS/test "
        "--features TRIAL/f.safetensors --feature-iterations 40 --count 50 --chunk-size 20 "
        "--batch-size 20 --steps 2 4 --device cpu --out TRIAL/out",
        write_place,
    ),
    Job(
        "source_toys",
        "training.source_toys",
        "--preset quick --iterations 5 --samples 300 --out TRIAL/out",
    ),
    Job(
        "gmflow sample",
        "gmflow_core.cli",
        "sample INPUTS/tiny.safetensors --count 4 --steps 2 --device cpu --out TRIAL/out.png",
        write_model,
        locks=False,
    ),
    Job(
        "gmflow demo",
        "gmflow_core.cli",
        "demo --checkerboard --count 500 --device cpu --out TRIAL/demo.png",
        locks=False,
    ),
    Job(
        "gmflow convert",
        "gmflow_core.cli",
        "convert INPUTS/tiny.safetensors TRIAL/out.safetensors --force",
        write_model,
        locks=False,
    ),
    Job("save_checkpoint", "tests.robustness.savers", "TRIAL/saved.safetensors", locks=False),
)


def chosen(names: list[str] | None, jobs: tuple[Job, ...] = JOBS) -> list[Job]:
    """Return the jobs of these names; all if none are given.

    Raises:
        SystemExit: a name is unknown.
    """
    unknown = sorted(set(names or ()) - {job.name for job in jobs})
    if unknown:
        known = json.dumps([job.name for job in jobs])
        raise SystemExit(f"error: --jobs has {', '.join(unknown)}; choose from {known}")
    return [job for job in jobs if not names or job.name in names]
