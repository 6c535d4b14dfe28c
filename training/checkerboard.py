"""Train a Gaussian-mixture flow model on the 2-D checkerboard, from the repository's root:

    python -m training.checkerboard                                  # GMFlow's settings: transition loss, AdamW, EMA
    python -m training.checkerboard --preset minimal                 # Adam, plain velocity NLL, no EMA
    python -m training.checkerboard --preset flow-matching           # K = 1 with unit variance: the baseline
    python -m training.checkerboard --out outputs/k16 -k 16 --batch-size 1024 --iterations 20000
    python -m training.checkerboard --evaluate outputs/checkerboard/model.safetensors
    torchrun --nproc-per-node 2 -m training.checkerboard             # DDP on two GPUs; with --device cpu on one machine's CPU

Started again with the same --out, a run goes on from its last checkpoint, to the very losses of a run that was never
stopped. OUT/model.safetensors is the checkpoint to resume from, and loads in ComfyUI at any time. At the end OUT/report.png
and OUT/report.json say how good the samples are, and OUT/weights.safetensors is the model to share: weights alone, in
float16, with these figures in its metadata.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from gmflow_core.checkerboard import draw_checkerboard
from gmflow_core.checkpoint import load_checkpoint, load_training_state, read_metadata, save_checkpoint
from gmflow_core.losses import nll, transition_nll
from gmflow_core.models.mlp import GMFlowMLP, GMFlowMLPConfig
from gmflow_core.path import diffuse, forward_transition
from gmflow_core.pictures import density_picture
from gmflow_core.points import sample_points
from training.checkerboard_report import MIN_SIGMA, write_report

PICTURE_SAMPLES = 10_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Checkerboard training. The defaults shown are those of the chosen preset."""

    preset: Literal["full", "minimal", "flow-matching"] = "full"
    """Where the other defaults come from."""
    out: Path = Path("outputs/checkerboard")
    """Folder for the checkpoint, the TensorBoard logs and the report; a run found there is resumed."""
    num_components: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 64
    """K, the number of Gaussians."""
    constant_log_std: float | None = None
    """Fix the mixture's log-std instead of learning it; 0 with K = 1 is ordinary flow matching."""
    transition_ratio: float | None = 0.9
    """How far down the transition loss looks, (sigma_high - sigma_low) / sigma_high in (0, 1]; None: plain velocity NLL."""
    batch_size: int = 4096
    """Samples an iteration, over all processes together."""
    iterations: int = 200_000
    """Iterations in all."""
    lr: float = 2e-4
    """Peak learning rate."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """What the learning rate does after the warm-up: stay, or fall to zero at the last iteration."""
    warmup: int = 1000
    """Iterations of linear learning-rate warm-up, from 0.001 of the peak."""
    optimizer: Literal["adamw", "adam"] = "adamw"
    """AdamW (without weight decay) or Adam."""
    ema: bool = True
    """Keep the power-function average of the weights, decay (1 - 1/t)^8, and sample with it."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Matrix products in float32 or bfloat16; weights, optimiser and mixture are float32 either way."""
    seed: int = 0
    """Seed of the weights and of the data."""
    device: str = "auto"
    """auto (what accelerate finds) or cpu."""
    checkpoint_every: int = 1000
    """Iterations between checkpoints."""
    log_every: int = 100
    """Iterations between points of the loss curve."""
    picture_every: int = 5000
    """Iterations between pictures of 4-step samples in TensorBoard."""
    restart: bool = False
    """Throw away the run found in OUT and start anew."""
    evaluate: Path | None = None
    """Only write the report of this checkpoint, into --out or, without it, beside the checkpoint."""
    eval_samples: int = 200_000
    """Samples per solver and step count in the report."""

    def __post_init__(self):
        for name in ("batch_size", "iterations", "checkpoint_every", "log_every", "picture_every", "eval_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if self.transition_ratio is not None and not 0 < self.transition_ratio <= 1:
            raise ValueError(f"--transition-ratio is {self.transition_ratio}; it must be in (0, 1], or None")
        if self.warmup < 0:
            raise ValueError(f"--warmup is {self.warmup}; it must be 0 or more")
        if not self.lr > 0:
            raise ValueError(f"--lr is {self.lr}; it must be positive")
        if self.device not in ("auto", "cpu"):
            raise ValueError(f"--device is {self.device!r}; give auto or cpu (choose a GPU with CUDA_VISIBLE_DEVICES)")


PRESETS = {
    "full": Config(),
    "minimal": Config(
        preset="minimal", num_components=32, transition_ratio=None, optimizer="adam", ema=False, warmup=0, iterations=50_000
    ),
    "flow-matching": Config(preset="flow-matching", num_components=1, constant_log_std=0.0, transition_ratio=None),
}
# A resumed run may differ in these from the run it goes on with.
FREE_TO_CHANGE = {"out", "iterations", "precision", "device", "checkpoint_every", "log_every", "picture_every"}
FREE_TO_CHANGE |= {"restart", "evaluate", "eval_samples"}


def parse(arguments: list[str]) -> Config:
    """The preset, then whatever the command line changes of it."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--preset", default="full")
    preset = PRESETS.get(finder.parse_known_args(arguments)[0].preset, Config())
    return tyro.cli(Config, default=preset, args=arguments, prog="python -m training.checkerboard", description=__doc__)


def learning_rate(config: Config, step: int) -> float:
    """The learning rate of iteration `step`, counted from 0."""
    if step < config.warmup:
        return config.lr * (0.001 + 0.999 * step / config.warmup)
    if config.lr_schedule == "constant":
        return config.lr
    done = (step - config.warmup) / max(1, config.iterations - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def draw_batch(config: Config, generator: torch.Generator) -> dict[str, Tensor]:
    """The whole batch of one iteration, from the CPU generator that all processes share."""

    def normal():
        return torch.randn(config.batch_size, 2, generator=generator)

    x0 = draw_checkerboard(config.batch_size, generator)
    sigma_high = torch.rand(config.batch_size, generator=generator).clamp(min=MIN_SIGMA)
    if config.transition_ratio is None:
        noise = normal()
        return {"x": diffuse(x0, sigma_high, noise), "sigma": sigma_high, "velocity": noise - x0}
    sigma_low = sigma_high * (1 - config.transition_ratio)
    x_low = diffuse(x0, sigma_low, normal())
    x_high = forward_transition(x_low, sigma_low, sigma_high, normal())
    return {"x": x_high, "sigma": sigma_high, "x_low": x_low, "sigma_low": sigma_low}


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean loss of the batch, in nats per point without the 2 pi constant."""
    mixture = model(batch["x"], batch["sigma"])
    if "velocity" in batch:
        return nll(mixture, batch["velocity"]).mean()
    return transition_nll(mixture, batch["x_low"], batch["x"], batch["sigma_low"], batch["sigma"]).mean()


class Trainer:
    """Everything that a checkpoint has to hold, and the loop."""

    def __init__(self, config: Config):
        self.config = config
        self.accelerator = Accelerator(
            cpu=config.device == "cpu", mixed_precision="bf16" if config.precision == "bf16" else "no"
        )
        self.path = config.out / "model.safetensors"
        torch.manual_seed(config.seed)
        model_config = GMFlowMLPConfig(num_components=config.num_components, constant_log_std=config.constant_log_std)
        self.model = GMFlowMLP(model_config).to(self.accelerator.device)
        cls = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[config.optimizer]
        self.optimizer = cls(self.model.parameters(), lr=config.lr, weight_decay=0.0, fused=True)
        self.ema = AveragedModel(self.model, multi_avg_fn=power_ema) if config.ema else None
        self.generator = torch.Generator().manual_seed(config.seed + 1)
        self.step = 0
        self.stop = False  # set by a signal, obeyed between iterations
        self.starts: list[dict] = []  # every command that this run was started with, and at which iteration
        self.seconds = 0.0  # spent training, over all the starts of this run
        if self.accelerator.is_main_process:
            for leftover in config.out.glob(f".{self.path.name}.*.tmp"):  # of a process killed while it wrote
                leftover.unlink()
        if self.path.exists() and not config.restart:
            self.resume()
        command = "python -m training.checkerboard " + shlex.join(sys.argv[1:])
        if not self.starts or self.starts[-1]["command"] != command:
            self.starts.append({"command": command, "step": self.step})
        self.prepared = self.accelerator.prepare(self.model)

    @property
    def sampling_model(self) -> GMFlowMLP:
        """The average of the weights, or the weights themselves in a run without EMA."""
        return self.ema.module if self.ema is not None else self.model

    def run(self) -> None:
        config, main = self.config, self.accelerator.is_main_process
        writer = SummaryWriter(str(config.out), purge_step=self.step + 1 if self.step else None) if main else None
        bar = tqdm(total=config.iterations, initial=self.step, disable=not main, unit="it", dynamic_ncols=True)
        losses: list[Tensor] = []
        try:
            with stop_signals(self):
                while self.step < config.iterations and not self.stop:
                    started = time.perf_counter()
                    losses.append(self.iterate())
                    self.seconds += time.perf_counter() - started
                    bar.update()
                    last = self.step == config.iterations
                    log, save = (last or self.step % every == 0 for every in (config.log_every, config.checkpoint_every))
                    if log or save:
                        loss = self.finite_mean(losses)
                    if log:
                        losses.clear()
                        bar.set_postfix(loss=f"{loss:.4f}")
                        if writer:
                            writer.add_scalar("loss", loss, self.step)
                            writer.add_scalar("learning_rate", learning_rate(config, self.step - 1), self.step)
                    if writer and self.step % config.picture_every == 0:
                        points = sample_points(self.sampling_model, PICTURE_SAMPLES, solver="gm-sde", steps=4)
                        writer.add_image("samples", density_picture(points, bins=64), self.step, dataformats="HWC")
                    if save:
                        self.save()
                if self.stop:
                    if losses:
                        self.finite_mean(losses)
                    self.save()
        finally:
            bar.close()
            if writer:
                writer.close()
        if self.stop:
            print(f"stopped at iteration {self.step}; run the same command again to go on")

    def finite_mean(self, losses: list[Tensor]) -> float:
        """The mean of the losses, over all processes.

        Raises:
            FloatingPointError: it is not finite.
        """
        loss = self.accelerator.reduce(torch.stack(losses).mean(), "mean").item()
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss} at iteration {self.step}; {self.path} still holds the last good checkpoint: "
                "lower --lr, or use --precision fp32"
            )
        return loss

    def iterate(self) -> Tensor:
        """One optimiser step; returns its loss, not yet synchronised."""
        config, acc = self.config, self.accelerator
        share = slice(acc.process_index, None, acc.num_processes)
        batch = {k: v[share].to(acc.device) for k, v in draw_batch(config, self.generator).items()}
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step)
        self.optimizer.zero_grad()
        loss = loss_of(self.prepared, batch)
        acc.backward(loss)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        self.step += 1
        return loss.detach()

    def settings(self) -> dict:
        """The configuration, as JSON holds it."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(self.config).items()}

    def facts(self) -> dict:
        """How the model was made, for the checkpoint's metadata."""
        return {
            "command": self.starts[-1]["command"],
            "starts": self.starts,
            "config": self.settings(),
            "step": self.step,
            "seconds": round(self.seconds, 1),
            "torch": torch.__version__,
        }

    def save(self) -> None:
        """Write the checkpoint, from the main process only."""
        if self.accelerator.is_main_process:
            state = {"rng": self.generator.get_state(), "step": torch.tensor(self.step)}
            state.update({f"model.{name}": t for name, t in self.model.state_dict().items()})
            for index, slots in self.optimizer.state_dict()["state"].items():
                state.update({f"optimizer.{index}.{slot}": t for slot, t in slots.items()})
            save_checkpoint(self.sampling_model, self.path, facts=self.facts(), state=state)
        self.accelerator.wait_for_everyone()

    def export(self) -> None:
        """Write the weights to share, and their report."""
        path, facts = self.config.out / "weights.safetensors", self.facts()
        save_checkpoint(self.sampling_model, path, facts=facts, dtype=torch.float16)
        report = write_report(path, self.config.out, self.config.eval_samples, device=self.config.device)
        save_checkpoint(self.sampling_model, path, facts={**facts, "report": report}, dtype=torch.float16)

    def resume(self) -> None:
        """Go on from the checkpoint in OUT.

        Raises:
            ValueError: it belongs to a run with other settings, or holds no training state.
        """
        facts, state = read_metadata(self.path)["training"], load_training_state(self.path)
        if "step" not in state or "config" not in facts:
            raise ValueError(f"{self.path} holds weights only; give another --out, or --restart to overwrite it")
        mine = self.settings()
        differ = [k for k in mine if k not in FREE_TO_CHANGE and facts["config"].get(k) != mine[k]]
        if differ:
            changes = ", ".join(f"{k}: {facts['config'].get(k)} there, {mine[k]} here" for k in differ)
            raise ValueError(
                f"{self.path} belongs to a run with other settings ({changes}); give another --out, the same settings to "
                "go on, or --restart to throw it away"
            )
        self.model.load_state_dict({k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")})
        slots: dict[int, dict[str, Tensor]] = {}
        for key, value in state.items():
            if key.startswith("optimizer."):
                _, index, slot = key.split(".")
                slots.setdefault(int(index), {})[slot] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": slots})
        if self.ema is not None:
            self.ema.module.load_state_dict(load_checkpoint(self.path)[0].state_dict())
            self.ema.n_averaged.fill_(int(state["step"]))
        self.generator.set_state(state["rng"])
        self.step, self.seconds, self.starts = int(state["step"]), facts["seconds"], facts.get("starts", [])
        if self.accelerator.is_main_process:
            print(f"going on from iteration {self.step} of {self.path}")
            before = facts["config"]["iterations"]
            if self.config.lr_schedule == "cosine" and before != self.config.iterations:
                print(
                    f"note: the learning rate followed a cosine over {before} iterations until now, and will over "
                    f"{self.config.iterations} from here"
                )


@contextmanager
def stop_signals(trainer: Trainer) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM stop the run after the iteration under way, so that what is saved is whole. Several processes
    would not stop at the same iteration: they are killed, and go on from their last checkpoint."""
    if trainer.accelerator.num_processes > 1 or threading.current_thread() is not threading.main_thread():
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


@torch.no_grad()
def power_ema(average: list[Tensor], current: list[Tensor], count: Tensor) -> None:
    """EMA with decay (1 - 1/t)^8 at the t-th update (Karras et al. 2024, power-function profile with gamma = 7)."""
    torch._foreach_lerp_(average, current, 1 - (1 - 1 / (count.item() + 1)) ** 8)


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        config = parse(arguments)
        if config.evaluate is not None:
            chosen = any(a.split("=")[0] == "--out" for a in arguments)
            out = config.out if chosen else config.evaluate.parent
            write_report(config.evaluate, out, config.eval_samples, device=config.device)
            return
        trainer = Trainer(config)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
    try:
        trainer.run()
    except FloatingPointError as error:
        raise SystemExit(f"error: {error}") from error
    if trainer.stop:
        raise SystemExit(130)
    if trainer.accelerator.is_main_process:
        trainer.export()


if __name__ == "__main__":
    main()
