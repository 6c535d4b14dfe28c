"""Places at which a step of a solver or of a training waits for the device."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch

from gmflow_core import Guidance, sample_images
from gmflow_core.fast import quantiles
from gmflow_core.gaussians.transport import AxisMap, weights_given
from gmflow_core.models.gmdit import GMDiT, GMDiTConfig
from tests.benchmarks.loops import cpu_or_auto
from tests.benchmarks.measure import REPOSITORY
from tests.helpers import WAITING, Waits
from tests.training import image_runs

from .run import Run, check
from .sampling import folder_in

SAID = "called a synchronizing CUDA operation"
# the one place that has to: eigh, by which GM-SDE with a spectrum and the spectral loss find axes
KNOWN = ("gmflow_core/gaussians/transport.py", "aten._linalg_eigh", "aten.linalg_eigh")
WHOLE = ("aten.linalg_eigh", "aten.item", "aten.is_nonzero")  # as inference mode dispatches them
SOLVERS = ("gm-ode", "gm-sde", "gm-policy", "euler")
GPU_DRAWS = AxisMap(quantiles.quantile_by_sections, weights_given)  # of `axis_map` on a GPU


def places(function: Callable[[], object], device: str) -> Counter[str]:
    """Return where a call waits for the device, and how often.

    On a GPU CUDA's own record names the lines; on a CPU, on which nothing waits, operations that
    would wait on a GPU are counted.
    """
    if device == "cpu":
        with Waits(WAITING + WHOLE) as waits:
            function()
        return Counter(waits.found)
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return Counter(
        f"{short(warning.filename)}:{warning.lineno}"
        for warning in caught
        if SAID in str(warning.message)
    )


def short(path: str) -> str:
    """Return a file's path within the repository, or its last parts."""
    found = Path(path).resolve()
    if found.is_relative_to(REPOSITORY) and "site-packages" not in found.parts:
        return found.relative_to(REPOSITORY).as_posix()
    return "/".join(found.parts[-3:])


def waits(run: Run) -> Iterator[tuple[str, dict]]:
    """Count waits of a step of each solver, unguided and guided, and of a training step."""
    sizes = {"num_layers": 2, "num_heads": 2, "head_dim": 16, "latent_size": 8, "num_classes": 10}
    config = GMDiTConfig(log_std_dim=16, num_components=4, spectrum_layers=(8, 4), **sizes)
    torch.manual_seed(0)
    network = GMDiT(config).to(run.device).eval().requires_grad_(False)
    for solver in SOLVERS:
        for guidance in (None, Guidance(0.3)):
            if guidance is not None and solver == "euler":
                continue
            yield solver_waits(run, network, solver, guidance)
    yield training_waits(run)


def solver_waits(
    run: Run, network: GMDiT, solver: str, guidance: Guidance | None
) -> tuple[str, dict]:
    """Count the waits of two further steps: those of four steps but those of two."""
    case = f"a step of {solver}{' with guidance' * (guidance is not None)}"
    sample = functools.partial(
        sample_images, network, torch.arange(2), solver=solver, guidance=guidance
    )
    draws = mock.patch("gmflow_core.sampling.solvers.axis_map", return_value=GPU_DRAWS)
    with draws if run.device == "cpu" else contextlib.nullcontext():
        sample(steps=4)  # in the first call forms are checked
        few, many = (places(functools.partial(sample, steps=steps), run.device) for steps in (2, 4))
    return case, figures(many - few, case, 2)


def training_waits(run: Run) -> tuple[str, dict]:
    """Count the waits of an iteration of the trainer of images, with clipping."""
    data = image_runs.write_colours(folder_in(run, "colours_waits"))
    more = ["--device", cpu_or_auto(run), "--warmup", "0"]
    if run.device == "cuda":
        more += ["--precision", "bf16"]
    trainer = image_runs.new_trainer(data, run.folder / "waits", 20, *more)
    image_runs.losses_of(trainer, 2)  # opens the data
    case = "an iteration of training"
    return case, figures(places(trainer.iterate, run.device), case, 1)


def figures(found: Counter[str], case: str, steps: int) -> dict:
    """Return waits per step by place.

    Raises:
        WrongError: there are others than the known one.
    """
    others = {place: count for place, count in found.items() if not place.startswith(KNOWN)}
    check(not others, f"waits of {case}", f"none, or only in {KNOWN[0]}", others)
    return {"waits": found.total() / steps, **{p: count / steps for p, count in found.items()}}
