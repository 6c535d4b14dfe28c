"""Settings of image training, and their presets."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from gmflow_core.sampling.solvers import SOLVERS
from training.common.settings import SMALLEST_SIGMA, require
from training.loop.config import ValidatedConfig

# Solvers of mixtures; those that take policies too are for distilled adapters
PictureSolver = Literal[
    tuple(name for name, s in SOLVERS.items() if s.needs_mixture and not s.takes_policies)
]

ENCODING = ("encode", "encode_precision", "image_size", "flip", "class_names")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageConfig(ValidatedConfig):
    """Training of image models. The defaults shown are those of the chosen preset.

    Raises:
        ValueError: a setting is out of its range, or two of them do not go together.
    """

    preset: Literal[
        "gmdit_xl_k8",
        "gmdit_b_k8",
        "gmdit_s_k8",
        "ditdh_xl",
        "ditdh_s",
        "digits",
        "digits_flow_matching",
        "digits_modes",
        "emoji",
        "emoji_flow_matching",
        "cifar10",
    ] = "gmdit_xl_k8"
    """Preset that sets the other defaults."""
    data: Path = Path("data/imagenet_256")
    """Folder written by training.prepare; with --encode, a folder of images."""
    out: Path = Path("outputs/imagenet")
    """Folder for checkpoint, TensorBoard logs and pictures; a run found there is resumed."""
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
    """Features of each head."""
    ddt_layers: int = 2
    """Transformer blocks of DiTDH's decoupled head."""
    ddt_width: int = 2048
    """Features of these blocks."""
    ddt_heads: int = 16
    """Attention heads of these blocks."""
    patch_size: int = 2
    """Side of the patch that a token stands for."""
    log_std_dim: int = 1024
    """Hidden width of the network that predicts log-std."""
    spectrum_layers: tuple[int, ...] | None = (64, 8)
    """Hidden widths of the spectrum network; None trains none."""
    transition_ratio: float | None = 0.5
    """Step of the transition loss, (sigma_high - sigma_low) / sigma_high in (0, 1].
    None: plain velocity NLL."""
    time_sampling: Literal["logit-normal", "uniform"] = "logit-normal"
    """Distribution of sigma."""
    time_max: float = 1.0
    """Largest time; times above are set to it, before the shift."""
    time_shift: float = 1.0
    """Shift of times towards noise, sigma = shift t / (1 + (shift - 1) t).
    For latents of many dimensions (RAE) take sqrt(dimensions / 4096)."""
    source: str | None = None
    """Mixture source of the noise: from training.fit_source, or the hub id of such a folder.
    None: N(0, I)."""
    coupling: Literal["soft", "hard", "independent"] = "soft"
    """Mode of the noise: drawn from the posterior, the most probable one, or drawn by weight."""
    mode_conditional: bool = False
    """Give the network the mode as its label, instead of the class."""
    mode_weighting: bool = False
    """Weight modes with a large loss more (MM-FM's focal weights); for flow matching only."""
    loss_weight: float = 2.0
    """Weight of the transition loss (nats per pixel, summed over channels)."""
    spectral_weight: float = 1.0
    """Weight of the spectral loss."""
    class_dropout: float = 0.1
    """Share of the labels that are replaced by "none"; 1 trains a model without classes."""
    accumulate: int = 1
    """Pieces that each process's part of a batch is divided into, to fit into memory."""
    optimizer: Literal["auto", "adamw8bit", "adamw"] = "auto"
    """AdamW with 8-bit state (bitsandbytes) or with 32-bit state; auto: 8-bit where it runs."""
    weight_decay: float = 0.05
    """Weight decay of the weights; biases have none."""
    clip: float = 10.0
    """Largest norm of the gradient, after the warm-up."""
    gradient_checkpointing: bool = True
    """Recompute the blocks in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """Compile the network with torch.compile."""
    workers: int | None = None
    """Processes that read the data, for each GPU; 0 reads in the main process.
    None: one for each core, up to 8."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Type of matrix products; weights, optimizer and mixture are always float32."""
    picture_solver: PictureSolver = "gm-ode"
    """Solver of the pictures, in 8 network calls each."""
    vae: str | None = None
    """Folder or hub id of the VAE that decodes the pictures of a model of latents.
    None shows the first three channels of the latents."""
    encode: bool = False
    """DATA is a folder of images, which --vae encodes in every iteration; no cache is needed."""
    encode_precision: Literal["fp32", "bf16"] = "fp32"
    """With --encode, the type of the encoder's matrix products; fp32 gives the latents of
    training.prepare, bf16 is faster on a GPU."""
    image_size: int = 256
    """With --encode, the width and height of the cropped images."""
    flip: bool = True
    """With --encode, mirror each image with probability 1/2, drawn anew in each epoch."""
    class_names: Path | None = None
    """With --encode, names of the classes, as training.prepare takes them."""

    def __post_init__(self):
        super().__post_init__()
        ratio, top = self.transition_ratio, self.time_max
        require(ratio is None or 0 < ratio <= 1, "transition_ratio", ratio, "in (0, 1], or None")
        require(self.accumulate >= 1, "accumulate", self.accumulate, "at least 1")
        require(0 <= self.class_dropout <= 1, "class_dropout", self.class_dropout, "in [0, 1]")
        require(self.clip > 0, "clip", self.clip, "positive")
        require((self.workers or 0) >= 0, "workers", self.workers, "0 or more")
        divided = self.shard and self.optimizer == "adamw8bit"
        require(not divided, "optimizer", self.optimizer, "adamw or auto with --shard")
        require(self.time_shift > 0, "time_shift", self.time_shift, "positive")
        self._check_encoding()
        expected = f"above {SMALLEST_SIGMA} and at most 1"
        require(SMALLEST_SIGMA < top <= 1, "time_max", top, expected)
        if self.source is None:
            for name in ("mode_conditional", "mode_weighting"):
                require(not getattr(self, name), name, True, "off without --source")
        else:
            self._check_source_settings()

    def _check_encoding(self) -> None:
        """Check the settings of --encode.

        Raises:
            ValueError: one is given without it, or it is given without a VAE.
        """
        require(self.vae is not None or not self.encode, "vae", self.vae, "given with --encode")
        require(self.image_size >= 1, "image_size", self.image_size, "at least 1")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            used = self.encode or field.name not in ENCODING or value == field.default
            require(used, field.name, value, "left out without --encode")

    def _check_source_settings(self) -> None:
        """Check the settings that a mixture source restricts.

        Raises:
            ValueError: one of them does not go with a source.
        """
        layers, dropout, ratio = self.spectrum_layers, self.class_dropout, self.transition_ratio
        known = self.mode_conditional
        require(layers is None, "spectrum_layers", layers, "None with --source")
        expected = "0 with --mode-conditional, whose labels are never dropped"
        require(dropout == 0 or not known, "class_dropout", dropout, expected)
        expected = "None with --source, unless the network knows the modes (--mode-conditional)"
        require(known or ratio is None, "transition_ratio", ratio, expected)
        flow_matching = self.num_components == 1 and self.constant_log_std == 0
        expected = "off for a mixture (-k 1 --constant-log-std 0)"
        require(flow_matching or not self.mode_weighting, "mode_weighting", True, expected)


