"""Training on the device: XL's steps, distillation, and the ways to share out a training."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.nn.parallel import DistributedDataParallel

from gmflow_core import load_checkpoint, sample_images
from gmflow_core.files.checkpoint import SHIPPED
from tests.benchmarks.loops import cpu_or_auto
from tests.benchmarks.measure import quartiles, seconds
from tests.training import image_runs
from tests.training.evaluation_runs import write_prepared
from training.distill import parse as parse_distillation
from training.loop import image_presets
from training.loop.distill_trainer import DistillTrainer
from training.loop.image_trainer import ImageTrainer
from training.loop.sharding import local

from .run import GB, Run, check, check_falls, check_finite, require_package, rounded
from .sampling import folder_in

OPTIMIZERS = {"8-bit": "adamw8bit", "32-bit": "adamw"}
ONE_PROCESS = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


class FixedBatch:
    """A trainer that draws the same times and noise in every iteration."""

    def draw(self, *arguments: Any) -> Any:
        """Draw what the first iteration draws."""
        step, self.step = self.step, 0
        try:
            return super().draw(*arguments)
        finally:
            self.step = step


class FixedImageTrainer(FixedBatch, ImageTrainer):
    """A trainer of images whose losses can be compared from one iteration to the next."""


class FixedDistillTrainer(FixedBatch, DistillTrainer):
    """A distillation whose losses can be compared from one iteration to the next."""


class Sharded(ImageTrainer):
    """A trainer that shards in a single process, which otherwise refuses it."""

    def prepare(self) -> torch.nn.Module:
        """Wrap the losses in FSDP 2, as if there were two processes."""
        with mock.patch.object(Accelerator, "num_processes", 2):
            return super().prepare()


def write_latents(run: Run, batch: int, shape: tuple[int, ...]) -> Path:
    """Write a data set of one batch of random latents in 1000 classes."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(batch, *shape, generator=generator)
    labels = torch.arange(batch) * 7 % 1000
    classes = [str(number) for number in range(1000)]
    return write_prepared(folder_in(run, "latents"), latents, labels, classes, "latents")


def training(run: Run) -> Iterator[tuple[str, dict]]:
    """Train GM-DiT XL in bf16 on a fixed batch, with 8-bit and with 32-bit AdamW."""
    require_package("bitsandbytes")
    run.require_memory(20)
    batch = run.size(64, 4)
    data = write_latents(run, batch, run.size((4, 32, 32), (4, 8, 8)))
    config = dataclasses.replace(
        image_presets.PRESETS["gmdit_xl_k8"],
        data=data,
        batch_size=batch,
        lr=run.size(1e-4, 1e-3),
        warmup=0,
        device=cpu_or_auto(run),
        workers=0,
    )
    if run.quick:
        sizes = {"num_layers": 2, "num_heads": 2, "head_dim": 32, "num_components": 3}
        config = dataclasses.replace(config, log_std_dim=16, spectrum_layers=(8, 4), **sizes)
    figures = {}
    for name, optimizer in OPTIMIZERS.items():
        out = run.folder / optimizer
        case = f"GM-DiT, {config.num_layers} layers, batch {batch}, bf16, {name} AdamW"
        figures[name] = train(run, dataclasses.replace(config, optimizer=optimizer, out=out), case)
        yield case, figures[name]
    share = figures["8-bit"]["state GB"] / figures["32-bit"]["state GB"]
    expected = "less than half of the 32-bit one's, where weights have 4,096 entries or more"
    check(share < 0.5, "size of 8-bit AdamW's state", expected, f"{share:.2f} of it")
    time = figures["8-bit"]["seconds"] / figures["32-bit"]["seconds"]
    yield "8-bit AdamW over 32-bit AdamW", {"state": share, "seconds": time}
    yield resumed(run)


