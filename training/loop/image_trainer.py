"""Train image models on prepared data, from N(0, I) or from a mixture source."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from gmflow_core.files.atomic import atomic_write
from gmflow_core.files.checkpoint import read_metadata, save_checkpoint
from gmflow_core.flow.path import shift_time
from gmflow_core.gaussians.quantile import normal_cdf
from gmflow_core.models.ditdh import DiTDH, DiTDHConfig
from gmflow_core.models.gmdit import GMDiT, GMDiTConfig
from gmflow_core.models.precision import set_precision
from gmflow_core.pictures import image_grid, to_image
from gmflow_core.sampling.images import sample_images
from gmflow_core.source.files import load_source, read_source_metadata
from training.common.processes import loader_workers, together
from training.common.settings import SMALLEST_SIGMA
from training.data.batches import Order, batch_loader, draw_noise, pieces_of, rows_of
from training.encoders.fingerprints import MARK
from training.evaluation.models import class_shares, image_labels, image_modes, image_seeds
from training.loop.config import VALIDATION
from training.loop.decoding import check_decodes, decoded, load_decoder
from training.loop.image_data import load_data, on_device, samples_of
from training.loop.image_presets import ENCODING, ImageConfig
from training.loop.mode_weights import ModeWeights
from training.loop.objective import Objective
from training.loop.optimizer import eight_bit_problem, new_adamw
from training.loop.trainer import Trainer
from training.loop.validation import Validation

PICTURE_ROWS, PICTURE_CLASSES = 4, 10  # samples in a picture: rows, and at most as many columns


class ImageTrainer(Trainer):
    """A run that trains an image model.

    Raises:
        FileNotFoundError: the data, the source or the VAE is missing.
        ValueError: they do not fit each other or the settings, or as `Trainer`.
    """

    module = "training.imagenet"
    free_to_change = Trainer.free_to_change | {
        "data",
        "accumulate",
        "gradient_checkpointing",
        "compile",
        "workers",
        "picture_solver",
        "encode_precision",
        "vae",
        *VALIDATION,
    }
    config: ImageConfig

    def __init__(self, config: ImageConfig):
        self.dataset = load_data(config)
        if config.encode:  # the VAE makes the samples
            self.free_to_change = self.free_to_change - {"vae"}
        self.source = None if config.source is None else load_source(config.source)
        if self.source is not None:
            self.source.require_shape(self.dataset.shape)
            if config.transition_ratio is not None:
                self.source.frame([0])  # raises unless the modes are spherical
        self.mode_weights = ModeWeights(self.source.num_modes) if config.mode_weighting else None
        super().__init__(config)
        acc = self.accelerator
        self.rows = rows_of(
            acc.process_index, acc.num_processes, config.batch_size, config.accumulate
        )
        self.batches: Iterator | None = None
        if self.source is not None:
            self.source = self.source.to(acc.device)
        if self.mode_weights is not None:
            self.mode_weights.sums = self.mode_weights.sums.to(acc.device)
        self.samples = self.training_samples()
        self.warn_of_hidden_modes()
        self.vae: Any = None
        latents, checks = self.dataset.kind == "latents", config.validation_interval
        vae = config.vae or (self.dataset.index.get("vae") if checks else None)
        with together(acc.state):
            if config.encode:
                self.vae = self.dataset.decoder
                if checks:
                    check_decodes(self.dataset.vae, self.dataset.shape, vae)
            elif latents and vae is not None and (checks or acc.is_main_process):
                self.vae = load_decoder(vae, acc.device, self.dataset.shape)
        if checks and latents and vae is None:
            raise ValueError(
                f"{config.data} holds latents, but does not say of which VAE; give --vae to "
                "validate, or --validate-every 0"
            )
        if checks:
            known = (self.dataset.shape, self.vae, vae if latents else None)
            self.validation = Validation(config, *known)

    def training_samples(self) -> Dataset:
        """Return the data set, with tokens if the source finds a sample's mode by its token."""
        config, source, fitted = self.config, self.source, None
        if source is not None and source.assigner is not None and config.coupling != "independent":
            fitted = read_source_metadata(config.source)["training"]
        return samples_of(self.dataset, fitted, config.source)

    def warn_of_hidden_modes(self) -> None:
        """Print a note if the network is given a sample's class, but not the mode of its noise."""
        config = self.config
        coupled = self.source is not None and config.coupling != "independent"
        classes = config.class_dropout < 1 and len(self.dataset.classes) > 1
        if coupled and classes and not config.mode_conditional and self.accelerator.is_main_process:
            print(
                "note: a sample's noise comes from its own mode. The network is given the "
                "sample's class but not this mode, and sampling would draw the two "
                "independently, so that they contradict each other; give --mode-conditional, or "
                "--class-dropout 1"
            )

    @property
    def num_labels(self) -> int:
        """Number of the network's labels: classes, or modes of the source."""
        return self.source.num_modes if self.config.mode_conditional else len(self.dataset.classes)

    def new_model(self) -> GMDiT | DiTDH:
        """Create the network for the data's shape and labels.

        Raises:
            ValueError: the samples are not square.
        """
        config, (channels, height, width) = self.config, self.dataset.shape
        if height != width:
            raise ValueError(
                f"{config.data} holds samples of {height} x {width}; the networks need square ones"
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
        """Return the losses, which hold the network."""
        return Objective(self.model, self.config, self.autocast)

    def blocks(self) -> Iterable[nn.Module]:
        """Return the transformer blocks."""
        return self.model.transformer_blocks

    def new_optimizer(self) -> torch.optim.Optimizer:
        """Create AdamW, with 8-bit state if the user asks for it or it runs here."""
        config, name = self.config, self.config.optimizer
        if name == "auto":
            problem = "--shard divides the state" if config.shard else None
            problem = problem or eight_bit_problem(self.accelerator.device)
            name = "adamw" if problem else "adamw8bit"
            if problem and self.accelerator.is_main_process:
                print(f"AdamW with 32-bit state, as the 8-bit one does not run here: {problem}")
        self.optimizer_name = name
        return new_adamw(
            self.model,
            lr=config.lr,
            weight_decay=config.weight_decay,
            eight_bit=name == "adamw8bit",
        )

    @property
    def clip(self) -> float:
        """Largest norm of the gradient; infinite in the warm-up."""
        return self.config.clip if self.step >= self.config.warmup else torch.inf

    def settings(self) -> dict[str, Any]:
        """Return the configuration, with the optimizer that was chosen for auto.

        With --encode it has the autoencoder's fingerprint too.
        """
        unused = () if self.config.encode else ENCODING
        values = {**super().settings(), "optimizer": self.optimizer_name}
        if self.config.encode:
            values[MARK] = self.dataset.fingerprint
        return {name: value for name, value in values.items() if name not in unused}

    def resume(self) -> None:
        """Load the checkpoint in OUT.

        Raises:
            ValueError: it was trained with another source, or as `Trainer`.
        """
        before = read_metadata(self.path)["training"].get("config")
        if isinstance(before, dict) and MARK not in before:  # of an older version
            self.free_to_change = self.free_to_change | {MARK}
        if self.source is not None:
            found = read_metadata(self.path)["data"].get("source")
            self.source.require_record(found, str(self.path))
        super().resume()

    def data_name(self) -> str:
        """Return where the data lie, for a message."""
        return f" (now {self.config.data})"

    def backward(self) -> dict[str, Tensor]:
        """Compute the gradients of an iteration piece by piece; return the mean losses."""
        config, acc = self.config, self.accelerator
        if self.batches is None:
            order = Order(
                len(self.dataset),
                config.batch_size,
                self.rows,
                config.accumulate,
                config.seed,
                self.step,
                epochs=config.encode,
            )
            on_gpu = acc.device.type == "cuda"
            workers = loader_workers(config.workers, acc.state)
            self.batches = iter(batch_loader(self.samples, order, workers, on_gpu))
        totals: dict[str, Tensor] = {}
        seen = []
        for piece, rows in enumerate(pieces_of(self.rows, config.accumulate)):
            x0, labels, *token = on_device(self.dataset, next(self.batches), acc.device)
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
        """Draw what an iteration needs beside its samples, for these rows of the batch.

        Times are limited to `time_max` before they are shifted, so that sigma reaches
        shift_time(time_max, time_shift).

        Args:
            labels: (B,).
            shape: (C, h, w) of a sample.

        Returns:
            Labels (B,), some replaced by "none"; sigma (B,) in [SMALLEST_SIGMA, 1]; two noises
            (B, C, h, w).
        """
        config, size = self.config, torch.Size(shape).numel()
        noise = draw_noise(config.seed, self.step, rows, (2 + 2 * size,), labels.device)
        time, drop, low, high = noise.split([1, 1, size, size], 1)
        labels = torch.where(
            normal_cdf(drop[:, 0]) <= config.class_dropout, len(self.dataset.classes), labels
        )
        normal = time[:, 0]
        times = normal.sigmoid() if config.time_sampling == "logit-normal" else normal_cdf(normal)
        sigma = shift_time(times.clamp(max=config.time_max), config.time_shift)
        sigma = sigma.clamp(min=SMALLEST_SIGMA)
        return labels, sigma, low.unflatten(1, shape), high.unflatten(1, shape)

    def draw_modes(self, x: Tensor, rows: range) -> Tensor | None:
        """Draw the modes (B,) that the noise of these rows comes from; None without a source.

        Args:
            x: the samples (B, C, h, w), or their tokens (B, D) if the source has an assigner.
        """
        if self.source is None:
            return None
        uniform = normal_cdf(
            draw_noise(self.config.seed + 1, self.step, rows, (1,), x.device)[:, 0]
        )
        if self.config.coupling == "independent":
            return self.source.draw_modes(len(x), uniform=uniform)
        return self.source.posterior_modes(x, self.config.coupling, uniform=uniform)

    def extra_state(self) -> dict[str, Tensor]:
        """Return the sums behind the weights of the modes."""
        return {} if self.mode_weights is None else {"mode_losses": self.mode_weights.sums}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        """Load the sums behind the weights of the modes."""
        if self.mode_weights is not None:
            self.mode_weights.sums = state["mode_losses"].to(self.mode_weights.sums)

    def decay(self, step: int) -> float:
        """Return the decay of EDM's profile (Karras et al. 2022).

        The half-life is 30 million images, or a twentieth of the images seen if that is less.
        """
        return 0.5 ** (1 / min(30e6 / self.config.batch_size, 0.05 * step))

    def looked_at(self) -> GMDiT | DiTDH:
        """Return the model that pictures and validation sample, in the run's precision."""
        return set_precision(self.sampling_model(), self.config.precision)

    def sampled(
        self, model: GMDiT | DiTDH, labels: Tensor, modes: Tensor | None, seeds: Sequence[int]
    ) -> Tensor:
        """Return samples (B, C, h, w) of labels (B,), and of these modes of the source's noise."""
        config = self.config
        if config.class_dropout == 1:
            labels = torch.full_like(labels, self.num_labels)
        closed_forms = self.source is None or (config.mode_conditional and self.source.is_spherical)
        return sample_images(
            model,
            None if config.mode_conditional else labels,
            solver=config.picture_solver if closed_forms else "euler",
            shift=config.time_shift,
            source=self.source,
            modes=modes,
            seeds=seeds,
        )

    def draw_picture(self, model: GMDiT | DiTDH) -> Tensor:
        """Draw samples of some labels, a column each, and save them in OUT/samples too."""
        config, columns = self.config, min(PICTURE_CLASSES, self.num_labels)
        labels = torch.linspace(0, self.num_labels - 1, columns).long().repeat(PICTURE_ROWS)
        modes = labels if config.mode_conditional else None
        samples = self.sampled(model, labels, modes, range(len(labels)))
        images = decoded(samples, self.vae, pixels=self.dataset.kind == "pixels")
        picture = image_grid(images, columns=columns, scale=max(1, 64 // images.shape[-1]))
        with atomic_write(config.out / "samples" / f"{self.step:07d}.png") as temporary:
            to_image(picture).save(temporary, format="png")
        return picture

    def draw_samples(self, model: GMDiT | DiTDH, images: range) -> Tensor:
        """Draw samples of these numbers as training.evaluate does with --class-shares data."""
        seeds, classes = image_seeds(0, images), len(self.dataset.classes)
        modes = None if self.source is None else image_modes(seeds, self.source)
        shares = class_shares(self.dataset.labels, classes)
        return self.sampled(model, image_labels(seeds, classes, shares), modes, seeds)

    def data(self) -> dict[str, Any]:
        """Return labels and space of the model's samples, and its source."""
        config, index, source = self.config, self.dataset.index, self.source
        pixels = self.dataset.kind == "pixels"
        space = {"space": "pixels" if pixels else index.get("space", "sd-vae")}
        if index.get("scaling_factor") is not None:
            space["scaling_factor"] = index["scaling_factor"]
        if config.class_dropout == 1:
            space["unlabelled"] = True
        labels = self.dataset.classes
        if source is not None:
            space["source"] = source.record(config.coupling, config.mode_conditional)
            if config.mode_conditional:
                labels = [f"mode {m}" for m in range(source.num_modes)]
        return {"labels": labels, **space}

    def export(self) -> None:
        """Write the weights to share, in bfloat16."""
        path, model = self.config.out / "weights.safetensors", self.sampling_model()
        facts = self.facts()
        with together(self.accelerator.state):
            if self.accelerator.is_main_process:
                save_checkpoint(model, path, facts=facts, data=self.data(), dtype=torch.bfloat16)
                print(f"the model to share: {path}")