_DIGITS = ImageConfig(
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
_DITDH_XL = ImageConfig(
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
    iterations=100_000,  # 80 epochs
    loss_weight=2 / 768,  # turns the loss into the mean squared error, which the clip is for
    batch_size=1024,
    lr=2e-4,
    weight_decay=0.0,
    clip=1.0,
)
_EMOJI = dataclasses.replace(
    _DIGITS,
    preset="emoji",
    data=Path("data/emoji_train"),
    out=Path("outputs/emoji"),
    patch_size=4,
    batch_size=64,
    iterations=20_000,
    precision="fp32",
    picture_every=2000,
)
_FLOW_MATCHING = {
    "num_components": 1,
    "constant_log_std": 0.0,
    "transition_ratio": None,
    "spectrum_layers": None,
}
PRESETS = {
    "gmdit_xl_k8": ImageConfig(),
    "gmdit_b_k8": ImageConfig(preset="gmdit_b_k8", num_layers=12, num_heads=12, head_dim=64),
    "gmdit_s_k8": ImageConfig(preset="gmdit_s_k8", num_layers=12, num_heads=6, head_dim=64),
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
        **_FLOW_MATCHING,
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
    "cifar10": ImageConfig(
        preset="cifar10",
        data=Path("data/cifar10_train"),
        out=Path("outputs/cifar10"),
        num_components=2,
        num_layers=12,
        num_heads=6,
        head_dim=64,
        log_std_dim=384,
        class_dropout=1.0,
        batch_size=128,
        iterations=400_000,
        spectrum_layers=None,
        gradient_checkpointing=False,
    ),
    "emoji": _EMOJI,
    "emoji_flow_matching": dataclasses.replace(
        _EMOJI,
        preset="emoji_flow_matching",
        out=Path("outputs/emoji_flow_matching"),
        **_FLOW_MATCHING,
    ),
}
