"""Fit a mixture source to prepared latents."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm

from gmflow_core.source.em import fit_mixture
from gmflow_core.source.files import save_source
from gmflow_core.source.moments import RunningMoments, fit_given_modes
from gmflow_core.source.source import GaussianMixtureSource
from training.common.devices import on_cpu, to_device
from training.common.processes import together
from training.data.encode_tokens import encode_images, images_of
from training.data.image_folder import list_images
from training.data.shards import INDEX, PLAN, LatentDataset
from training.data.tokens import (
    FILE,
    TokenFiles,
    check_count,
    keep_tokens,
    read_tokens_record,
    share_of,
)
from training.source.config import Config, Covariance
from training.source.report import draw_report

PRECISIONS = {"fp32": torch.float32, "fp64": torch.float64}
CHUNK = 2**24  # elements of samples that are read at a time
KEEP_EVERY = 600.0  # seconds after which the sums over the samples are written down


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
            for leftover in config.out.glob(
                f".{path.name}.*.tmp"
            ):  # of a process killed while it wrote
                leftover.unlink()
            if config.restart:
                path.unlink(missing_ok=True)
        self.state.wait_for_everyone()
        bar = tqdm(
            total=config.max_iterations,
            desc=what,
            unit="it",
            disable=not self.state.is_main_process,
            dynamic_ncols=True,
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
            print(
                f"EM had not converged after {config.max_iterations} iterations; give more --max-iterations to go on"
            )
        return fit.source.to(dtype=torch.float32)

    def by_tokens(
        self, tokens: TokenFiles, dataset: LatentDataset, flip: bool
    ) -> GaussianMixtureSource:
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
        moments = RunningMoments(
            config.modes,
            dataset.shape,
            spherical=config.covariance == "spherical",
            device=state.device,
        )
        path = moments_file(config, state)
        settings = {
            "assigner": assigner.digest, "covariance": config.covariance, "rows": [mine.rows.start, mine.rows.stop],
        }  # fmt: skip
        with together(state):
            if config.restart:
                path.unlink(missing_ok=True)
            begun = moments.restore(path, settings)
        bar = tqdm(
            total=len(mine),
            initial=begun,
            desc="samples",
            unit="img",
            disable=not state.is_main_process,
            dynamic_ncols=True,
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
                samples(),
                config.modes,
                dataset.shape,
                flip=flip,
                assigner=assigner,
                device=state.device,
                moments=moments,
            )


def moments_file(config: Config, state: PartialState) -> Path:
    """Where a process keeps its sums over the samples until the source is written."""
    return config.out / f"moments_{state.process_index}.safetensors"


def hardest(judge: GaussianMixtureSource, tokens: Tensor) -> Tensor:
    """The most probable mode of each token."""
    return torch.cat(
        [
            judge.posterior_modes(part, "hard")
            for part in tokens.split(max(1, CHUNK // judge.num_modes))
        ]
    )


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
        raise ValueError(
            f"--tokens are those of a folder that training.prepare wrote, and --data {config.data} is none"
        )
    encode = {
        "encoder": config.encoder, "input_size": config.encoder_size, "size": config.image_size,
        "batch_size": config.batch_size, "workers": config.workers,
    }  # fmt: skip
    if prepared and config.encoder is not None:
        tokens = encode_images(
            *images_of(dataset, config.images), config.data / FILE, state, **encode
        )
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
        source = shaped(
            fitting.em(samples.share(state), config.covariance, "samples"), samples.shape
        )
    with together(state):
        if state.is_main_process:
            save_source(
                source,
                config.out / "source.safetensors",
                facts=facts(config, fitting, flip),
                data=space_of(dataset),
            )
            path = draw_report(source, fitting.log_likelihoods, dataset, config.out / "report.png")
            kind = "spherical" if source.is_spherical else "diagonal"
            print(
                f"{config.out / 'source.safetensors'}: {source.num_modes} {kind} modes of {source.shape}; see {path}"
            )
    moments_file(config, state).unlink(missing_ok=True)
    return source


def shaped(source: GaussianMixtureSource, shape: tuple[int, ...]) -> GaussianMixtureSource:
    """A source of vectors as one of samples of `shape`."""
    std = (
        source.std.view(-1, *[1] * len(shape))
        if source.is_spherical
        else source.std.view(-1, *shape)
    )
    return GaussianMixtureSource(source.means.view(-1, *shape), std, source.log_weights)


def facts(config: Config, fitting: Fitting, flip: bool) -> dict[str, Any]:
    """How the source was made, for its metadata."""
    values = {
        k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()
    }
    tokens = {} if config.tokens is None else {"tokens": read_tokens_record(config.tokens) or {}}
    return {
        "config": values,
        **tokens,
        "flip": flip,
        "log_likelihoods": fitting.log_likelihoods,
        "torch": torch.__version__,
    }


def space_of(dataset: LatentDataset | None) -> dict[str, Any]:
    """What the source's samples are, as `save_checkpoint` has it."""
    if dataset is None:
        return {}
    index = dataset.index
    space = "pixels" if dataset.kind == "pixels" else index.get("space") or "sd-vae"
    return {"space": space} | (
        {} if index.get("scaling_factor") is None else {"scaling_factor": index["scaling_factor"]}
    )
