"""Train an image model, GM-DiT or DiTDH, on data that training.prepare wrote, from the repository's root:

    python -m training.imagenet --preset digits --data data/digits_train          # small; one CPU is enough
    python -m training.imagenet --data data/imagenet_256 --accumulate 16          # GMFlow's ImageNet model, on one large GPU
    python -m training.imagenet --data data/imagenet_256 --preset gmdit_s_k8 --batch-size 256
    python -m training.imagenet --data DATA -k 1 --constant-log-std 0 --transition-ratio None   # flow matching: the baseline
    python -m training.imagenet --preset digits_modes --source outputs/digits_source      # from a mixture source (MM-FM)
    torchrun --nproc-per-node 8 -m training.imagenet --preset ditdh_xl --data data/imagenet_rae --source outputs/source
    torchrun --nproc-per-node 8 -m training.imagenet --data data/imagenet_256     # DDP; more nodes: --nnodes, --rdzv-endpoint
    torchrun --nproc-per-node 8 -m training.imagenet --data data/imagenet_256 --shard      # FSDP: weights shared out

Started again with the same --out, on any number of processes, a run goes on from its last checkpoint; on one process to the
very losses of a run that was never stopped. OUT/model.safetensors is the checkpoint to resume from, and loads in ComfyUI at
any time; OUT/samples holds pictures of samples. At the end OUT/weights.safetensors is the model to share: weights alone, in
bfloat16. Several machines need a shared OUT.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from gmflow_core.checkpoint import read_metadata, save_checkpoint
from gmflow_core.images import sample_images
from gmflow_core.losses import nll, spectral_nll, transition_nll
from gmflow_core.mixture import GaussianMixture
from gmflow_core.models.ddt import DiTDH, DiTDHConfig
from gmflow_core.models.gmdit import GMDiT, GMDiTConfig
from gmflow_core.path import diffuse, forward_transition, shift_time, velocity_to_x0
from gmflow_core.pictures import image_grid, to_image
from gmflow_core.source import ModeFrame, load_source, read_source_metadata
from gmflow_core.transport import normal_cdf
from training import trainer
from training.batches import Order, draw_noise, pieces_of
from training.latents import LatentDataset, to_pixels
from training.modes import ModeWeights, WithTokens
from training.tokens import check_encoder
from training.trainer import TrainerConfig, require
from training.vae import load_vae

MODULE = "training.imagenet"
MIN_SIGMA = 1e-4  # sigmas are drawn from [MIN_SIGMA, 1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(TrainerConfig):
    """Training of image models. The defaults shown are those of the chosen preset."""

    preset: Literal[
        "gmdit_xl_k8", "gmdit_b_k8", "gmdit_s_k8", "ditdh_xl", "ditdh_s", "digits", "digits_flow_matching", "digits_modes"
    ] = "gmdit_xl_k8"
    """Where the other defaults come from."""
    data: Path = Path("data/imagenet_256")
    """Folder that training.prepare wrote."""
    out: Path = Path("outputs/imagenet")
    """Folder for the checkpoint, the TensorBoard logs and the pictures; a run found there is resumed."""
    network: Literal["gmdit", "ditdh"] = "gmdit"
    """GM-DiT, or the DiT with a decoupled head (RAE's and MM-FM's)."""
    num_components: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 8
    """K, the number of Gaussians."""
    constant_log_std: float | None = None
    """Fix the mixture's log-std instead of learning it; 0 with K = 1 is ordinary flow matching."""
    num_layers: int = 28
    """Transformer blocks."""
    num_heads: int = 16
    """Attention heads."""
    head_dim: int = 72
    """Features of a head."""
    ddt_layers: int = 2
    """Transformer blocks of DiTDH's head."""
    ddt_width: int = 2048
    """Their features."""
    ddt_heads: int = 16
    """Their attention heads."""
    patch_size: int = 2
    """Side of a token's patch."""
    log_std_dim: int = 1024
    """Hidden width of the log-std's head."""
    spectrum_layers: tuple[int, ...] | None = (64, 8)
    """Hidden widths of the spectrum network; None trains none."""
    transition_ratio: float | None = 0.5
    """How far down the transition loss looks, (sigma_high - sigma_low) / sigma_high in (0, 1]; None: plain velocity NLL."""
    time_sampling: Literal["logit-normal", "uniform"] = "logit-normal"
    """Distribution of sigma."""
    time_max: float = 1.0
    """Largest time that is drawn, before the shift."""
    time_shift: float = 1.0
    """Shift of sigma towards noise: shift t / (1 + (shift - 1) t); sqrt(dimensions / 4096) for latents of many (RAE)."""
    source: str | None = None
    """Mixture source of the noise: what training.fit_source wrote, or the hub id of such a folder. None: N(0, I)."""
    coupling: Literal["soft", "hard", "independent"] = "soft"
    """The mode of a sample's noise: drawn from its posterior, the most probable one, or drawn by weight."""
    mode_conditional: bool = False
    """Give the network the mode as its label; the classes are not used then."""
    mode_weighting: bool = False
    """Weigh the loss by mode, more where it is large (MM-FM's focal weights); for flow matching only."""
    loss_weight: float = 2.0
    """Weight of the transition loss (nats per pixel, summed over channels)."""
    spectral_weight: float = 1.0
    """Weight of the spectral loss."""
    class_dropout: float = 0.1
    """Share of the labels that are replaced by "none"; 1 trains a model without classes."""
    accumulate: int = 1
    """Pieces that each process's part of a batch is divided into, to fit its memory."""
    optimizer: Literal["auto", "adamw8bit", "adamw"] = "auto"
    """AdamW with 8-bit state (bitsandbytes), or AdamW; auto takes the first where it runs."""
    weight_decay: float = 0.05
    """Of the weights; biases have none."""
    clip: float = 10.0
    """Largest norm of the gradient, after the warm-up."""
    gradient_checkpointing: bool = True
    """Compute the blocks again in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """Compile the network with torch.compile."""
    workers: int = 4
    """Processes that read the data; 0 reads in the main one."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Matrix products in float32 or bfloat16; weights, optimiser and mixture are float32 either way."""
    picture_solver: Literal["gm-ode", "gm-sde"] = "gm-ode"
    """Solver of the pictures, 8 network calls each."""
    vae: str | None = None
    """Folder or hub id of the VAE that decodes the pictures of a model of latents; None shows their first three channels."""

    def __post_init__(self):
        super().__post_init__()
        ratio = self.transition_ratio
        require(ratio is None or 0 < ratio <= 1, "transition_ratio", ratio, "in (0, 1], or None")
        require(self.accumulate >= 1, "accumulate", self.accumulate, "at least 1")
        require(0 <= self.class_dropout <= 1, "class_dropout", self.class_dropout, "in [0, 1]")
        require(self.clip > 0, "clip", self.clip, "positive")
        require(self.workers >= 0, "workers", self.workers, "0 or more")
        require(self.time_shift > 0, "time_shift", self.time_shift, "positive")
        require(MIN_SIGMA < self.time_max <= 1, "time_max", self.time_max, f"above {MIN_SIGMA} and at most 1")
        if self.source is None:
            for name in ("mode_conditional", "mode_weighting"):
                require(not getattr(self, name), name, True, "off without --source")
            return
        require(self.spectrum_layers is None, "spectrum_layers", self.spectrum_layers, "None with --source")
        no_class = self.mode_conditional and self.class_dropout > 0
        require(not no_class, "class_dropout", self.class_dropout, "0 with --mode-conditional, whose labels are never dropped")
        known = self.mode_conditional or self.transition_ratio is None
        require(known, "transition_ratio", ratio, "None with --source, unless the network knows the modes (--mode-conditional)")
        flow_matching = self.num_components == 1 and self.constant_log_std == 0
        require(
            flow_matching or not self.mode_weighting, "mode_weighting", True, "off for a mixture (-k 1 --constant-log-std 0)"
        )


