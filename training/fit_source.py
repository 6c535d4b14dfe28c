"""Fit a Gaussian-mixture source (MM-FM, CVPR 2026), from the repository's root:

    python -m training.fit_source --data data/digits_train --modes 64 --out outputs/digits_source      # the latents themselves
    python -m training.fit_source --data points.npy --modes 8 --out outputs/points                     # any (N, D) array
    python -m training.fit_source --data data/imagenet_rae --encoder dinov2 --modes 8192 --out outputs/source
    python -m training.fit_source --data data/imagenet_rae --tokens tokens.npy --modes 8192 --out outputs/source
    torchrun --nproc-per-node 8 -m training.fit_source --data ...                                      # the same on eight GPUs
    python -m training.fit_source convert FILE.pkl --out source.safetensors --assigner CLS.pkl         # published mixtures

Without tokens, EM with a k-means++ start fits the mixture to the samples. With one token for each sample, from a frozen encoder
or from a file, EM fits a mixture to the tokens, each sample belongs to the mode of its token, and one pass over the samples
gives the modes' means and variances; the tokens stay in DATA/tokens.safetensors for training. OUT/source.safetensors is the
source, with the mixture of the tokens in it; OUT/report.png shows its modes.

Stopped in any way and started again with the same command, it keeps the tokens that are made, goes on at the last iteration of
EM, and loses ten minutes of the pass over the samples at most. Several machines need a shared OUT and DATA.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm

from gmflow_core.pictures import image_grid
from gmflow_core.source import GaussianMixtureSource, load_source, save_source
from gmflow_core.source_convert import convert_pickle
from gmflow_core.source_fit import RunningMoments, fit_given_modes, fit_mixture
from training.devices import on_cpu, to_device
from training.evaluate_report import figure
from training.latents import INDEX, PLAN, LatentDataset, to_pixels, whole_file
from training.prepare import list_images
from training.processes import command, together
from training.tokens import (
    FILE,
    TokenFiles,
    check_count,
    encode_images,
    images_of,
    keep_tokens,
    read_record,
    share_of,
)

Covariance = Literal["diagonal", "spherical"]
PRECISIONS = {"fp32": torch.float32, "fp64": torch.float64}
CHUNK = 2**24  # elements of samples that are read at a time
SHOWN = 64  # modes in the picture
KEEP_EVERY = 600.0  # seconds after which the sums over the samples are written down


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Fitting of a source."""

    data: Path
    """Folder that training.prepare wrote; or an array of samples in .npy, .npz or .safetensors; or, with --encoder, a folder of
    images, whose tokens are fitted."""
    out: Path
    """Folder for the source, the state to go on from, and the report."""
    modes: Annotated[int, tyro.conf.arg(aliases=["-m"])]
    """M, the number of Gaussians; far fewer than samples, or they are learnt by heart."""
    covariance: Covariance = "spherical"
    """Of the source's modes: one variance for each dimension, or one for all of them."""
    tokens: Path | None = None
    """File with one token for each sample of DATA, in their order."""
    encoder: str | None = None
    """Frozen encoder that makes the tokens: dinov2, siglip2, mae, or the folder or hub id of one."""
    encoder_size: int | None = None
    """Pixels a side that the encoder is given; that of its kind by default."""
    images: Path | None = None
    """The images that DATA was made from; where they were then by default."""
    image_size: int = 256
    """Width and height of the images' centre crops, before the encoder scales them."""
    assigner_covariance: Covariance = "diagonal"
    """Of the mixture of the tokens, which says what mode a sample belongs to."""
    flip: bool | None = None
    """Count each sample's mirror image too; by default if training.prepare mirrored some."""
    max_iterations: int = 100
    """EM ends after so many iterations."""
    tolerance: float = 1e-3
    """EM ends when the mean log-likelihood changes by less, in nats."""
    reg_covar: float = 1e-6
    """Added to the variances."""
    precision: Literal["fp32", "fp64"] = "fp32"
    """Of the products over samples and modes; sums over samples are fp64 either way."""
    batch_size: int = 64
    """Images that the encoder takes at a time."""
    workers: int | None = None
    """Processes that decode images, for each GPU; by default as many as there are cores for, up to 8."""
    seed: int = 0
    """Seed of k-means++."""
    device: str = "auto"
    """auto (what accelerate finds) or cpu."""
    restart: bool = False
    """Throw away the state found in OUT; tokens are kept."""

    def __post_init__(self):
        for name in ("modes", "max_iterations", "batch_size", "image_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if self.tolerance < 0 or not self.reg_covar > 0:
            raise ValueError(f"--tolerance is {self.tolerance} and --reg-covar {self.reg_covar}; both must be positive")
        if self.device not in ("auto", "cpu"):
            raise ValueError(f"--device is {self.device!r}; give auto or cpu (choose a GPU with CUDA_VISIBLE_DEVICES)")
        if self.tokens is not None and self.encoder is not None:
            raise ValueError("both --tokens and --encoder were given; the tokens come from one of them")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Conversion of a published mixture."""

    source: tyro.conf.Positional[Path]
    """Pickle of a scikit-learn mixture or of a dict of arrays; nothing in it is run."""
    out: Path
    """File to write, .safetensors."""
    assigner: Path | None = None
    """The mixture of the tokens (.pkl or .safetensors), for one of latents."""


class Latents:
    """One process's part of a prepared folder's samples, in chunks.

    Args:
        rows: which samples.
        flat: chunks (m, D), and after each its mirror image if `flip`; otherwise (m, C, h, w).
    """

    def __init__(self, dataset: LatentDataset, rows: range, flat: bool = False, flip: bool = False):
        self.dataset, self.rows, self.flat, self.flip = dataset, rows, flat, flip
        self.step = max(1, min(1024, CHUNK // torch.Size(dataset.shape).numel()))

    def __iter__(self) -> Iterator[Tensor]:
        for low in range(self.rows.start, self.rows.stop, self.step):
            x, _ = self.dataset.__getitems__(range(low, min(low + self.step, self.rows.stop)))
            if not self.flat:
                yield x
                continue
            yield x.flatten(1)
            if self.flip:
                yield x.flip(-1).flatten(1)


class Fitting:
    """The processes, and EM with its progress bar and its state."""

    def __init__(self, config: Config, state: PartialState):
        self.config, self.state = config, state
        self.log_likelihoods: list[float] = []

    def em(self, samples: Any, covariance: Covariance, what: str) -> GaussianMixtureSource:
        config, path = self.config, self.config.out / "state.safetensors"
        if self.state.is_main_process:
            for leftover in config.out.glob(f".{path.name}.*.tmp"):  # of a process killed while it wrote
                leftover.unlink()
            if config.restart:
                path.unlink(missing_ok=True)
        self.state.wait_for_everyone()
        bar = tqdm(
            total=config.max_iterations, desc=what, unit="it", disable=not self.state.is_main_process, dynamic_ncols=True
        )

        def progress(done: int, log_likelihood: float) -> None:
            bar.update(done - bar.n)
            bar.set_postfix(log_likelihood=f"{log_likelihood:.4f}")

        with bar:
            fit = fit_mixture(
                samples,
                config.modes,
                spherical=covariance == "spherical",
                seed=config.seed,
                max_iterations=config.max_iterations,
                tolerance=config.tolerance,
                reg_covar=config.reg_covar,
                dtype=PRECISIONS[config.precision],
                device=self.state.device,
                state=path,
                progress=progress,
            )
        self.log_likelihoods = fit.log_likelihoods
        if not fit.converged and self.state.is_main_process:
            print(f"EM had not converged after {config.max_iterations} iterations; give more --max-iterations to go on")
        return fit.source.to(dtype=torch.float32)

    def by_tokens(self, tokens: TokenFiles, dataset: LatentDataset, flip: bool) -> GaussianMixtureSource:
        """The mixture of the tokens, then that of the samples of its modes."""
        config, state = self.config, self.state
        check_count(tokens, len(dataset), config.data)
        with together(state):
            if state.is_main_process:
                keep_tokens(tokens, config.data)
        mine = tokens.share(state)
        assigner = self.em(mine, config.assigner_covariance, "tokens")
        judge = assigner.to(state.device)
        modes = torch.cat([hardest(judge, chunk.to(state.device)) for chunk in mine])
        moments = RunningMoments(config.modes, dataset.shape, spherical=config.covariance == "spherical", device=state.device)
        path = moments_file(config, state)
        settings = {
            "assigner": assigner.digest, "covariance": config.covariance, "rows": [mine.rows.start, mine.rows.stop],
        }  # fmt: skip
        with together(state):
            if config.restart:
                path.unlink(missing_ok=True)
            begun = moments.restore(path, settings)
        bar = tqdm(
            total=len(mine), initial=begun, desc="samples", unit="img", disable=not state.is_main_process, dynamic_ncols=True
        )

        def samples() -> Iterator[tuple[Tensor, Tensor]]:
            done, kept = begun, time.monotonic()
            for x in Latents(dataset, mine.rows[begun:]):
                yield to_device(x, state.device), modes[done : done + len(x)]
                done += len(x)
                bar.update(len(x))
                if time.monotonic() - kept > KEEP_EVERY:
                    moments.save(path, settings)
                    kept = time.monotonic()

        with bar:
            return fit_given_modes(
                samples(), config.modes, dataset.shape, flip=flip, assigner=assigner, device=state.device, moments=moments
            )


def moments_file(config: Config, state: PartialState) -> Path:
    """Where a process keeps its sums over the samples until the source is written."""
    return config.out / f"moments_{state.process_index}.safetensors"


def hardest(judge: GaussianMixtureSource, tokens: Tensor) -> Tensor:
    """The most probable mode of each token."""
    return torch.cat([judge.posterior_modes(part, "hard") for part in tokens.split(max(1, CHUNK // judge.num_modes))])


def fit(config: Config) -> GaussianMixtureSource:
    """Fit the source that the config describes; every process does its share, the main one writes.

    Returns:
        The source, on the device.

    Raises:
        FileNotFoundError, ValueError: the data, the tokens, the encoder or the state are not as they should be.
    """
    state = PartialState(cpu=on_cpu(config.device), timeout=timedelta(days=7))
    fitting, dataset, flip = Fitting(config, state), None, False
    prepared = (config.data / INDEX).exists() or (config.data / PLAN).exists()
    if prepared:
        dataset = LatentDataset(config.data)
        flip = bool(dataset.index.get("flip")) if config.flip is None else config.flip
    elif config.tokens is not None:
        raise ValueError(f"--tokens are those of a folder that training.prepare wrote, and --data {config.data} is none")
    encode = {
        "encoder": config.encoder, "input_size": config.encoder_size, "size": config.image_size,
        "batch_size": config.batch_size, "workers": config.workers,
    }  # fmt: skip
    if prepared and config.encoder is not None:
        tokens = encode_images(*images_of(dataset, config.images), config.data / FILE, state, **encode)
        source = fitting.by_tokens(tokens, dataset, flip)
    elif prepared and config.tokens is not None:
        source = fitting.by_tokens(TokenFiles([config.tokens]), dataset, flip)
    elif prepared:
        samples = Latents(dataset, share_of(len(dataset), state), flat=True, flip=flip)
        source = shaped(fitting.em(samples, config.covariance, "samples"), dataset.shape)
    elif config.encoder is not None:
        images = list_images(config.data)
        tokens = encode_images(images, range(len(images.files)), config.out / FILE, state, **encode)
        source = fitting.em(tokens.share(state), config.assigner_covariance, "tokens")
    else:
        if config.data.is_dir():
            raise ValueError(
                f"{config.data} was not written by training.prepare; give such a folder, an array file, or --encoder"
            )
        samples = TokenFiles([config.data])
        source = shaped(fitting.em(samples.share(state), config.covariance, "samples"), samples.shape)
    with together(state):
        if state.is_main_process:
            save_source(source, config.out / "source.safetensors", facts=facts(config, fitting, flip), data=space_of(dataset))
            path = draw_report(source, fitting.log_likelihoods, dataset, config.out / "report.png")
            kind = "spherical" if source.is_spherical else "diagonal"
            print(f"{config.out / 'source.safetensors'}: {source.num_modes} {kind} modes of {source.shape}; see {path}")
    moments_file(config, state).unlink(missing_ok=True)
    return source


def shaped(source: GaussianMixtureSource, shape: tuple[int, ...]) -> GaussianMixtureSource:
    """A source of vectors as one of samples of `shape`."""
    std = source.std.view(-1, *[1] * len(shape)) if source.is_spherical else source.std.view(-1, *shape)
    return GaussianMixtureSource(source.means.view(-1, *shape), std, source.log_weights)


def facts(config: Config, fitting: Fitting, flip: bool) -> dict[str, Any]:
    """How the source was made, for its metadata."""
    values = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()}
    tokens = {} if config.tokens is None else {"tokens": read_record(config.tokens) or {}}
    return {"config": values, **tokens, "flip": flip, "log_likelihoods": fitting.log_likelihoods, "torch": torch.__version__}


def space_of(dataset: LatentDataset | None) -> dict[str, Any]:
    """What the source's samples are, as `save_checkpoint` has it."""
    if dataset is None:
        return {}
    index = dataset.index
    space = "pixels" if dataset.kind == "pixels" else index.get("space") or "sd-vae"
    return {"space": space} | ({} if index.get("scaling_factor") is None else {"scaling_factor": index["scaling_factor"]})


def draw_report(source: GaussianMixtureSource, log_likelihoods: list[float], dataset: LatentDataset | None, path: Path) -> Path:
    """The likeliest modes' means as pictures where they can be drawn, the weights, and the log-likelihood of each iteration."""
    drawing, axes = figure(1, 3, 3.2, 3.2)
    means, weights, curve = axes[0]
    means.axis("off")
    order = source.log_weights.argsort(descending=True)
    shape, chosen = source.shape, order[:SHOWN].cpu()
    if len(shape) == 3 and shape[0] in (1, 3, 4):
        x = source.means.cpu()[chosen][:, :3].expand(-1, 3, -1, -1)
        pixels = dataset is not None and dataset.kind == "pixels"
        x = to_pixels(x) / 255 if pixels else (0.5 + 0.25 * x / x.std()).clamp(0, 1)
        means.imshow(image_grid(x, columns=round(len(x) ** 0.5), scale=max(1, 32 // shape[-1])).numpy())
        means.set_title(f"means of {len(x)} modes, heaviest first", fontsize=9)
    elif shape == (2,):
        means.axis("on")
        means.scatter(*source.means.cpu().T, s=400 * source.weights.cpu(), alpha=0.6)
        means.set_aspect("equal")
        means.set_title("means, size by weight", fontsize=9)
    else:
        means.set_title(f"samples of {shape} are not drawn", fontsize=9)
    weights.hist(source.weights.cpu().numpy() * source.num_modes, bins=40)
    weights.set_xlabel("weight times number of modes")
    weights.set_ylabel("modes")
    shown = log_likelihoods[1:] or log_likelihoods  # the first is that of the start, far below
    done = range(len(log_likelihoods) - len(shown) + 1, len(log_likelihoods) + 1)
    curve.plot(done, shown, marker="." if len(shown) < 50 else "")
    curve.set_xlabel("iteration of EM")
    curve.set_ylabel("log-likelihood, nats per sample")
    with whole_file(path) as temporary:
        drawing.savefig(temporary, format="png")
    return path


def convert(config: ConvertConfig) -> GaussianMixtureSource:
    """Write a published mixture as a source.

    Raises:
        FileNotFoundError, ValueError: a file is missing, is refused, or holds no mixture.
    """
    assigner = config.assigner
    if assigner is not None:
        assigner = convert_pickle(assigner) if assigner.suffix in (".pkl", ".pickle", ".joblib") else load_source(assigner)
    source = convert_pickle(config.source, assigner)
    save_source(source, config.out, facts={"converted": config.source.name})
    print(f"{config.out}: {source.num_modes} {'spherical' if source.is_spherical else 'diagonal'} modes of {source.shape}")
    return source


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    prog = "python -m training.fit_source"
    with command():
        if arguments[:1] == ["convert"]:
            convert(tyro.cli(ConvertConfig, args=arguments[1:], prog=f"{prog} convert"))
            return
        fit(tyro.cli(Config, args=arguments, prog=prog, description=__doc__))


if __name__ == "__main__":
    main()
