"""The trainer of image models."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from gmflow_core.files.checkpoint import read_metadata, save_checkpoint
from gmflow_core.flow.path import shift_time
from gmflow_core.gaussians.quantile import normal_cdf
from gmflow_core.models.ditdh import DiTDH, DiTDHConfig
from gmflow_core.models.gmdit import GMDiT, GMDiTConfig
from gmflow_core.pictures import image_grid, to_image
from gmflow_core.sampling.images import sample_images
from gmflow_core.source.files import load_source, read_source_metadata
from training.data.batches import Order, draw_noise, pieces_of
from training.data.shards import LatentDataset, to_pixels
from training.data.tokens import WithTokens, check_encoder
from training.encoders.load import load_vae
from training.loop import trainer
from training.loop.image_presets import MIN_SIGMA, Config
from training.loop.mode_weights import ModeWeights
from training.loop.objective import Objective, _identity, autocast_of
from training.loop.optimizer import eight_bit_problem

MODULE = "training.imagenet"


class Trainer(trainer.Trainer):
    """A run."""

    module = MODULE
    free_to_change = trainer.Trainer.free_to_change | {
        "data", "accumulate", "gradient_checkpointing", "compile", "workers", "picture_solver", "vae",
    }  # fmt: skip

    def __init__(self, config: Config):
        self.dataset = LatentDataset(config.data)
        self.source = None if config.source is None else load_source(config.source)
        if self.source is not None:
            self.source.require_shape(self.dataset.shape)
            if config.transition_ratio is not None:
                self.source.frame([0])  # that it has spherical modes
        self.mode_weights = ModeWeights(self.source.num_modes) if config.mode_weighting else None
        super().__init__(config)
        acc = self.accelerator
        if config.batch_size % (acc.num_processes * config.accumulate):
            raise ValueError(
                f"--batch-size {config.batch_size} cannot be divided among {acc.num_processes} processes with "
                f"{config.accumulate} pieces each; make it a multiple of {acc.num_processes * config.accumulate}"
            )
        share = config.batch_size // acc.num_processes
        self.source = None if self.source is None else self.source.to(acc.device)
        if self.mode_weights is not None:
            self.mode_weights.sums = self.mode_weights.sums.to(acc.device)
        self.samples: Dataset = self.dataset
        if (
            self.source is not None
            and self.source.assigner is not None
            and config.coupling != "independent"
        ):
            check_encoder(
                config.data, read_source_metadata(config.source)["training"], config.source
            )
            self.samples = WithTokens(self.dataset)
        hidden = (
            self.source is not None
            and not config.mode_conditional
            and config.coupling != "independent"
        )
        told = config.class_dropout < 1 and len(self.dataset.classes) > 1
        if hidden and told and acc.is_main_process:
            print(
                "note: a sample's noise comes from its own mode, which the network is not told, but its class is: in sampling "
                "the two would be drawn apart, and contradict each other; give --mode-conditional, or --class-dropout 1"
            )
        self.vae: Any = None
        if config.vae is not None and self.dataset.kind == "latents" and acc.is_main_process:
            self.vae = load_vae(config.vae, acc.device)
        self.rows = range(acc.process_index * share, (acc.process_index + 1) * share)
        self.batches: Iterator | None = None

    @property
    def num_labels(self) -> int:
        """Of the network: classes, or modes."""
        return self.source.num_modes if self.config.mode_conditional else len(self.dataset.classes)

    def new_model(self) -> GMDiT | DiTDH:
        config, (channels, height, width) = self.config, self.dataset.shape
        if height != width:
            raise ValueError(
                f"{config.data} holds samples of {height} x {width}; the networks are trained on square ones"
            )
        shared = {
            "num_components": config.num_components,
            "channels": channels,
            "latent_size": height,
            "patch_size": config.patch_size,
            "num_classes": self.num_labels,
            "log_std_dim": config.log_std_dim,
            "constant_log_std": config.constant_log_std,
            "spectrum_layers": config.spectrum_layers,
        }
        if config.network == "ditdh":
            model = DiTDH(
                DiTDHConfig(
                    **shared,
                    null_class=config.class_dropout > 0,
                    trunk_layers=config.num_layers,
                    trunk_width=config.num_heads * config.head_dim,
                    trunk_heads=config.num_heads,
                    head_layers=config.ddt_layers,
                    head_width=config.ddt_width,
                    head_heads=config.ddt_heads,
                )
            )
        else:
            model = GMDiT(
                GMDiTConfig(
                    **shared,
                    num_layers=config.num_layers,
                    num_heads=config.num_heads,
                    head_dim=config.head_dim,
                )
            )
        model.gradient_checkpointing = config.gradient_checkpointing
        return model

    def objective(self) -> nn.Module:
        return Objective(self.model, self.config, self.autocast)

    def blocks(self) -> Iterable[nn.Module]:
        return self.model.transformer_blocks

    def new_optimizer(self) -> torch.optim.Optimizer:
        config = self.config
        parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer_name = config.optimizer
        if config.optimizer == "auto":
            problem = (
                "--shard divides the state"
                if config.shard
                else eight_bit_problem(self.accelerator.device)
            )
            self.optimizer_name = "adamw" if problem else "adamw8bit"
            if problem and self.accelerator.is_main_process:
                print(f"AdamW with 32-bit state, as the 8-bit one does not run here: {problem}")
        if self.optimizer_name == "adamw8bit":
            try:
                from bitsandbytes.optim import AdamW8bit
            except ImportError as error:
                raise ImportError(
                    f"--optimizer adamw8bit needs bitsandbytes ({error}): pip install -e '.[8bit]'"
                ) from error
            return AdamW8bit(groups, lr=config.lr, betas=(0.9, 0.95))
        return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)

    @property
    def clip(self) -> float:
        return self.config.clip if self.step >= self.config.warmup else torch.inf

    def settings(self) -> dict:
        return {**super().settings(), "optimizer": self.optimizer_name}

    def resume(self) -> None:
        metadata = read_metadata(self.path)
        if self.source is not None:
            self.source.require_record(metadata["data"].get("source"), str(self.path))
        found, mine = metadata["config"], dataclasses.asdict(self.model.config)
        differ = [
            k for k, v in mine.items() if found.get(k) != (list(v) if isinstance(v, tuple) else v)
        ]
        if differ:
            changes = ", ".join(f"{k}: {found.get(k)} there, {mine[k]} here" for k in differ)
            raise ValueError(
                f"{self.path} holds a model of another shape ({changes}); give another --out, the same settings and data "
                f"(now {self.config.data}) to go on, or --restart to throw it away"
            )
        super().resume()

    def backward(self) -> dict[str, Tensor]:
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
            self.batches = iter(
                DataLoader(
                    self.samples,
                    batch_sampler=order,
                    num_workers=config.workers,
                    collate_fn=_identity,
                    pin_memory=acc.device.type == "cuda",
                )
            )
        totals: dict[str, Tensor] = {}
        seen = []
        for piece, rows in enumerate(pieces_of(self.rows, config.accumulate)):
            x0, labels, *token = (t.to(acc.device, non_blocking=True) for t in next(self.batches))
            drawn = self.draw(labels, x0.shape[1:], rows)
            modes = self.draw_modes(token[0] if token else x0, rows)
            moments = weights = None
            if modes is not None:
                moments = self.source.moments(modes)
                drawn = (modes, *drawn[1:]) if config.mode_conditional else drawn
                weights = None if self.mode_weights is None else self.mode_weights(modes, self.step)
            with self.gradient_of_piece(last=piece + 1 == config.accumulate):
                losses = self.prepared(x0, *drawn, moments, weights)
                acc.backward(losses["loss"] / config.accumulate)
            seen.append((modes, losses.pop("each")))
            for name, value in losses.items():
                totals[name] = totals.get(name, 0) + value.detach() / config.accumulate
        if self.mode_weights is not None:
            self.mode_weights.update(
                *map(torch.cat, zip(*seen, strict=True)), lambda sums: acc.reduce(sums, "sum")
            )
        return totals

    def draw(
        self, labels: Tensor, shape: tuple[int, ...], rows: range
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Labels with some dropped out (B,), sigma (B,), and two noises (B, C, h, w), for these rows of the batch."""
        config, size = self.config, torch.Size(shape).numel()
        noise = draw_noise(config.seed, self.step, rows, (2 + 2 * size,), labels.device)
        time, drop, low, high = noise.split([1, 1, size, size], 1)
        labels = torch.where(
            normal_cdf(drop[:, 0]) <= config.class_dropout, len(self.dataset.classes), labels
        )
        sigma = (
            time[:, 0].sigmoid()
            if config.time_sampling == "logit-normal"
            else normal_cdf(time[:, 0])
        )
        sigma = shift_time(sigma.clamp(max=config.time_max), config.time_shift).clamp(min=MIN_SIGMA)
        return labels, sigma, low.unflatten(1, shape), high.unflatten(1, shape)

    def draw_modes(self, x: Tensor, rows: range) -> Tensor | None:
        """The modes (B,) that the noise of these rows comes from; x are the samples, or their tokens."""
        if self.source is None:
            return None
        uniform = normal_cdf(
            draw_noise(self.config.seed + 1, self.step, rows, (1,), x.device)[:, 0]
        )
        if self.config.coupling == "independent":
            return self.source.draw_modes(len(x), uniform=uniform)
        return self.source.posterior_modes(x, self.config.coupling, uniform=uniform)

    def extra_state(self) -> dict[str, Tensor]:
        return {} if self.mode_weights is None else {"mode_losses": self.mode_weights.sums}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        if self.mode_weights is not None:
            self.mode_weights.sums = state["mode_losses"].to(self.mode_weights.sums)

    def decay(self, step: int) -> float:
        """Half-life of 30 million images, or a twentieth of those seen if that is less (Karras et al. 2022)."""
        return 0.5 ** (1 / min(30e6 / self.config.batch_size, 0.05 * step))

    def draw_picture(self) -> Tensor | None:
        model = self.sampling_model()
        if not self.accelerator.is_main_process:
            return None
        rows, classes, config = 4, min(10, self.num_labels), self.config
        labels = torch.linspace(0, self.num_labels - 1, classes).long().repeat(rows)
        modes = labels if config.mode_conditional else None
        if config.class_dropout == 1:
            labels = torch.full_like(labels, self.num_labels)
        closed_forms = self.source is None or (config.mode_conditional and self.source.is_spherical)
        solver = config.picture_solver if closed_forms else "euler"
        model.forward = autocast_of(model.forward, self.autocast)
        settings = {
            "solver": solver,
            "shift": config.time_shift,
            "source": self.source,
            "modes": modes,
        }
        images = self.decode(
            sample_images(model, None if config.mode_conditional else labels, **settings)
        )
        picture = image_grid(images, columns=classes, scale=max(1, 64 // images.shape[-1]))
        path = self.config.out / "samples" / f"{self.step:07d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        to_image(picture).save(path)
        return picture

    def decode(self, x: Tensor) -> Tensor:
        """Samples as images (B, 3, H, W) in [0, 1]."""
        if self.dataset.kind == "pixels":
            return to_pixels(x).cpu() / 255
        if self.vae is None:
            x = x[:, :3].float().cpu()
            return (0.5 + 0.25 * x / x.std()).clamp(0, 1)
        images = torch.cat([self.vae.decode(part).cpu() for part in x.split(4)])
        return (images * 0.5 + 0.5).clamp(0, 1)

    def data(self) -> dict[str, Any]:
        index = self.dataset.index
        space = {
            "space": "pixels" if self.dataset.kind == "pixels" else index.get("space", "sd-vae")
        }
        if index.get("scaling_factor") is not None:
            space["scaling_factor"] = index["scaling_factor"]
        if self.config.class_dropout == 1:
            space["unlabelled"] = True
        if self.source is None:
            return {"labels": self.dataset.classes, **space}
        known = self.config.mode_conditional
        space["source"] = self.source.record(self.config.coupling, known)
        return {
            "labels": [f"mode {m}" for m in range(self.source.num_modes)]
            if known
            else self.dataset.classes,
            **space,
        }

    def export(self) -> None:
        """Write the weights to share."""
        path, model = self.config.out / "weights.safetensors", self.sampling_model()
        if self.accelerator.is_main_process:
            save_checkpoint(model, path, facts=self.facts(), data=self.data(), dtype=torch.bfloat16)
            print(f"the model to share: {path}")
