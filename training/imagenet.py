"""Train a class-conditional GM-DiT on data that training.prepare wrote, from the repository's root:

    python -m training.imagenet --preset digits --data data/digits_train          # small; one CPU is enough
    python -m training.imagenet --data data/imagenet_256 --accumulate 16          # GMFlow's ImageNet model, on one large GPU
    python -m training.imagenet --data data/imagenet_256 --preset gmdit_s_k8 --batch-size 256
    python -m training.imagenet --data DATA -k 1 --constant-log-std 0 --transition-ratio None   # flow matching: the baseline
    torchrun --nproc-per-node 8 -m training.imagenet --data data/imagenet_256     # DDP; more nodes: --nnodes, --rdzv-endpoint
    torchrun --nproc-per-node 8 -m training.imagenet --data data/imagenet_256 --shard      # FSDP: weights shared out

Started again with the same --out, on any number of processes, a run goes on from its last checkpoint; on one process to the
very losses of a run that was never stopped. OUT/model.safetensors is the checkpoint to resume from, and loads in ComfyUI at
any time; OUT/samples holds pictures of samples. At the end OUT/weights.safetensors is the model to share: weights alone, in
bfloat16. Several machines need a shared OUT.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gmflow_core.checkpoint import read_metadata, save_checkpoint
from gmflow_core.images import sample_images
from gmflow_core.losses import nll, spectral_nll, transition_nll
from gmflow_core.mixture import GaussianMixture
from gmflow_core.models.gmdit import GMDiT, GMDiTConfig
from gmflow_core.path import diffuse, forward_transition, velocity_to_x0
from gmflow_core.pictures import image_grid, to_image
from gmflow_core.transport import normal_cdf
from training import trainer
from training.latents import LatentDataset, to_pixels
from training.trainer import TrainerConfig, require
from training.vae import VAE, load_vae

MODULE = "training.imagenet"
MIN_SIGMA = 1e-4  # sigmas are drawn from [MIN_SIGMA, 1]
NOISE_BLOCK = 16  # samples whose noise comes from one seed, so that it does not depend on the number of processes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(TrainerConfig):
    """GM-DiT training. The defaults shown are those of the chosen preset."""

    preset: Literal["gmdit_xl_k8", "gmdit_b_k8", "gmdit_s_k8", "digits", "digits_flow_matching"] = "gmdit_xl_k8"
    """Where the other defaults come from."""
    data: Path = Path("data/imagenet_256")
    """Folder that training.prepare wrote."""
    out: Path = Path("outputs/imagenet")
    """Folder for the checkpoint, the TensorBoard logs and the pictures; a run found there is resumed."""
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
    loss_weight: float = 2.0
    """Weight of the transition loss (nats per pixel, summed over channels)."""
    spectral_weight: float = 1.0
    """Weight of the spectral loss."""
    class_dropout: float = 0.1
    """Share of the labels that are replaced by "none"."""
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
        require(0 <= self.class_dropout < 1, "class_dropout", self.class_dropout, "in [0, 1)")
        require(self.clip > 0, "clip", self.clip, "positive")
        require(self.workers >= 0, "workers", self.workers, "0 or more")


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
PRESETS = {
    "gmdit_xl_k8": Config(),
    "gmdit_b_k8": Config(preset="gmdit_b_k8", num_layers=12, num_heads=12, head_dim=64),
    "gmdit_s_k8": Config(preset="gmdit_s_k8", num_layers=12, num_heads=6, head_dim=64),
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
}


def parse(arguments: list[str]) -> Config:
    """The preset, then whatever the command line changes of it."""
    return trainer.parse(PRESETS, MODULE, __doc__, arguments)


def seed_of(*parts: int) -> int:
    """A seed for a generator, different for different numbers."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


class Order:
    """Which samples this process sees, piece by piece, from iteration `first` on, for ever: each epoch is a permutation of the
    data, and the batch of an iteration is the same whatever the number of processes.

    Args:
        count: samples in the data.
        rows: this process's part of the batch's rows, 0 to `batch_size` - 1.
        pieces: how many pieces that part comes in.
    """

    def __init__(self, count: int, batch_size: int, rows: range, pieces: int, seed: int, first: int):
        self.count, self.batch_size, self.rows, self.pieces, self.seed, self.first = (
            count, batch_size, rows, pieces, seed, first,
        )  # fmt: skip

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, None
        for step in itertools.count(self.first):
            for rows in pieces_of(self.rows, self.pieces):
                indices: list[int] = []
                while len(indices) < len(rows):
                    at, position = divmod(step * self.batch_size + rows.start + len(indices), self.count)
                    if at != epoch:
                        generator = torch.Generator().manual_seed(seed_of(self.seed, at))
                        epoch, order = at, torch.randperm(self.count, generator=generator)
                    indices += order[position : position + len(rows) - len(indices)].tolist()
                yield indices


def pieces_of(rows: range, pieces: int) -> list[range]:
    """`rows` in `pieces` equal parts."""
    size = len(rows) // pieces
    return [rows[i * size : (i + 1) * size] for i in range(pieces)]