_DIGITS = Config(
    preset="digits",
    data=Path("data/digits_train"),
    out=Path("outputs/digits"),
    num_layers=6,
    num_heads=4,
    head_dim=32,
    log_std_dim=128,
    batch_size=128,
    iterations=10_000,
    lr=1e-3,
    lr_schedule="cosine",
    warmup=200,
    optimizer="adamw",
    weight_decay=0.01,
    gradient_checkpointing=False,
    workers=0,
    checkpoint_every=500,
    picture_every=1000,
)
_DITDH_XL = Config(
    preset="ditdh_xl",
    data=Path("data/imagenet_rae"),
    out=Path("outputs/ditdh_xl"),
    network="ditdh",
    num_components=1,
    constant_log_std=0.0,
    patch_size=1,
    transition_ratio=None,
    spectrum_layers=None,
    time_max=0.999,
    time_shift=(768 * 16 * 16 / 4096) ** 0.5,
    loss_weight=2 / 768,  # the mean squared error, for which the clip is
    batch_size=1024,
    lr=2e-4,
    weight_decay=0.0,
    clip=1.0,
)
PRESETS = {
    "gmdit_xl_k8": Config(),
    "gmdit_b_k8": Config(preset="gmdit_b_k8", num_layers=12, num_heads=12, head_dim=64),
    "gmdit_s_k8": Config(preset="gmdit_s_k8", num_layers=12, num_heads=6, head_dim=64),
    "ditdh_xl": _DITDH_XL,
    "ditdh_s": dataclasses.replace(
        _DITDH_XL, preset="ditdh_s", out=Path("outputs/ditdh_s"), num_layers=12, num_heads=6, head_dim=64
    ),
    "digits": _DIGITS,
    "digits_flow_matching": dataclasses.replace(
        _DIGITS,
        preset="digits_flow_matching",
        out=Path("outputs/digits_flow_matching"),
        num_components=1,
        constant_log_std=0.0,
        transition_ratio=None,
        spectrum_layers=None,
    ),
    "digits_modes": dataclasses.replace(
        _DIGITS,
        preset="digits_modes",
        out=Path("outputs/digits_modes"),
        source="outputs/digits_source",
        mode_conditional=True,
        class_dropout=0.0,
        spectrum_layers=None,
    ),
}


