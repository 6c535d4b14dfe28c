"""Settings of image training, and their presets."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from training.loop.config import TrainerConfig, require

MIN_SIGMA = 1e-4  # sigmas are drawn from [MIN_SIGMA, 1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(TrainerConfig):
    """Training of image models. The defaults shown are those of the chosen preset."""

    preset: Literal[
        "gmdit_xl_k8",
        "gmdit_b_k8",
        "gmdit_s_k8",
        "ditdh_xl",
        "ditdh_s",
        "digits",
        "digits_flow_matching",
        "digits_modes",
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
        require(
            MIN_SIGMA < self.time_max <= 1,
            "time_max",
            self.time_max,
            f"above {MIN_SIGMA} and at most 1",
        )
        if self.source is None:
            for name in ("mode_conditional", "mode_weighting"):
                require(not getattr(self, name), name, True, "off without --source")
            return
        require(
            self.spectrum_layers is None,
            "spectrum_layers",
            self.spectrum_layers,
            "None with --source",
        )
        no_class = self.mode_conditional and self.class_dropout > 0
        require(
            not no_class,
            "class_dropout",
            self.class_dropout,
            "0 with --mode-conditional, whose labels are never dropped",
        )
        known = self.mode_conditional or self.transition_ratio is None
        require(
            known,
            "transition_ratio",
            ratio,
            "None with --source, unless the network knows the modes (--mode-conditional)",
        )
        flow_matching = self.num_components == 1 and self.constant_log_std == 0
        require(
            flow_matching or not self.mode_weighting,
            "mode_weighting",
            True,
            "off for a mixture (-k 1 --constant-log-std 0)",
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
        _DITDH_XL,
        preset="ditdh_s",
        out=Path("outputs/ditdh_s"),
        num_layers=12,
        num_heads=6,
        head_dim=64,
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