def draw_noise(seed: int, step: int, rows: range, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Standard normal (len(rows), *shape) for these rows of iteration `step`'s batch, whatever other rows are drawn."""
    blocks = range(rows.start // NOISE_BLOCK, (rows.stop - 1) // NOISE_BLOCK + 1)
    noise = []
    for block in blocks:
        generator = torch.Generator(device).manual_seed(seed_of(seed, step, block))
        noise.append(torch.randn(NOISE_BLOCK, *shape, generator=generator, device=device))
    offset = rows.start - blocks.start * NOISE_BLOCK
    return torch.cat(noise)[offset : offset + len(rows)]


class Objective(nn.Module):
    """GMFlow's losses of a class-conditional network (ICML 2025): the transition NLL, and the spectral loss."""

    def __init__(self, network: GMDiT, config: Config, autocast):
        super().__init__()
        self.network, self.config, self.autocast = network, config, autocast
        self.predict = torch.compile(network.forward) if config.compile else network.forward

    def forward(self, x0: Tensor, labels: Tensor, sigma: Tensor, noise_low: Tensor, noise_high: Tensor) -> dict[str, Tensor]:
        """
        Args:
            x0, noise_low, noise_high: (B, C, h, w); labels: (B,), already dropped out; sigma: (B,), in [0, 1].

        Returns:
            Means over the batch and its pixels: "loss", what to minimise; "nll" and, with a spectrum network, "spectral",
            in nats, summed over channels.
        """
        config = self.config
        if config.transition_ratio is None:
            x = diffuse(x0, sigma, noise_low)
            velocity = self.mixture(x, sigma, labels)
            flow = nll(velocity, noise_low - x0).mean()
        else:
            sigma_low = sigma * (1 - config.transition_ratio)
            x_low = diffuse(x0, sigma_low, noise_low)
            x = forward_transition(x_low, sigma_low, sigma, noise_high)
            velocity = self.mixture(x, sigma, labels)
            flow = transition_nll(velocity, x_low, x, sigma_low, sigma).mean()
        losses = {"loss": config.loss_weight * flow, "nll": flow}
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
    """A GM-DiT run."""

    module = MODULE
    free_to_change = trainer.Trainer.free_to_change | {
        "data", "accumulate", "gradient_checkpointing", "compile", "workers", "picture_solver", "vae",
    }  # fmt: skip

    def __init__(self, config: Config):
        self.dataset = LatentDataset(config.data)
        super().__init__(config)
        acc = self.accelerator
        if config.batch_size % (acc.num_processes * config.accumulate):
            raise ValueError(
                f"--batch-size {config.batch_size} cannot be divided among {acc.num_processes} processes with "
                f"{config.accumulate} pieces each; make it a multiple of {acc.num_processes * config.accumulate}"
            )
        share = config.batch_size // acc.num_processes
        self.vae: VAE | None = None
        if config.vae is not None and self.dataset.kind == "latents" and acc.is_main_process:
            self.vae = load_vae(config.vae, acc.device)
        self.rows = range(acc.process_index * share, (acc.process_index + 1) * share)
        self.batches: Iterator | None = None

    def new_model(self) -> GMDiT:
        config, (channels, height, width) = self.config, self.dataset.shape
        if height != width:
            raise ValueError(f"{config.data} holds samples of {height} x {width}; GM-DiT is trained on square ones")
        model = GMDiT(
            GMDiTConfig(
                num_components=config.num_components,
                channels=channels,
                latent_size=height,
                patch_size=config.patch_size,
                num_classes=len(self.dataset.classes),
                num_layers=config.num_layers,
                num_heads=config.num_heads,
                head_dim=config.head_dim,
                log_std_dim=config.log_std_dim,
                constant_log_std=config.constant_log_std,
                spectrum_layers=config.spectrum_layers,
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
        found, mine = read_metadata(self.path)["config"], dataclasses.asdict(self.model.config)
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
                    self.dataset,
                    batch_sampler=order,
                    num_workers=config.workers,
                    collate_fn=_identity,
                    pin_memory=acc.device.type == "cuda",
                )
            )
        totals: dict[str, Tensor] = {}
        for piece, rows in enumerate(pieces_of(self.rows, config.accumulate)):
            x0, labels = (t.to(acc.device, non_blocking=True) for t in next(self.batches))
            with self.gradient_of_piece(last=piece + 1 == config.accumulate):
                losses = self.prepared(x0, *self.draw(labels, x0.shape[1:], rows))
                acc.backward(losses["loss"] / config.accumulate)
            for name, value in losses.items():
                totals[name] = totals.get(name, 0) + value.detach() / config.accumulate
        return totals

    def draw(self, labels: Tensor, shape: tuple[int, ...], rows: range) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Labels with some dropped out (B,), sigma (B,), and two noises (B, C, h, w), for these rows of the batch."""
        config, size = self.config, torch.Size(shape).numel()
        noise = draw_noise(config.seed, self.step, rows, (2 + 2 * size,), labels.device)
        time, drop, low, high = noise.split([1, 1, size, size], 1)
        labels = torch.where(normal_cdf(drop[:, 0]) < config.class_dropout, len(self.dataset.classes), labels)
        sigma = time[:, 0].sigmoid() if config.time_sampling == "logit-normal" else normal_cdf(time[:, 0])
        return labels, sigma.clamp(min=MIN_SIGMA), low.unflatten(1, shape), high.unflatten(1, shape)

    def decay(self, step: int) -> float:
        """Half-life of 30 million images, or a twentieth of those seen if that is less (Karras et al. 2022)."""
        return 0.5 ** (1 / min(30e6 / self.config.batch_size, 0.05 * step))

    def draw_picture(self) -> Tensor | None:
        model = self.sampling_model()
        if not self.accelerator.is_main_process:
            return None
        rows, classes = 4, min(10, len(self.dataset.classes))
        labels = torch.linspace(0, len(self.dataset.classes) - 1, classes).long().repeat(rows)
        model.forward = autocast_of(model.forward, self.autocast)
        images = self.decode(sample_images(model, labels, solver=self.config.picture_solver))
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
        space = {"space": "pixels"} if self.dataset.kind == "pixels" else {"space": "sd-vae"}
        if index.get("scaling_factor") is not None:
            space["scaling_factor"] = index["scaling_factor"]
        return {"labels": self.dataset.classes, **space}

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
