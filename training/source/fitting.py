"""Fit a mixture source to prepared samples, to an array, or to images."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm

from gmflow_core.files.atomic import remove_leftovers
from gmflow_core.files.locks import locked
from gmflow_core.files.safetensors_files import peek_header
from gmflow_core.source.em import fit_mixture
from gmflow_core.source.files import save_source
from gmflow_core.source.moments import RunningMoments, fit_given_modes
from gmflow_core.source.source import GaussianMixtureSource
from training.common.devices import on_cpu, to_device
from training.common.processes import PATIENCE, held_by_main, together
from training.data.encode_tokens import encode_images, images_of
from training.data.encoded_images import EncodedImages
from training.data.image_folder import ImageList, list_images
from training.data.shards import INDEX, PLAN, LatentDataset
from training.data.tokens import (
    FILE,
    TokenFiles,
    check_count,
    keep_tokens,
    share_of,
    tokens_record,
)
from training.encoders.fingerprints import MARK
from training.encoders.load import load_vae
from training.source.config import Config, Covariance
from training.source.labels import FILE as LABELS
from training.source.labels import label_samples, remove_parts, write_labels
from training.source.own_files import REPORT, SOURCE, STATE, WEIGHTS, check_own_files
from training.source.report import draw_report, draw_weights

PRECISIONS = {"fp32": torch.float32, "fp64": torch.float64}
CHUNK = 2**24  # elements of samples in memory at a time
KEEP_EVERY = 600.0  # seconds between two saves of the sums over the samples


class Latents:
    """One process's samples of a prepared folder, in chunks.

    Args:
        dataset: the prepared samples (C, h, w).
        rows: this process's part of them.
        flat: yield chunks (m, D), and after each its mirror image if `flip`; otherwise yield
            chunks (m, C, h, w).
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

    def part(self, rows: range) -> Latents:
        """Return these samples as they are stored, without mirror images."""
        return Latents(self.dataset, rows, self.flat)


def fit(config: Config) -> GaussianMixtureSource:
    """Fit the source that the config describes, in all processes; the main one writes it.

    labels.npy and the pictures of the source are written beside it.

    Returns:
        The source, on the device.

    Raises:
        FileNotFoundError: the data, the tokens, the images or the encoder are missing.
        ValueError: one of them does not fit the others, the state in OUT is of another fit, or a
            file there is of none.
    """
    state = PartialState(cpu=on_cpu(config.device), timeout=PATIENCE)
    with together(state):
        check_own_files(config)
    fitting, dataset, flip = Fitting(config, state), None, False
    if (config.data / INDEX).exists() or (config.data / PLAN).exists():
        if config.vae is not None:
            raise ValueError(f"{config.data} is encoded already; leave --vae out")
        dataset = LatentDataset(config.data)
        flip = bool(dataset.index.get("flip")) if config.flip is None else config.flip
        source = fitting.prepared(dataset, flip)
    elif config.tokens is not None:
        raise ValueError(
            "--tokens belong to a folder that training.prepare wrote, "
            f"but --data {config.data} is none"
        )
    elif config.encoder is not None:
        images = list_images(config.data)
        if config.vae is not None:
            dataset, flip = encoded(config, images, state), config.flip is not False
        source = fitting.images(images, dataset, flip)
    elif config.data.is_dir():
        raise ValueError(
            f"{config.data} was not written by training.prepare; "
            "give such a folder, an array file, or --encoder"
        )
    else:
        samples = TokenFiles([config.data])
        source = fitting.em(samples.share(state), config.covariance, "samples")
        source = shaped(source, samples.shape)
    path = config.out / SOURCE
    with together(state):
        if state.is_main_process:
            values, space = facts(config, fitting, flip), space_of(dataset)
            save_source(source, path, facts=values, data=space)
            report = config.out / REPORT
            draw_report(source, fitting.log_likelihoods, dataset, report)
            sizes = write_labels(config.out, state.num_processes, source.num_modes)
            draw_weights(source.weights, sizes, config.out / WEIGHTS)
            kind = "spherical" if source.is_spherical else "diagonal"
            print(f"{path}: {source.num_modes} {kind} modes of {source.shape}; see {report}")
            used, most = int((sizes > 0).sum()), int(sizes.max())
            print(f"{config.out / LABELS}: {used} modes have samples, the largest {most:,}")
            remove_parts(config.out)
    moments_file(config, state).unlink(missing_ok=True)
    return source


