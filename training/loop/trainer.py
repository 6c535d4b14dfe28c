"""The loop that all training commands share: one process or many, checkpoints, exact resume, the average of the weights.

A command's trainer says what its model, its batches and its losses are. A run writes OUT/model.safetensors: the averaged
weights, which load anywhere, and, under names that begin with `training.`, all that is needed to go on to the very losses of
a run that was never stopped.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from gmflow_core.files.checkpoint import (
    load_checkpoint,
    load_training_state,
    read_metadata,
    save_checkpoint,
)
from training.common.devices import keep_freed_memory, on_cpu
from training.loop.config import TrainerConfig
from training.loop.sharding import check_accelerate, distribute_like, local, math_attention, whole

MAX_BAD_STEPS = 10  # this many steps in a row without a finite gradient end a run


class Trainer:
    """A run: everything that a checkpoint has to hold, and the loop.

    A subclass gives the class attributes below, and `new_model`, `backward`, `decay`; perhaps `new_optimizer`, `draw_picture`,
    `extra_state`, `data`.
    """

    module = ""  # as in python -m MODULE
    free_to_change = frozenset(  # a resumed run may differ in these from the run it goes on with
        {
            "out",
            "iterations",
            "precision",
            "device",
            "shard",
            "checkpoint_every",
            "log_every",
            "picture_every",
            "restart",
        }
    )
    clip: float = math.inf  # largest norm of the gradient

    def __init__(self, config: TrainerConfig):
        self.config = config
        self.accelerator = Accelerator(
            cpu=on_cpu(config.device), mixed_precision="no"
        )  # the trainer's own autocast does it
        check_accelerate(self.accelerator)
        if self.accelerator.device.type == "cpu":
            keep_freed_memory()
        self.path = config.out / "model.safetensors"
        torch.manual_seed(config.seed)
        self.model = self.new_model().to(self.accelerator.device)
        self.prepared = self.prepare()
        self.optimizer = self.new_optimizer()  # of the parts of the weights that are left here
        self.step = 0
        self.skipped = 0  # steps without a finite gradient, in all
        self.bad_steps = 0  # and in a row
        self.finite: list[
            Tensor
        ] = []  # whether the gradient was, in the steps that are not in these counts yet
        self.stop = False  # set by a signal, obeyed between iterations
        self.starts: list[
            dict
        ] = []  # every command that this run was started with, and at which iteration
        self.seconds = 0.0  # spent training, over all the starts of this run
        self.average = [p.detach().clone() for p in self.model.parameters()] if config.ema else None
        if self.accelerator.is_main_process:
            for leftover in config.out.glob(
                f".{self.path.name}.*.tmp"
            ):  # of a process killed while it wrote
                leftover.unlink()
        if self.path.exists() and not config.restart:
            self.resume()
        steps = self.accelerator.gather(
            torch.tensor([self.step], device=self.accelerator.device)
        ).tolist()
        if len(set(steps)) > 1:
            raise ValueError(
                f"the processes found runs at different iterations in --out {config.out}: {steps}; it must be one folder that "
                "all machines share"
            )
        command = f"python -m {self.module} " + shlex.join(sys.argv[1:])
        if not self.starts or self.starts[-1]["command"] != command:
            self.starts.append({"command": command, "step": self.step})

    # What a subclass says

    def new_model(self) -> nn.Module:
        """A model of `gmflow_core.models`, with fresh weights."""
        raise NotImplementedError

    def objective(self) -> nn.Module:
        """The module whose forward pass is the loss; it holds the model, and several processes share its gradients."""
        return self.model

    def blocks(self) -> Iterable[nn.Module]:
        """The parts of the model whose weights are gathered together when they are shared out among processes."""
        return ()

    def new_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            self.model.parameters(), lr=self.config.lr, weight_decay=0.0, fused=True
        )

    def backward(self) -> dict[str, Tensor]:
        """Leave the gradient of iteration `self.step` in the parameters; return its losses, "loss" first."""
        raise NotImplementedError

    def decay(self, step: int) -> float:
        """Decay of the average of the weights at iteration `step`, counted from 1."""
        raise NotImplementedError

    def draw_picture(self) -> Tensor | None:
        """A picture of samples, (H, W, 3) in [0, 1]."""
        return None

    def extra_state(self) -> dict[str, Tensor]:
        """What else a checkpoint has to hold."""
        return {}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        """Take up `extra_state`."""

    def data(self) -> dict[str, Any]:
        """What the model's samples are, for the checkpoint's metadata."""
        return {}

    # The loop

    def run(self) -> None:
        config, main = self.config, self.accelerator.is_main_process
        writer = SummaryWriter(str(config.out), purge_step=self.step + 1) if main else None
        bar = tqdm(
            total=config.iterations,
            initial=self.step,
            disable=not main,
            unit="it",
            dynamic_ncols=True,
        )
        pending: list[dict[str, Tensor]] = []  # losses since the last point of the curve
        try:
            with stop_signals(self):
                while self.step < config.iterations and not self.stop:
                    started = time.perf_counter()
                    pending.append(self.iterate())
                    bar.update()
                    last = self.step == config.iterations
                    log = last or self.step % config.log_every == 0
                    if log:
                        self.count_skipped()
                        means = self.mean_losses(pending)
                        pending.clear()
                    self.seconds += time.perf_counter() - started
                    if log:
                        bar.set_postfix(loss=f"{means['loss']:.4f}", skipped=self.skipped)
                        if writer:
                            for name, value in means.items():
                                writer.add_scalar(name, value, self.step)
                            writer.add_scalar(
                                "learning_rate", learning_rate(config, self.step - 1), self.step
                            )
                            writer.add_scalar("skipped_steps", self.skipped, self.step)
                    if last or self.step % config.checkpoint_every == 0:
                        self.save()
                    if self.step % config.picture_every == 0 or (
                        last and config.picture_every <= config.iterations
                    ):
                        picture = self.draw_picture()
                        if writer and picture is not None:
                            writer.add_image("samples", picture, self.step, dataformats="HWC")
                if self.stop:
                    self.save()
        finally:
            bar.close()
            if writer:
                writer.close()
        if self.stop:
            print(f"stopped at iteration {self.step}; run the same command again to go on")

    def iterate(self) -> dict[str, Tensor]:
        """One optimiser step; returns its losses, not yet averaged over the processes. Without a finite gradient the weights
        stay as they are (their average goes on towards them), and the step will count as skipped: `count_skipped` looks at the
        next log or checkpoint, as nothing here waits for a GPU but 8-bit and sharded optimisers."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        self.optimizer.zero_grad()
        with math_attention() if self.accelerator.device.type == "cpu" else nullcontext():
            losses = self.backward()
        self.update(self.clip_gradient().isfinite())
        self.step += 1
        return losses

    def clip_gradient(self) -> Tensor:
        """Scale the gradient down to the norm `clip` where it is larger; its norm before."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = whole(torch.nn.utils.get_total_norm([p.grad for p in parameters]))
        if self.clip < math.inf:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.clip, norm)
        return norm

    def update(self, finite: Tensor) -> None:
        """Move the weights by the gradient of iteration `self.step`, if it is finite, and their average."""
        self.finite.append(finite)
        kernel_looks = self.optimizer.defaults.get("fused") and self.accelerator.device.type in (
            "cpu",
            "cuda",
        )
        if kernel_looks and not self.config.shard:
            self.optimizer.found_inf = (~finite).float()
            self.optimizer.step()
        elif finite:
            self.optimizer.step()
        if self.average is not None:
            pairs = zip(self.average, self.model.parameters(), strict=True)
            average, current = zip(*((local(a), local(p.detach())) for a, p in pairs), strict=True)
            torch._foreach_lerp_(average, current, 1 - self.decay(self.step + 1))

    def count_skipped(self) -> None:
        """Bring `skipped` and `bad_steps` up to date.

        Raises:
            FloatingPointError: there was no finite gradient for `MAX_BAD_STEPS` steps in a row.
        """
        most = 0
        for finite in torch.stack(self.finite).tolist() if self.finite else []:
            self.skipped += not finite
            self.bad_steps = 0 if finite else self.bad_steps + 1
            most = max(most, self.bad_steps)
        self.finite.clear()
        if most >= MAX_BAD_STEPS:
            raise FloatingPointError(
                f"the gradient was not finite for {MAX_BAD_STEPS} steps in a row before iteration {self.step}; "
                + (
                    f"{self.path} still holds the last good checkpoint: "
                    if self.path.exists()
                    else "nothing is saved yet: "
                )
                + "lower --lr (in another --out), use --precision fp32, or look for broken values in the data"
            )

    def mean_losses(self, losses: list[dict[str, Tensor]]) -> dict[str, float]:
        """The mean of each loss over the iterations that have a finite one, and over all processes; NaN if none has."""
        table = torch.stack(
            [torch.stack([v.detach().float() for v in entry.values()]) for entry in losses]
        )
        table = self.accelerator.reduce(table, "mean")
        means = table[table.isfinite().all(1)].mean(0).tolist()
        return dict(zip(losses[0], means, strict=True))

    def autocast(self):
        """Where the network runs: matrix products in the precision that the user asked for."""
        return torch.autocast(
            self.accelerator.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"
        )

    # State

    def prepare(self) -> nn.Module:
        """The objective, ready for several processes: DDP, or FSDP 2 with --shard."""
        objective = self.objective()
        if not self.config.shard:
            return self.accelerator.prepare(objective)
        if self.accelerator.num_processes == 1:
            raise ValueError(
                "--shard divides the weights among processes, and there is one; start several with torchrun"
            )
        for block in self.blocks():
            fully_shard(block)
        return fully_shard(objective)

    def gradient_of_piece(self, last: bool):
        """The context of a piece of a batch: gradients are added up here, and over the processes with the last piece."""
        if self.config.shard:
            self.prepared.set_requires_gradient_sync(last)
        return (
            nullcontext() if last or self.config.shard else self.accelerator.no_sync(self.prepared)
        )

    def names(self) -> list[str]:
        """The parameters' names, in order."""
        return [name for name, _ in self.model.named_parameters()]

    def sampling_model(self) -> nn.Module:
        """The average of the weights, or the weights themselves in a run without, as an ordinary model in evaluation mode."""
        weights = list(self.model.parameters()) if self.average is None else self.average
        tensors = {**self.model.state_dict(), **dict(zip(self.names(), weights, strict=True))}
        with torch.device("meta"):
            model = type(self.model)(self.model.config)
        model.load_state_dict({name: whole(t.detach()) for name, t in tensors.items()}, assign=True)
        return model.eval().requires_grad_(False)

    def settings(self) -> dict:
        """The configuration, as JSON holds it."""
        values = dataclasses.asdict(self.config)
        return {
            k: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v
            for k, v in values.items()
        }

    def facts(self) -> dict:
        """How the model was made, for the checkpoint's metadata."""
        return {
            "command": self.starts[-1]["command"],
            "starts": self.starts,
            "config": self.settings(),
            "step": self.step,
            "skipped_steps": self.skipped,
            "seconds": round(self.seconds, 1),
            "torch": torch.__version__,
        }

    def save(self) -> None:
        """Write the checkpoint: all processes gather it, the main one writes. Nothing is written if the weights are not finite,
        so that the last good state stays."""
        self.count_skipped()
        if self.bad_steps and not all(
            local(p.detach()).isfinite().all() for p in self.model.parameters()
        ):
            return
        names = {id(p): name for name, p in self.model.named_parameters()}
        state = {
            "step": torch.tensor(self.step),
            "skipped": torch.tensor(self.skipped),
            **self.extra_state(),
        }
        state.update({f"model.{name}": whole(t) for name, t in self.model.state_dict().items()})
        for parameter, slots in self.optimizer.state.items():
            name = names[id(parameter)]
            state.update(
                {f"optimizer.{name}/{slot}": whole(torch.as_tensor(t)) for slot, t in slots.items()}
            )
        sampling = self.sampling_model()
        if self.accelerator.is_main_process:
            save_checkpoint(sampling, self.path, facts=self.facts(), state=state, data=self.data())
        self.accelerator.wait_for_everyone()

    def optimized(self) -> list[tuple[str, Tensor]]:
        """The optimiser's parameters, with their names, in its order."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        return [(names[id(p)], p) for group in self.optimizer.param_groups for p in group["params"]]

    def resume(self) -> None:
        """Go on from the checkpoint in OUT.

        Raises:
            ValueError: it belongs to a run with other settings, or holds no training state.
        """
        facts, state = read_metadata(self.path)["training"], load_training_state(self.path)
        if "step" not in state or "config" not in facts:
            raise ValueError(
                f"{self.path} holds weights only; give another --out, or --restart to overwrite it"
            )
        mine = self.settings()
        differ = [
            k for k in mine if k not in self.free_to_change and facts["config"].get(k) != mine[k]
        ]
        if differ:
            changes = ", ".join(
                f"{k}: {facts['config'].get(k)} there, {mine[k]} here" for k in differ
            )
            raise ValueError(
                f"{self.path} belongs to a run with other settings ({changes}); give another --out, the same settings to "
                "go on, or --restart to throw it away"
            )
        self.load_state(state)
        if self.average is not None:
            averaged = dict(load_checkpoint(self.path)[0].named_parameters())
            for name, mine in zip(self.names(), self.average, strict=True):
                local(mine).copy_(local(distribute_like(averaged[name].data, mine)))
        self.load_extra_state(state)
        self.step, self.skipped = int(state["step"]), int(state["skipped"])
        self.seconds, self.starts = facts["seconds"], facts.get("starts", [])
        if self.accelerator.is_main_process:
            print(f"going on from iteration {self.step} of {self.path}")
            before = facts["config"]["iterations"]
            if self.config.lr_schedule == "cosine" and before != self.config.iterations:
                print(
                    f"note: the learning rate followed a cosine over {before} iterations until now, and will over "
                    f"{self.config.iterations} from here"
                )

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The weights and the optimiser's slots out of a checkpoint."""
        model = {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
        slots: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            if key.startswith("optimizer."):
                name, slot = key.removeprefix("optimizer.").split("/")
                slots.setdefault(name, {})[slot] = value
        self.model.load_state_dict(
            {name: distribute_like(model[name], t) for name, t in self.model.state_dict().items()}
        )
        numbered = {}
        for index, (name, parameter) in enumerate(self.optimized()):
            for slot, value in slots.get(name, {}).items():
                if slot == "step":  # bitsandbytes counts in an int
                    value = int(value) if "state1" in slots[name] else value
                elif value.shape == parameter.shape:
                    value = distribute_like(value, parameter)
                numbered.setdefault(index, {})[slot] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": numbered})


def learning_rate(config: TrainerConfig, step: int) -> float:
    """The learning rate of iteration `step`, counted from 0."""
    if step < config.warmup:
        return config.lr * (0.001 + 0.999 * step / config.warmup)
    if config.lr_schedule == "constant":
        return config.lr
    done = (step - config.warmup) / max(1, config.iterations - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


@contextmanager
def stop_signals(trainer: Trainer) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM stop the run after the iteration under way, so that what is saved is whole. Several processes
    would not stop at the same iteration: they are killed, and go on from their last checkpoint."""
    if (
        trainer.accelerator.num_processes > 1
        or threading.current_thread() is not threading.main_thread()
    ):
        yield
        return

    def stop(number: int, frame: object) -> None:
        trainer.stop = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(new_trainer: Callable[[], Trainer]) -> Trainer:
    """Make the trainer and run it, with errors a user can act on; exits with status 130 when the user stops it."""
    try:
        trainer = new_trainer()
        trainer.run()
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        raise SystemExit(f"error: {error}") from error
    except torch.OutOfMemoryError as error:
        raise SystemExit(
            f"error: {error}\nThe batch does not fit this device's memory: give --accumulate a larger number (the batch stays "
            "the same), --gradient-checkpointing, or --shard with several processes"
        ) from error
    if trainer.stop:
        raise SystemExit(130)
    return trainer