def train(run: Run, config: image_presets.ImageConfig, case: str) -> dict:
    """Train on one batch; return the losses, and the time and the memory of an iteration."""
    run.release()
    if run.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer = FixedImageTrainer(config)
    check(
        trainer.optimizer_name == config.optimizer, case, config.optimizer, trainer.optimizer_name
    )
    losses: list[torch.Tensor] = []

    def iterate() -> None:
        losses.append(trainer.iterate()["loss"].detach())

    trainer.iterate()  # opens the data
    trainer.batches = itertools.repeat(next(trainer.batches))
    times = [seconds(iterate, run.device) for _ in range(run.size(24, 6))]
    trainer.count_skipped()
    check(trainer.skipped.total == 0, f"skipped steps of {case}", "0", trainer.skipped.total)
    values = [loss.item() for loss in losses]
    check_falls(values, f"losses of {case}")
    state = sum(
        value.numel() * value.element_size()
        for slots in trainer.optimizer.state.values()
        for value in slots.values()
        if isinstance(value, torch.Tensor)
    )
    found = {"seconds": quartiles(times[len(times) // 4 :])[1], "state GB": state / GB}
    found["images a second"] = config.batch_size / found["seconds"]
    if run.device == "cuda":
        found["peak GB"] = torch.cuda.max_memory_allocated() / GB
    return found | {"losses": rounded(values)}


def resumed(run: Run) -> tuple[str, dict]:
    """Save a run with 8-bit AdamW, and compare how it and its copy go on."""
    data = image_runs.write_colours(folder_in(run, "colours_8bit"))
    out, case = run.folder / "resumed", "a run with 8-bit AdamW, saved and resumed"
    wide = ["--num-heads", "4", "--head-dim", "32"]  # weights of 4,096 entries and more
    given = [*wide, "--optimizer", "adamw8bit", "--device", cpu_or_auto(run)]
    whole = image_runs.new_trainer(data, out, 20, *given)
    image_runs.losses_of(whole, 3)
    whole.save()
    again = image_runs.new_trainer(data, out, 20, *given)
    check(again.step == 3, f"iterations of {case}", "3", again.step)
    expected, found = (image_runs.losses_of(trainer, 3) for trainer in (whole, again))
    return case, {"difference": check_losses(found, expected, 1e-4, case)}


def check_losses(found: list[float], expected: list[float], tolerance: float, case: str) -> float:
    """Check that losses are equal; return the largest difference, relative to values above 1.

    Raises:
        WrongError: they differ by more than `tolerance`, or are not finite.
    """
    check_finite(torch.tensor(found), f"losses of {case}")
    apart = max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(found, expected, strict=True))
    said = f"{rounded(found)}, {apart:.2g} off"
    check(apart <= tolerance, f"losses of {case}", str(rounded(expected)), said)
    return apart


def distillation(run: Run) -> Iterator[tuple[str, dict]]:
    """Distil the shipped digits into a student of one call, some iterations on a fixed batch."""
    out, iterations = run.folder / "student", run.size(100, 8)
    given = ["--teacher", str(SHIPPED / "digits_k8.safetensors"), "--out", str(out)]
    given += ["--batch-size", str(run.size(64, 8)), "--iterations", str(iterations)]
    given += ["--warmup", "2", "--lr", "1e-4", "--device", cpu_or_auto(run)]
    if run.quick:
        given += ["-k", "2", "--substeps", "8"]
    precisions = run.size(("fp32", "bf16"), ("fp32",))
    for precision in precisions:
        case = f"a student of one call, {iterations} iterations, {precision}"
        more = ["--precision", precision, "--restart"]
        trainer = FixedDistillTrainer(parse_distillation([*given, *more]))
        losses: list[torch.Tensor] = []
        iterate = lambda: losses.append(trainer.iterate()["loss"].detach())  # noqa: B023, E731
        times = [seconds(iterate, run.device) for _ in range(iterations)]
        values = [loss.item() for loss in losses]
        check_falls(values, f"losses of {case}")
        time = quartiles(times[iterations // 4 :])[1]
        yield case, {"seconds": time, "first and last loss": [values[0], values[-1]]}
    trainer.export()
    student, _ = load_checkpoint(out / "weights.safetensors", run.device)
    samples = sample_images(student, torch.arange(4), solver="gm-policy", steps=1)
    check_finite(samples, "samples of the student")


@contextlib.contextmanager
def one_process() -> Iterator[None]:
    """Let accelerate start a process group of this process alone, as under torchrun."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    threads = torch.get_num_threads()
    AcceleratorState._reset_state(reset_partial_state=True)
    group = {**ONE_PROCESS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with mock.patch.dict(os.environ, group | {"OMP_NUM_THREADS": str(threads)}):
        try:
            yield
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
            AcceleratorState._reset_state(reset_partial_state=True)


def processes(run: Run) -> Iterator[tuple[str, dict]]:
    """Train in one process under DDP and under FSDP 2, and compare the losses with a plain run."""
    data = image_runs.write_colours(folder_in(run, "colours"))
    larger = ["--num-layers", "4", "--num-heads", "8", "--head-dim", "64"]
    given = [*run.size(larger, []), "--device", cpu_or_auto(run), "--warmup", "2"]
    ways: dict[str, tuple[type[ImageTrainer], list[str]]] = {
        "plain": (ImageTrainer, []),
        "DDP": (ImageTrainer, []),
        "FSDP 2": (Sharded, ["--shard"]),
    }
    for pieces, precision in itertools.product((1, 2), run.size(("fp32", "bf16"), ("fp32",))):
        losses: dict[str, list[float]] = {}
        tolerance = {"fp32": 1e-4, "bf16": 2e-2}[precision]
        for name, (kind, more) in ways.items():
            out = run.folder / f"{name} {pieces} {precision}"
            more = [*given, *more, "--accumulate", str(pieces), "--precision", precision]
            arguments = image_runs.arguments(data, out, 20, *more)
            with one_process() if name != "plain" else contextlib.nullcontext():
                losses[name], backend = losses_and_backend(kind, arguments, name)
            if name == "plain":
                continue
            expected = {"cuda": "nccl", "cpu": "gloo"}[run.device]
            check(backend == expected, f"backend of {name}", expected, backend)
            case = f"{name}, {backend}, {pieces} pieces, {precision}"
            yield (
                case,
                {"difference": check_losses(losses[name], losses["plain"], tolerance, case)},
            )


def losses_and_backend(
    kind: type[ImageTrainer], arguments: list[str], name: str
) -> tuple[list[float], str | None]:
    """Train five iterations; return the losses and the backend of the process group, if any.

    Raises:
        WrongError: the trainer is not wrapped as `name` says.
    """
    trainer = kind(image_runs.parse(arguments))
    if name == "DDP":
        wrapped = isinstance(trainer.prepared, DistributedDataParallel)
        check(wrapped, "the trainer's module", "DDP", type(trainer.prepared).__name__)
    if name == "FSDP 2":
        weight = next(trainer.model.parameters())
        check(local(weight) is not weight, "a weight", "a DTensor", type(weight).__name__)
    losses = image_runs.losses_of(trainer, 5)
    trainer.sampling_model()  # gathers the averages
    group = torch.distributed.is_initialized()
    return losses, torch.distributed.get_backend() if group else None
