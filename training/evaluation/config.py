"""Settings of `training.evaluate`, and the points of a sweep."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from gmflow_core.sampling.few_steps import Choice, choose_sampling
from gmflow_core.sampling.guidance import Guidance
from gmflow_core.sampling.solvers import MEAN_SOLVERS, SOLVERS
from training.common.settings import require, require_device, require_ranges

NEIGHBOURS = 3  # k of precision and recall
SolverName = Literal[tuple(SOLVERS)]
# fmt: off
SWEEP = (
    0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.11, 0.13,
    0.16, 0.19, 0.23, 0.27, 0.33, 0.39, 0.47, 0.55, 0.65, 0.75,
)
# fmt: on


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Evaluation. The defaults shown are those of the chosen preset."""

    preset: Literal["default", "paper"] = "default"
    """Source of the other defaults; paper: GM-ODE 2 and GM-SDE 2 at 8 and 32 steps, 20 guidance
    weights."""
    checkpoint: tuple[str, ...] = ()
    """Models: files, folders in diffusers' layout, or the hub's names of them."""
    samples: tuple[Path, ...] = ()
    """Score these instead of sampling: .npz files in ADM's form (arr_0, and labels as arr_1), or
    folders of images. Give no --checkpoint with them."""
    data: Path | None = None
    """Prepared training data (training.prepare): the reference, and the training set of --features.
    Not needed for a model whose metadata describes its samples, with --reference and Inception or
    an existing classifier."""
    test_data: Path | None = None
    """Prepared data of images that were not trained on: the floor of all figures, and the test set
    of --features."""
    reference: Path | None = None
    """Compare with this instead of --data: an .npz (ADM's, training.reference's, or any with mu and
    sigma), StyleGAN's .pkl, a folder of images, or a prepared folder."""
    reference_count: int = 50_000
    """Images of the reference at most, chosen at random; precision and recall use as many as
    --count."""
    features: str = "inception"
    """inception, or a .safetensors file of a small classifier (up to 64 x 64 pixels), which is
    trained first if it does not exist."""
    feature_iterations: int = 1200
    """Training iterations of a small classifier."""
    inception_weights: Path | None = None
    """torch-fidelity's weight file; downloaded if not given."""
    saturation: Literal["reference", "digits"] = "reference"
    """Compare saturations with the reference images', or with the known distribution of
    training.digits."""
    count: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 50_000
    """Samples of each setting; of --samples with more, random ones."""
    solver: Annotated[
        tuple[SolverName, ...],
        tyro.conf.arg(
            help=f"Solvers; {' and '.join(MEAN_SOLVERS)} use the mean of the mixture. By default "
            "gm-ode, or gm-policy for a distilled model."
        ),
    ] = ()
    steps: tuple[int, ...] = ()
    """Numbers of steps, each with one network call; 0 returns the noise itself, which a flow must
    beat. By default 8, or what a distilled model was made for."""
    guidance: tuple[float, ...] = ()
    """Weights of probabilistic guidance, in [0, 1); 0 is none."""
    cfg: tuple[float, ...] = ()
    """Scales of classifier-free guidance, 1 or more; 1 is none."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Guidance acts between these two sigmas."""
    substeps: int | None = None
    """GM-ODE's substeps per step, by default 128 / steps and at least 4; for the GM policy, its
    substeps in all."""
    order: Literal[1, 2] = 2
    """Order of GM-ODE and GM-SDE."""
    spectrum: bool = True
    """GM-SDE draws x_0 with the model's spectrum network, if it has one; --no-spectrum draws every
    pixel on its own."""
    shift: float | None = None
    """Shift of the time grid; by default 1, or a distilled model's own. A distilled model also
    keeps the size of its last step."""
    class_shares: Literal["equal", "data"] = "equal"
    """How often each class is sampled: all alike, or as often as --data has it. Where the data have
    some classes more often than others, take "data", or the figures show that difference too."""
    source: str | None = None
    """Mixture source that the models were trained with: file, folder or hub id; modes are drawn by
    weight."""
    unlabelled: bool = False
    """Sample with the null label. Models of a source with hidden modes, which know no classes, are
    always sampled so."""
    guide: str | None = None
    """A weaker model for autoguidance, with the same labels or modes."""
    guide_scale: float = 1.5
    """Scale of autoguidance; 1 is none."""
    end: float = 0.0
    """Last time of the grid, before the shift; MM-FM takes 0.001, with 49 steps."""
    vae: str | None = None
    """Folder or hub name of the VAE that decodes latents; by default the one that the data was
    prepared with."""
    seed: int = 0
    """Image i of seed 0 has the seed i; other seeds give other images."""
    batch_size: int = 100
    """Images that a process samples at a time."""
    chunk_size: int = 500
    """Images per file; a stop loses at most one file per process."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the network's products: bf16 (with TF32 for what stays in float32), or fp32; auto: bf16 on
    a GPU, fp32 on the CPU. Weights and mixtures are float32 either way."""
    device: str = "auto"
    """auto (what accelerate finds) or cpu."""
    out: Path = Path("outputs/evaluation")
    """Folder for samples, results and plots; complete files found there are kept. Several machines
    need to share it."""
    export: tuple[Literal["npz", "png"], ...] = ()
    """Write the samples of each setting as OUT/npz/NAME.npz (ADM's form) or as PNG files in
    OUT/png/NAME too."""
    discard_samples: bool = False
    """Delete the samples of a setting once its figures are known; at 256 x 256, 50,000 take 10
    GB."""
    restart: bool = False
    """Delete the samples and results of earlier evaluations in OUT; other files stay."""

    def __post_init__(self):
        self.check_counts()
        for solver in self.solver:
            if solver not in SOLVERS:
                raise ValueError(f"--solver {solver} is unknown; choose from {', '.join(SOLVERS)}")
        if min(self.steps, default=0) < 0:
            raise ValueError(f"--steps has {min(self.steps)}; each must be at least 0")
        for weight in self.guidance:
            if not 0 <= weight < 1:
                raise ValueError(
                    f"--guidance has {weight}; weights of probabilistic guidance are in [0, 1) "
                    "(is it a --cfg scale?)"
                )
        for scale in self.cfg:
            if not 1 <= scale < math.inf:
                raise ValueError(
                    f"--cfg has {scale}; scales of classifier-free guidance are 1 or more "
                    "(is it a --guidance weight?)"
                )
        Guidance(0.0, interval=self.guidance_interval)
        require(self.shift is None or self.shift > 0, "shift", self.shift, "positive")
        known = self.class_shares == "equal" or self.data is not None
        require(known, "class_shares", self.class_shares, "equal without --data")
        check_features(self.features)
        require_device(self.device)
        require_ranges(self)

    def check_counts(self) -> None:
        """Check the ranges of counts, sizes and the seed.

        Raises:
            ValueError: one is out of range.
        """
        least = {"batch_size": 1, "chunk_size": 1, "feature_iterations": 1, "seed": 0}
        if self.substeps is not None:
            least["substeps"] = 1
        for name, smallest in least.items():
            value = getattr(self, name)
            require(value >= smallest, name, value, f"at least {smallest}")
        most = 9 * 10**9  # image i has the seed * 10^9 + i, which PyTorch takes below 2^63
        require(self.seed <= most, "seed", self.seed, f"at most {most}")
        for name in ("count", "reference_count"):
            if getattr(self, name) <= NEIGHBOURS:
                raise ValueError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}; precision and recall "
                    f"need at least {NEIGHBOURS + 1} images"
                )


