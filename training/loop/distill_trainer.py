"""Train a student of few network calls by imitation distillation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gmflow_core.files.atomic import atomic_write
from gmflow_core.files.checkpoint import load_checkpoint, read_metadata, save_checkpoint
from gmflow_core.files.errors import quoted
from gmflow_core.files.hub import tidy_source
from gmflow_core.flow.imitation import MIN_TIME, ImitationSettings, segment_at, segments
from gmflow_core.flow.path import diffuse, shift_time
from gmflow_core.gaussians.quantile import normal_cdf
from gmflow_core.models.mlp import GMFlowMLP
from gmflow_core.models.student import new_student
from gmflow_core.pictures import image_grid, to_image
from gmflow_core.source.files import load_source
from gmflow_core.source.mode_frame import ModeFrame
from training.common.processes import loader_workers, together
from training.data.batches import Order, batch_loader, draw_noise, pieces_of, rows_of
from training.data.shards import LatentDataset
from training.evaluation.models import fingerprint
from training.loop.config import VALIDATION
from training.loop.curves import MEDIAN, Curves
from training.loop.decoding import decoded, load_decoder
from training.loop.distill_presets import DistillConfig
from training.loop.imitation_objective import (
    Imitation,
    numbers_of,
    takes_labels,
    teacher_velocity,
)
from training.loop.optimizer import eight_bit_problem, new_adamw, power_decay
from training.loop.student_samples import StudentSamples
from training.loop.trainer import Trainer
from training.loop.validation import Validation

WEIGHTS = "weights.safetensors"  # in OUT: the model to share
FEW_STEPS = "few_steps"  # entry of a student's data record
PICTURE_COLUMNS = 10
GROWTH = 10.0  # of the median loss over its lowest, from which on a run counts as diverging


class DistillTrainer(Trainer):
    """A run that distils a teacher into a student of `config.steps` calls.

    Raises:
        FileNotFoundError: the teacher, the data or the source is missing.
        ValueError: they do not fit each other or the settings, or as `Trainer`.
    """

    module = "training.distill"
    free_to_change = Trainer.free_to_change | {
        "teacher",
        "data",
        "source",
        "accumulate",
        "gradient_checkpointing",
        "workers",
        "vae",
        *VALIDATION,
    }
    config: DistillConfig

    def __init__(self, config: DistillConfig):
        self.config = config
        self.check_out()
        self.record = read_metadata(config.teacher)
        self.mark = fingerprint(config.teacher, self.record["config"])
        self.teacher, _ = load_checkpoint(config.teacher)
        self.about = self.record["data"]
        self.dataset = None if config.data is None else LatentDataset(config.data)
        self.source = None if config.source is None else load_source(config.source)
        self.settings_of_loss = ImitationSettings(
            config.states, config.window, config.substeps, config.dropout, config.time_shift
        )
        self.check_teacher()
        super().__init__(config)
        acc = self.accelerator
        self.rows = rows_of(
            acc.process_index, acc.num_processes, config.batch_size, config.accumulate
        )
        self.teacher = self.teacher.to(acc.device)
        if self.source is not None:
            self.source = self.source.to(acc.device)
        self.batches: Iterator | None = None
        self.samples = StudentSamples(config, self.teacher, self.num_labels, self.source)
        self.lowest = math.inf  # median loss of a log, since this start
        self.vae: Any = None
        checks = config.validation_interval
        latents = not self.samples.of_points and self.about.get("space") != "pixels"
        with together(acc.state):
            if config.vae is not None and (checks or acc.is_main_process):
                self.vae = load_decoder(config.vae, acc.device, self.shape if latents else None)
        if checks:
            self.validation = self.new_validation()

    def new_validation(self) -> Validation:
        """Return the measurement of the student's samples.

        Raises:
            ValueError: they are no pictures; or as `Validation`.
        """
        config, vae = self.config, self.vae
        if self.samples.of_points:
            raise ValueError(
                f"{config.teacher} makes points, and validation is of pictures: leave out "
                "--features and --validate-every"
            )
        pixels = self.about.get("space", "pixels") == "pixels"
        if not pixels and vae is None:
            raise ValueError(
                f"{config.teacher} makes {self.about['space']}; give --vae, which decodes them, to "
                "validate"
            )
        known = (None, None) if pixels else (vae, config.vae)
        return Validation(config, self.shape, *known)

    def check_out(self) -> None:
        """Check that this run does not overwrite its teacher.

        Raises:
            ValueError: it would.
        """
        config = self.config
        teacher = Path(tidy_source(config.teacher)).resolve()
        if teacher in [(config.out / name).resolve() for name in ("model.safetensors", WEIGHTS)]:
            raise ValueError(
                f"--out {config.out} is where the teacher {config.teacher} lies, and the student "
                "would overwrite it; give another --out"
            )

    def check_teacher(self) -> None:
        """Check that the teacher can be imitated with these settings.

        Raises:
            ValueError: it cannot; the message says what to change.
        """
        config, name = self.config, self.config.teacher
        few = self.about.get(FEW_STEPS)
        if few is not None:
            raise ValueError(
                f"{name} is a student of {few.get('steps')} calls itself, and knows only its own "
                "segments; give --teacher the model that it was distilled from"
            )
        source = self.about.get("source")
        if (source is None) != (self.source is None):
            need = "leave out --source" if source is None else "give --source that mixture source"
            what = "N(0, I) noise" if source is None else "the noise of a mixture source"
            raise ValueError(f"{name} was trained from {what}; {need}")
        if source is not None:
            self.source.require_record(source, name)
            if source["conditioning"] != "mode":
                raise ValueError(
                    f"{name} does not know the modes of its source, so that a mixture at its "
                    "output has no closed form; distil a model trained with --mode-conditional"
                )
            self.source.frame([0])  # raises unless the modes are spherical
        if isinstance(self.teacher, GMFlowMLP) and self.teacher.config.num_classes:
            raise ValueError(f"{name} is a network of labelled points; give one without labels")
        if config.teacher_guidance() is not None:
            if not self.has_null_class:
                raise ValueError(
                    f"{name} has no label for no class, which --guidance needs; omit it"
                )
            if not self.num_labels:
                raise ValueError(f"{name} was trained without labels; omit --guidance")
        if self.dataset is not None and self.dataset.shape != self.shape:
            raise ValueError(
                f"{config.data} holds samples of shape {self.dataset.shape}, and {name} makes "
                f"some of {self.shape}; give --data what it was trained on, or leave it out"
            )
        space = self.about.get("space")
        if None not in (self.dataset, space) and (space, self.dataset.kind).count("pixels") == 1:
            raise ValueError(
                f"{config.data} holds {self.dataset.kind}, and {name} makes {space}; give --data "
                "what it was trained on, or leave it out"
            )
        if self.dataset is not None and 0 < self.num_labels < len(self.dataset.classes):
            raise ValueError(
                f"{config.data} holds {len(self.dataset.classes)} classes, and {name} knows "
                f"{self.num_labels}; give --data what it was trained on, or leave it out"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a sample: (C, h, w), or (2,) for points."""
        size = getattr(self.teacher.config, "latent_size", None)
        return (self.teacher.channels, *([] if size is None else [size, size]))

    @property
    def has_null_class(self) -> bool:
        """True if the teacher has a label for no class."""
        config = self.teacher.config
        if isinstance(self.teacher, GMFlowMLP) or self.about.get("source") is not None:
            return False
        return config.num_classes > 0 and getattr(config, "null_class", True)

    @property
    def num_labels(self) -> int:
        """Number of labels to draw from: classes or modes; 0 if there are none."""
        return 0 if self.about.get("unlabelled") else self.teacher.config.num_classes

    # Parts of the trainer

    def new_model(self) -> nn.Module:
        """Create the student from the teacher."""
        config = self.config
        longest = max(size for _, size in segments(config.steps, config.final_step_size))
        dx = (longest, config.time_shift) if config.policy == "dx" else None
        student = new_student(self.teacher, config.num_components, dx)
        student.gradient_checkpointing = config.gradient_checkpointing
        return student.requires_grad_(True).train()

    def objective(self) -> nn.Module:
        """Return the loss of a segment, which holds the student."""
        return Imitation(self.model, self.settings_of_loss, self.autocast)

    def blocks(self) -> Iterable[nn.Module]:
        """Return the transformer blocks; points' networks have none."""
        return getattr(self.model, "transformer_blocks", ())

    def new_optimizer(self) -> torch.optim.Optimizer:
        """Create AdamW, with 8-bit state if the user asks for it or it runs here."""
        config, name = self.config, self.config.optimizer
        if name == "auto":
            problem = config.shard or eight_bit_problem(self.accelerator.device)
            name = "adamw" if problem else "adamw8bit"
        self.optimizer_name = name
        decay, eight_bit = config.weight_decay, name == "adamw8bit"
        return new_adamw(self.model, lr=config.lr, weight_decay=decay, eight_bit=eight_bit)

    @property
    def clip(self) -> float:
        """Largest norm of the gradient; infinite in the warm-up."""
        return self.config.clip if self.step >= self.config.warmup else torch.inf

    def settings(self) -> dict[str, Any]:
        """Return the configuration, with the teacher's fingerprint."""
        return {**super().settings(), "optimizer": self.optimizer_name, "fingerprint": self.mark}

    def resume(self) -> None:
        """Load the checkpoint in OUT.

        Raises:
            ValueError: it began from noise and this run from real samples, or the other way round;
                or as `Trainer`.
        """
        super().resume()
        before = read_metadata(self.path)["training"]["config"].get("data")
        if (before is None) != (self.config.data is None):
            change = "leave out --data" if before is None else f"give --data {quoted(before)}"
            raise ValueError(
                f"{self.path} belongs to a run {'without' if before is None else 'with'} --data; "
                f"{change} to go on, or give another --out"
            )

    def data_name(self) -> str:
        """Return who the teacher is, for a message."""
        return f" (now {self.config.teacher})"

    def decay(self, step: int) -> float:
        """Return the decay of the power-function profile."""
        return power_decay(step)

    # An iteration

    @property
    def teacher_ratio(self) -> float:
        """Share of each segment that follows the teacher's own path, at this iteration."""
        decay = self.config.decay_iterations
        return max(0.0, 1 - self.step / decay) if decay else 0.0

    def backward(self) -> dict[str, Tensor]:
        """Compute the gradients of an iteration piece by piece; return the mean loss."""
        config, acc, total = self.config, self.accelerator, 0.0
        parts = (
            [None] if self.dataset is not None else segments(config.steps, config.final_step_size)
        )
        for piece, rows in enumerate(pieces_of(self.rows, config.accumulate)):
            x, labels, frame, uniform = self.draw(rows, len(parts))
            teacher = teacher_velocity(
                self.teacher, labels, frame, config.teacher_guidance(), self.autocast
            )
            for number, part in enumerate(parts):
                x, start, size, weight = self.begin(x, part, uniform)
                last = piece + 1 == config.accumulate and number + 1 == len(parts)
                with self.gradient_of_piece(last=last):
                    drawn, uniform = uniform[:, : self.numbers], uniform[:, self.numbers :]
                    arguments = labels, frame, teacher, drawn, self.teacher_ratio
                    end = number + 1 < len(parts)
                    found = self.prepared(x, start, size, *arguments, end)
                    loss = found["loss"] * (weight / config.accumulate)
                    acc.backward(loss)
                x, total = found["x"], total + loss.detach()
        return {"loss": total}

    @property
    def numbers(self) -> int:
        """Uniform numbers of a segment, for each sample."""
        return numbers_of(self.settings_of_loss, self.config.num_components)

    def draw(
        self, rows: range, count: int
    ) -> tuple[Tensor, Tensor | None, ModeFrame | None, Tensor]:
        """Draw what an iteration needs for these rows of the batch.

        Args:
            count: segments.

        Returns:
            Noise, or with --data real samples, (B, C, *S); labels (B,), None for a network without
            any; the modes' frame; uniform numbers (B, n) for the segments.
        """
        config, device = self.config, self.accelerator.device
        noise = draw_noise(config.seed, self.step, rows, self.shape, device)
        more = 3 + count * self.numbers
        uniform = normal_cdf(draw_noise(config.seed + 1, self.step, rows, (more,), device))
        uniform = uniform.clamp(max=1 - 2**-24)
        which, drop, uniform = uniform[:, 0], uniform[:, 1], uniform[:, 2:]
        frame = None
        if self.source is not None:
            labels = self.source.draw_modes(len(rows), uniform=which)
            return noise, labels, self.source.frame(labels), uniform
        if not takes_labels(self.teacher):
            labels = None
        elif self.dataset is not None:
            noise, labels = self.real_samples(noise, rows, uniform)
        else:
            labels = (which * self.num_labels).long()
        if labels is not None and self.has_null_class:
            share = config.class_dropout if config.teacher_guidance() is None else 0.0
            none = (drop < share) | (self.num_labels == 0)
            labels = torch.where(none, self.teacher.config.num_classes, labels)
        return noise, labels, frame, uniform

    def real_samples(self, noise: Tensor, rows: range, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Return real samples, noisy as at the starts that `begin` draws, and their labels."""
        config, acc = self.config, self.accelerator
        if self.batches is None:
            order = Order(
                len(self.dataset),
                config.batch_size,
                self.rows,
                config.accumulate,
                config.seed,
                self.step,
            )
            workers = loader_workers(config.workers, acc.state)
            loader = batch_loader(self.dataset, order, workers, acc.device.type == "cuda")
            self.batches = iter(loader)
        x0, labels = (t.to(acc.device, non_blocking=True) for t in next(self.batches))
        start, _ = segment_at(uniform[:, -1], config.steps, config.final_step_size)
        return diffuse(x0, shift_time(start, config.time_shift), noise), labels

    def begin(
        self, x: Tensor, part: tuple[float, float] | None, uniform: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, float]:
        """Return x, start and length (B,) of the next segment, and the weight of its loss.

        Args:
            part: the segment; None, with real samples, for one that each sample draws.
        """
        config = self.config
        if part is None:
            start, size = segment_at(uniform[:, -1], config.steps, config.final_step_size)
            return x, start, size, 1.0
        start, size = (x.new_full((len(x),), value) for value in part)
        return x, start.clamp(min=MIN_TIME), size, part[1]

    # What comes out

    def log(self, curves: Curves | None, means: dict[str, float]) -> None:
        """Add a point to the curves, and end a run that diverges.

        The loss is watched from where its meaning stays the same: after `decay_iterations`. Its
        median counts, as near sigma 0 a DX policy's velocity is so large that a single loss may be
        many times the others.

        Raises:
            FloatingPointError: the median loss is GROWTH times its lowest.
        """
        super().log(curves, means)
        if self.teacher_ratio:
            return
        loss, self.lowest = means[MEDIAN], min(self.lowest, means[MEDIAN])
        if loss > GROWTH * self.lowest:
            found = self.path.exists()
            saved = f"{self.path} holds the last checkpoint" if found else "nothing is saved yet"
            raise FloatingPointError(
                f"the loss has grown from {self.lowest:.3g} to {loss:.3g} before iteration "
                f"{self.step}; {saved}: lower --lr, in another --out"
            )

    def draw_picture(self, model: nn.Module) -> Tensor:
        """Draw samples at fixed seeds, and save them in OUT/samples too."""
        samples, figures = self.samples.report(model)
        self.figures |= figures
        picture = samples if self.samples.of_points else self.grid(samples)
        with atomic_write(self.config.out / "samples" / f"{self.step:07d}.png") as temporary:
            to_image(picture).save(temporary, format="png")
        return picture

    def draw_samples(self, model: nn.Module, images: range) -> Tensor:
        """Draw samples of these numbers, with the calls that the student is made for."""
        return self.samples.of_student(model, images)

    def grid(self, x: Tensor) -> Tensor:
        """Decode samples (B, C, h, w), and arrange them as one picture."""
        images = decoded(x, self.vae, pixels=self.about.get("space") == "pixels")
        return image_grid(images, columns=PICTURE_COLUMNS, scale=max(1, 64 // images.shape[-1]))

    def data(self) -> dict[str, Any]:
        """Return the teacher's record of its samples, with what the student is made for."""
        config = self.config
        few = {
            "steps": config.steps,
            "shift": config.time_shift,
            "final_step_size": config.final_step_size,
            "temperature": 1.0,
            "policy": "GMFlow" if config.policy == "gm" else "DX",
            "teacher": self.mark,
        }
        if config.teacher_guidance() is not None:
            few["guidance"] = f"{config.guidance_kind} {config.guidance:g}"
            low, high = config.guidance_interval
            if (low, high) != (0, 1):
                few["guidance"] += f" at sigmas from {low:g} to {high:g}"
        return {**self.about, FEW_STEPS: few}

    def export(self) -> None:
        """Write the weights to share, in bfloat16."""
        path, model = self.config.out / WEIGHTS, self.sampling_model()
        facts = self.facts()
        if self.accelerator.is_main_process:
            save_checkpoint(model, path, facts=facts, data=self.data(), dtype=torch.bfloat16)
            print(f"the student to share, of {self.config.steps} calls: {path}")