class Fitting:
    """EM with its progress bar and its state, over all processes.

    Attributes:
        log_likelihoods: of the iterations of the last EM, in nats per sample.
        modes: likeliest modes of this process's samples or tokens by the last EM, (n,).
        tokens: all tokens that EM was fitted to; None if it was fitted to samples.
    """

    def __init__(self, config: Config, state: PartialState):
        self.config, self.state = config, state
        self.log_likelihoods: list[float] = []
        self.modes = torch.zeros(0, dtype=torch.int64)
        self.tokens: TokenFiles | None = None

    def prepared(self, dataset: LatentDataset, flip: bool) -> GaussianMixtureSource:
        """Fit prepared samples: by the modes of their tokens if there are tokens, or directly."""
        config, state = self.config, self.state
        if config.encoder is not None:
            images, kept = images_of(dataset, config.images)
            tokens = self.encode(images, kept, config.data / FILE)
            return self.by_tokens(tokens, dataset, flip)
        if config.tokens is not None:
            return self.by_tokens(TokenFiles([config.tokens]), dataset, flip)
        samples = Latents(dataset, share_of(len(dataset), state), flat=True, flip=flip)
        return shaped(self.em(samples, config.covariance, "samples"), dataset.shape)

    def images(
        self, images: ImageList, dataset: EncodedImages | None, flip: bool
    ) -> GaussianMixtureSource:
        """Fit the tokens of a folder of images, or its latents by the modes of the tokens."""
        config = self.config
        tokens = self.encode(images, range(len(images.files)), config.out / FILE)
        if dataset is not None:
            return self.by_tokens(tokens, dataset, flip)
        self.tokens = tokens
        return self.em(tokens.share(self.state), config.assigner_covariance, "tokens")

    def encode(self, images, kept, path: Path) -> TokenFiles:
        """Encode images with --encoder; see `encode_images`."""
        config = self.config
        with self.writing_tokens(path):
            return encode_images(
                images,
                kept,
                path,
                self.state,
                encoder=config.encoder,
                input_size=config.encoder_size,
                size=config.image_size,
                batch_size=config.batch_size,
                workers=config.workers,
            )

    @contextmanager
    def writing_tokens(self, path: Path) -> Iterator[None]:
        """Hold the lock of the tokens' folder while they are written, if they are not there yet.

        The folder may be DATA, which several fits with a --out of their own may read.
        """
        with together(self.state):
            if self.state.is_main_process:  # of a process that was killed while it wrote a part
                remove_leftovers(path.with_suffix(".parts"))
            out = os.path.realpath(self.config.out)
            needed = not path.exists() and os.path.realpath(path.parent) != out
        with held_by_main(self.state, locked(path.parent) if needed else nullcontext()):
            yield

    def em(
        self, samples: Latents | TokenFiles, covariance: Covariance, what: str
    ) -> GaussianMixtureSource:
        """Fit a mixture by EM, and find the samples' modes; it goes on from the state in OUT.

        Args:
            samples: this process's samples, in chunks (m, D).
            covariance: of the modes.
            what: title of the progress bar.

        Returns:
            The mixture of vectors (D,) in float32.
        """
        config, path = self.config, self.config.out / STATE
        with together(self.state):
            if self.state.is_main_process and config.restart:
                path.unlink(missing_ok=True)
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
            found = fit_mixture(
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
        self.log_likelihoods = found.log_likelihoods
        if not found.converged and self.state.is_main_process:
            print(
                f"EM has not converged after {config.max_iterations} iterations; "
                "raise --max-iterations to continue"
            )
        mixture = found.source.to(dtype=torch.float32)
        self.modes = label_samples(mixture, samples.part, samples.rows, config.out, self.state)
        return mixture

    def by_tokens(
        self, tokens: TokenFiles, dataset: LatentDataset | EncodedImages, flip: bool
    ) -> GaussianMixtureSource:
        """Fit a mixture to the tokens, then the moments of the samples of each of its modes."""
        config, state = self.config, self.state
        self.tokens = tokens
        check_count(tokens, len(dataset), config.data)
        if isinstance(dataset, LatentDataset):
            with self.writing_tokens(config.data / FILE), together(state):
                if state.is_main_process:
                    keep_tokens(tokens, config.data)
        mine = tokens.share(state)
        assigner = self.em(mine, config.assigner_covariance, "tokens")
        moments = RunningMoments(
            config.modes,
            dataset.shape,
            spherical=config.covariance == "spherical",
            device=state.device,
        )
        path = moments_file(config, state)
        settings = {
            "assigner": assigner.digest,
            "covariance": config.covariance,
            "rows": [mine.rows.start, mine.rows.stop],
        }
        if config.vae is not None:
            settings |= {"vae": config.vae, "size": config.image_size}
            if not is_older(path):
                settings[MARK] = dataset.fingerprint
        with together(state):
            if config.restart:
                path.unlink(missing_ok=True)
            begun = moments.restore(path, settings, len(mine))
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
            for x in self.latents(dataset, mine.rows[begun:]):
                yield x, self.modes[done : done + len(x)]
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

    def latents(self, dataset: LatentDataset | EncodedImages, rows: range) -> Iterable[Tensor]:
        """Return samples in chunks (m, C, h, w), on the device."""
        config = self.config
        if isinstance(dataset, EncodedImages):
            return dataset.read(rows, self.state, config.batch_size, config.workers)
        return (to_device(x, self.state.device) for x in Latents(dataset, rows))


def encoded(config: Config, images: ImageList, state: PartialState) -> EncodedImages:
    """Return the images' latents, without flips, as `RunningMoments.add_flipped` adds them."""
    with state.local_main_process_first():  # which downloads for the others
        vae = load_vae(config.vae, state.device)
    settings = {"name": config.vae, "size": config.image_size, "seed": config.seed}
    return EncodedImages(images, vae, images.folders, **settings)


def moments_file(config: Config, state: PartialState) -> Path:
    """Return the file where a process keeps its sums over the samples until the source is done."""
    return config.out / f"moments_{state.process_index}.safetensors"


def is_older(path: Path) -> bool:
    """Return whether a file of sums is of a version that knew no fingerprints of VAEs."""
    return MARK not in str(peek_header(path).get("__metadata__", {}).get("settings", MARK))


def shaped(source: GaussianMixtureSource, shape: tuple[int, ...]) -> GaussianMixtureSource:
    """Return a source of vectors as a source of samples of `shape`."""
    per_sample = [1] * len(shape) if source.is_spherical else shape
    std = source.std.view(-1, *per_sample)
    return GaussianMixtureSource(source.means.view(-1, *shape), std, source.log_weights)


def facts(config: Config, fitting: Fitting, flip: bool) -> dict[str, Any]:
    """Return the record of the fit for the source's metadata."""
    values = {
        k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()
    }
    tokens = {} if fitting.tokens is None else {"tokens": tokens_record(fitting.tokens)}
    return {
        "config": values,
        **tokens,
        "flip": flip,
        "log_likelihoods": fitting.log_likelihoods,
        "torch": torch.__version__,
    }


def space_of(dataset: LatentDataset | EncodedImages | None) -> dict[str, Any]:
    """Return the space of the source's samples, as `save_checkpoint` takes it."""
    if dataset is None:
        return {}
    index = dataset.index
    space = "pixels" if dataset.kind == "pixels" else index.get("space") or "sd-vae"
    scale = index.get("scaling_factor")
    return {"space": space} | ({} if scale is None else {"scaling_factor": scale})
