"""Fit the sources and train the networks of `source_toys`, or load them from OUT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from gmflow_core.files.checkpoint import load_checkpoint, read_metadata, save_checkpoint
from gmflow_core.files.errors import quoted
from gmflow_core.models.mlp import GMFlowMLP, GMFlowMLPConfig
from gmflow_core.source.em import fit_mixture
from gmflow_core.source.files import load_source, read_source_metadata, save_source
from gmflow_core.source.source import GaussianMixtureSource
from training.experiments.source_toys import Config, Run, draw_data, loss_of
from training.loop.checks import check_network, same

FIT_SAMPLES = 20_000
FIT_TOLERANCE = 1e-3  # EM stops at this gain, and a better start must gain more; nats per sample


def settings_of(config: Config, seed: int) -> dict[str, Any]:
    """Return the settings that decide what a network learns."""
    names = ("iterations", "batch_size", "lr", "width", "num_components")
    return {"seed": seed} | {name: getattr(config, name) for name in names}


def require_same(path: Path, found: dict[str, Any], settings: dict[str, Any]) -> None:
    """Check that a file was made with these settings.

    Raises:
        ValueError: it was made with other settings.
    """
    differ = [
        f"{name} {quoted(found.get(name))} there, {value} asked for"
        for name, value in settings.items()
        if not same(found.get(name), value)
    ]
    if differ:
        raise ValueError(
            f"{path} was made with other settings ({'; '.join(differ)}); "
            "give another --out, or --restart"
        )


def source_of(toy: str, modes: int, seed: int, config: Config) -> GaussianMixtureSource:
    """Return a mixture of spherical modes fitted to the data; load it from OUT if it is there."""
    path = config.out / f"{toy}_source{modes}_{seed}.safetensors"
    settings = {"seed": seed, "samples": FIT_SAMPLES, "modes": modes, "starts": config.starts}
    if path.exists() and not config.restart:
        require_same(path, read_source_metadata(path)["training"], settings)
        source = load_source(path)
        source.require_shape((2,))
        require_same(path, {"modes": source.num_modes}, {"modes": modes})
        return source
    data = draw_data(toy, FIT_SAMPLES, torch.Generator().manual_seed(1000 + seed))
    source, log_likelihoods = likeliest_fit(data, modes, seed, config.starts)
    save_source(source, path, facts=settings | {"log_likelihoods": log_likelihoods})
    return source


def likeliest_fit(
    data: Tensor, modes: int, seed: int, starts: int
) -> tuple[GaussianMixtureSource, list[float]]:
    """Fit a mixture from several starts of EM.

    Returns:
        The first fit that is as likely as the best up to `FIT_TOLERANCE`, and the log-likelihoods
        of all, in nats per sample.
    """
    fits = [
        fit_mixture(data, modes, spherical=True, seed=start, tolerance=FIT_TOLERANCE)
        for start in range(seed, seed + starts)
    ]
    ends = [fit.log_likelihoods[-1] for fit in fits]
    enough = max(ends) - FIT_TOLERANCE
    best = next(fit for fit, end in zip(fits, ends, strict=True) if end >= enough)
    return best.source, ends


def network_of(
    run: Run, seed: int, config: Config, source: GaussianMixtureSource | None
) -> GMFlowMLP:
    """Train the network of a run; load it from OUT if it is there."""
    path, settings = config.out / run.file(seed), settings_of(config, seed)
    torch.manual_seed(seed)
    output = {"num_components": 1, "constant_log_std": 0.0}
    if run.mixture_output:
        output = {"num_components": config.num_components}
    labels = run.modes if run.noise == "known" else 0
    network = GMFlowMLP(
        GMFlowMLPConfig(
            embed_dim=64,
            hidden_dim=config.width,
            num_layers=3,
            min_period=0.2,
            num_classes=labels,
            **output,
        )
    )
    if path.exists() and not config.restart:
        metadata = read_metadata(path)
        require_same(path, metadata["training"], settings)
        check_network(metadata, network, "", path)
        return load_checkpoint(path)[0]
    train(network, run, seed, config, source)
    data = {}
    if source is not None:
        data["source"] = {
            "num_modes": run.modes,
            "shape": source.shape,
            "coupling": "independent" if run.noise == "independent" else "soft",
            "conditioning": "mode" if labels else "hidden",
        }
    save_checkpoint(network, path, facts=settings, data=data)
    return network.eval()


def train(
    network: GMFlowMLP, run: Run, seed: int, config: Config, source: GaussianMixtureSource | None
) -> None:
    """Train a network in place with Adam and a cosine schedule."""
    generator = torch.Generator().manual_seed(2000 + seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=config.lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.iterations)
    bar = tqdm(range(config.iterations), desc=run.file(seed), leave=False, dynamic_ncols=True)
    for step in bar:
        optimizer.zero_grad()
        x0 = draw_data(run.toy, config.batch_size, generator)
        loss = loss_of(network, run, source, x0, generator)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            bar.set_postfix(loss=f"{loss.item():.4f}")