def check_features(features: str) -> None:
    """Check --features.

    Raises:
        ValueError: it names neither Inception nor a file of a classifier.
    """
    if features != "inception" and not features.endswith(".safetensors"):
        raise ValueError(
            f"--features is {features!r}; give inception, or for the small classifier a file name "
            "that ends in .safetensors"
        )


PRESETS = {
    "default": Config(),
    "paper": Config(preset="paper", solver=("gm-ode", "gm-sde"), steps=(8, 32), guidance=SWEEP),
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One point of a sweep.

    Args:
        model: position in the list of checkpoints.
        checkpoint: short name of the checkpoint.
        choice: solver, network calls and time grid.
        guidance: "none", "probabilistic" or "cfg".
        scale: of the guidance; 0 for none.
    """

    model: int
    checkpoint: str
    choice: Choice
    guidance: str = "none"
    scale: float = 0.0

    @property
    def solver(self) -> str:
        """Name of the solver."""
        return self.choice.solver

    @property
    def steps(self) -> int:
        """Network calls."""
        return self.choice.steps

    @property
    def name(self) -> str:
        """Name of the folder, and of the row in the results."""
        scale = f"{self.scale:g}"
        guidance = {"none": "", "probabilistic": f"_w{scale}", "cfg": f"_cfg{scale}"}
        return f"{self.checkpoint}_{self.solver}_{self.steps}{guidance[self.guidance]}"

    def substeps(self, config: Config) -> int | None:
        """Return the number of substeps, as the solver counts them; None if it has none."""
        solver = SOLVERS[self.solver]
        if solver.substeps is None or not self.steps:
            return None
        if solver.substeps_in_all:
            return config.substeps or solver.substeps
        return config.substeps if config.substeps is not None else max(4, 128 // self.steps)


def settings_of(config: Config, records: Sequence[dict[str, Any]] = ()) -> list[Setting]:
    """Return all points of the sweep; those without guidance are merged and come first.

    Args:
        records: what each checkpoint says of its samples, see `choose_sampling`; a distilled one
            is sampled as it was made for, where --solver, --steps or --shift is not given.
    """
    kinds = [("probabilistic", w) for w in config.guidance] + [("cfg", s) for s in config.cfg]
    kinds = [
        ("none", 0.0) if Guidance(scale, kind).idle else (kind, scale) for kind, scale in kinds
    ] or [("none", 0.0)]
    kinds = sorted(dict.fromkeys(kinds), key=lambda k: (k[0] != "none", k[0] == "cfg"))
    records = records or [{}] * len(config.checkpoint)
    names = short_names(config.checkpoint)
    return [
        Setting(model, name, choice, *kind)
        for model, (name, record) in enumerate(zip(names, records, strict=True))
        for choice in choices(config, record)
        for kind in kinds
    ]


def choices(config: Config, record: dict[str, Any]) -> list[Choice]:
    """Return solvers and steps of a model's samples, without repetitions."""
    given = itertools.product(config.solver or (None,), config.steps or (None,))
    found = (choose_sampling(record, solver=a, steps=b, shift=config.shift) for a, b in given)
    return list(dict.fromkeys(found))


def short_names(checkpoints: Sequence[str], option: str = "--checkpoint") -> list[str]:
    """Return the last part of each checkpoint's path, or as many more as make it unique.

    For OUT/model.safetensors and OUT/weights.safetensors, which every training run writes, the
    path is that of the folder.

    Args:
        option: that they come from, for messages.

    Raises:
        ValueError: a checkpoint is given twice.
    """
    parts = [
        Path(c).with_suffix("").parts if c.endswith(".safetensors") else Path(c).parts
        for c in checkpoints
    ]
    parts = [
        tuple(part.strip("/\\") or "root" for part in p if part not in (".", "..")) for p in parts
    ]
    if len(set(parts)) < len(parts):
        raise ValueError(f"{option} names the same model twice: {' '.join(checkpoints)}")
    short = [p[:-1] if len(p) > 1 and p[-1] in ("model", "weights") else p for p in parts]
    parts = short if len(set(short)) == len(short) else parts
    parts = [p or ("here",) for p in parts]  # of "." and ".."
    names = []
    for p in parts:
        alone = (n for n in range(1, len(p)) if sum(q[-n:] == p[-n:] for q in parts) == 1)
        names.append("-".join(p[-next(alone, len(p)) :]))
    if len(set(names)) < len(names):
        raise ValueError(
            f"{option} has some whose results would have the same name ({', '.join(names)}); "
            "rename one"
        )
    return names