def parse(arguments: list[str]) -> Config:
    """The preset, then whatever the command line changes of it."""
    return trainer.parse(PRESETS, MODULE, __doc__, arguments)


class Objective(nn.Module):
    """GMFlow's losses of an image network (ICML 2025): the transition NLL, and the spectral loss. With a mixture source whose
    modes the network knows, the transitions are those of the coordinates where its noise is N(0, I) (`ModeFrame`)."""

    def __init__(self, network: GMDiT | DiTDH, config: Config, autocast):
        super().__init__()
        self.network, self.config, self.autocast = network, config, autocast
        self.predict = torch.compile(network.forward) if config.compile else network.forward

    def forward(
        self,
        x0: Tensor,
        labels: Tensor,
        sigma: Tensor,
        noise_low: Tensor,
        noise_high: Tensor,
        moments: tuple[Tensor, Tensor] | None = None,
        weights: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """
        Args:
            x0, noise_low, noise_high: (B, C, h, w); labels: (B,), already dropped out; sigma: (B,), in [0, 1].
            moments: mean (B, C, h, w) and standard deviation (B, ...) of each sample's mode.
            weights: (B,) of the samples in the loss.

        Returns:
            Means over the batch and its pixels: "loss", what to minimise; "nll" and, with a spectrum network, "spectral",
            in nats, summed over channels. "each": (B,), the NLL of every sample.
        """
        config = self.config
        if config.transition_ratio is None:
            noise = noise_low if moments is None else moments[0] + moments[1] * noise_low
            x = diffuse(x0, sigma, noise)
            velocity = self.mixture(x, sigma, labels)
            each = nll(velocity, noise - x0)
        else:
            frame = None if moments is None else ModeFrame(*moments)
            y0 = x0 if frame is None else frame.enter(x0, 0.0)
            sigma_low = sigma * (1 - config.transition_ratio)
            y_low = diffuse(y0, sigma_low, noise_low)
            y = forward_transition(y_low, sigma_low, sigma, noise_high)
            x = y if frame is None else frame.leave(y, sigma)
            velocity = self.mixture(x, sigma, labels)
            each = transition_nll(velocity if frame is None else frame.velocity(velocity), y_low, y, sigma_low, sigma)
        each = each.flatten(1).mean(1)
        flow = (each if weights is None else weights * each).mean()
        losses = {"loss": config.loss_weight * flow, "nll": each.mean(), "each": each.detach()}
        if self.network.spectrum_net is not None:
            constant = GaussianMixture(velocity.means.detach(), velocity.log_weights.detach(), velocity.log_std.detach())
            log_power = self.network.spectrum_net(velocity_to_x0(constant.moment_match(), x, sigma))
            target = (x - x0) / sigma[:, None, None, None]
            losses["spectral"] = spectral_nll(constant, target, log_power).mean()
            losses["loss"] = losses["loss"] + config.spectral_weight * losses["spectral"]
        return losses

    def mixture(self, x: Tensor, sigma: Tensor, labels: Tensor) -> GaussianMixture:
        """The network's output; all that is done with it is done in float32."""
        with self.autocast():
            return self.predict(x, sigma, labels)


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
        if self.source is not None and self.source.assigner is not None and config.coupling != "independent":
            check_encoder(config.data, read_source_metadata(config.source)["training"], config.source)
            self.samples = WithTokens(self.dataset)
        hidden = self.source is not None and not config.mode_conditional and config.coupling != "independent"
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
            raise ValueError(f"{config.data} holds samples of {height} x {width}; the networks are trained on square ones")
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
                GMDiTConfig(**shared, num_layers=config.num_layers, num_heads=config.num_heads, head_dim=config.head_dim)
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
            problem = "--shard divides the state" if config.shard else eight_bit_problem(self.accelerator.device)
            self.optimizer_name = "adamw" if problem else "adamw8bit"
            if problem and self.accelerator.is_main_process:
                print(f"AdamW with 32-bit state, as the 8-bit one does not run here: {problem}")
        if self.optimizer_name == "adamw8bit":
            try:
                from bitsandbytes.optim import AdamW8bit
            except ImportError as error:
                raise ImportError(f"--optimizer adamw8bit needs bitsandbytes ({error}): pip install -e '.[8bit]'") from error
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
        differ = [k for k, v in mine.items() if found.get(k) != (list(v) if isinstance(v, tuple) else v)]
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
            order = Order(len(self.dataset), config.batch_size, self.rows, config.accumulate, config.seed, self.step)
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
            self.mode_weights.update(*map(torch.cat, zip(*seen, strict=True)), lambda sums: acc.reduce(sums, "sum"))
        return totals

    def draw(self, labels: Tensor, shape: tuple[int, ...], rows: range) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Labels with some dropped out (B,), sigma (B,), and two noises (B, C, h, w), for these rows of the batch."""
        config, size = self.config, torch.Size(shape).numel()
        noise = draw_noise(config.seed, self.step, rows, (2 + 2 * size,), labels.device)
        time, drop, low, high = noise.split([1, 1, size, size], 1)
        labels = torch.where(normal_cdf(drop[:, 0]) <= config.class_dropout, len(self.dataset.classes), labels)
        sigma = time[:, 0].sigmoid() if config.time_sampling == "logit-normal" else normal_cdf(time[:, 0])
        sigma = shift_time(sigma.clamp(max=config.time_max), config.time_shift).clamp(min=MIN_SIGMA)
        return labels, sigma, low.unflatten(1, shape), high.unflatten(1, shape)

    def draw_modes(self, x: Tensor, rows: range) -> Tensor | None:
        """The modes (B,) that the noise of these rows comes from; x are the samples, or their tokens."""
        if self.source is None:
            return None
        uniform = normal_cdf(draw_noise(self.config.seed + 1, self.step, rows, (1,), x.device)[:, 0])
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
        settings = {"solver": solver, "shift": config.time_shift, "source": self.source, "modes": modes}
        images = self.decode(sample_images(model, None if config.mode_conditional else labels, **settings))
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
        space = {"space": "pixels" if self.dataset.kind == "pixels" else index.get("space", "sd-vae")}
        if index.get("scaling_factor") is not None:
            space["scaling_factor"] = index["scaling_factor"]
        if self.config.class_dropout == 1:
            space["unlabelled"] = True
        if self.source is None:
            return {"labels": self.dataset.classes, **space}
        known = self.config.mode_conditional
        space["source"] = self.source.record(self.config.coupling, known)
        return {"labels": [f"mode {m}" for m in range(self.source.num_modes)] if known else self.dataset.classes, **space}

    def export(self) -> None:
        """Write the weights to share."""
        path, model = self.config.out / "weights.safetensors", self.sampling_model()
        if self.accelerator.is_main_process:
            save_checkpoint(model, path, facts=self.facts(), data=self.data(), dtype=torch.bfloat16)
            print(f"the model to share: {path}")


def autocast_of(function: Callable, autocast: Callable) -> Callable:
    """`function`, run under `autocast`; what is done with its result is not."""

    def run(*args: Any) -> Any:
        with autocast():
            return function(*args)

    return run


def _identity(batch: Any) -> Any:
    return batch  # LatentDataset fetches whole batches


def eight_bit_problem(device: torch.device) -> str | None:
    """Why bitsandbytes' 8-bit AdamW cannot be used on `device`; None if it can."""
    if device.type == "cpu":
        return "on a CPU it only costs time"
    try:
        from bitsandbytes.optim import AdamW8bit

        weight = nn.Parameter(torch.zeros(4096, 2, device=device))
        weight.grad = torch.ones_like(weight)
        AdamW8bit([weight]).step()
    except Exception as error:  # whatever it is, there is another optimiser
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


def main(arguments: list[str] | None = None) -> None:
    config = parse(sys.argv[1:] if arguments is None else arguments)
    run = trainer.main(lambda: Trainer(config))
    run.export()


if __name__ == "__main__":
    main()
