"""Solvers on the device: against the CPU from the same seeds, and their time beside Euler's."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from gmflow_core import cli, flow_sigmas, load_checkpoint, sample_images
from gmflow_core.fast.choice import METHOD_VARIABLE
from gmflow_core.files.checkpoint import SHIPPED
from gmflow_core.models.gmdit import GMDiT, GMDiTConfig
from gmflow_core.models.precision import chosen_precision, set_precision
from gmflow_core.toys.points import sample_points
from tests.benchmarks.measure import extra_memory, quartiles, ratios, take_turns
from tests.training import evaluation_runs

from .run import GB, Run, check, check_finite, check_near

STEPS = 8
SAME = 5e-3  # error allowed between the latents of two devices: a network's calls enlarge rounding
IMAGE_CASES: tuple[tuple[str, int, dict[str, Any]], ...] = (  # the shipped model, calls, settings
    ("digits_k8", 4, {"solver": "gm-policy"}),
    ("digits_k8", 4, {"solver": "gm-policy", "stochasticity": 1.0}),
    ("digits_one_call", 1, {"solver": "gm-policy"}),
    ("digits_k8", 4, {"solver": "gm-ode"}),
    ("digits_k8", 4, {"solver": "euler"}),
    ("digits_k8", 4, {"solver": "dpmpp-2m"}),
    ("digits_k8", 4, {"solver": "uni-pc"}),
)


@contextmanager
def plain_form() -> Iterator[None]:
    """Let rollouts inside take the definition."""
    before = os.environ.get(METHOD_VARIABLE)
    os.environ[METHOD_VARIABLE] = "plain"
    try:
        yield
    finally:
        del os.environ[METHOD_VARIABLE]
        if before is not None:
            os.environ[METHOD_VARIABLE] = before


def policy(run: Run) -> Iterator[tuple[str, dict]]:
    """Sample shipped models on the device and, by the plain definition, on the CPU."""
    cases = run.size(IMAGE_CASES, IMAGE_CASES[1:4])
    labels = torch.arange(run.size(8, 2))
    for name, steps, settings in cases:
        case = f"{name}, {steps} calls, {' '.join(map(str, settings.values()))}"
        path = SHIPPED / f"{name}.safetensors"
        # cuDNN would round a convolution's factors to TF32
        with torch.backends.cudnn.flags(enabled=False):
            found, right = (
                functools.partial(sample_images, load_checkpoint(path, device)[0], labels)
                for device in (run.device, "cpu")
            )
            sample = found(steps=steps, **settings)
            with plain_form():
                expected = right(steps=steps, **settings)
        yield case, {"error": check_near(sample, expected, SAME, case)}
    case = "checkerboard_k64, 4 calls, gm-policy"
    path, count = SHIPPED / "checkerboard_k64.safetensors", run.size(20_000, 200)
    draw = functools.partial(sample_points, count=count, solver="gm-policy", steps=4, seed=0)
    sample = draw(load_checkpoint(path, run.device)[0])
    with plain_form():
        expected = draw(load_checkpoint(path)[0])
    # points beside the edge of a square may go either way
    apart = (sample.cpu() - expected).abs().amax(1) > SAME
    check(apart.float().mean() < 1e-3, case, "0.1 % of points to differ", f"{apart.sum()} do")
    yield case, {"points that differ": int(apart.sum()), "of": count}


def published_network(run: Run) -> GMDiT:
    """Return a GM-DiT of the published size on the device, with random weights.

    It runs in the precision that commands choose: bfloat16 on a GPU that has it.
    """
    config = GMDiTConfig(spectrum_layers=(64, 8))
    if run.quick:
        tiny = {"num_layers": 1, "num_heads": 2, "head_dim": 16, "latent_size": 8}
        config = GMDiTConfig(spectrum_layers=(8, 4), num_components=3, log_std_dim=16, **tiny)
    torch.manual_seed(0)
    with torch.device(run.device):
        network = GMDiT(config).eval().requires_grad_(False)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.02)  # fresh ones have layers of zeros
    return set_precision(network, chosen_precision("auto", torch.device(run.device)))


def solvers(run: Run) -> Iterator[tuple[str, dict]]:
    """Time GM-ODE and GM-SDE of GM-DiT XL beside Euler, at equal network calls."""
    run.require_memory(8)
    network, steps = published_network(run), run.size(STEPS, 2)
    for batch in run.size((1, 32), (2,)):
        yield compare_solvers(run, network, steps, batch)


def compare_solvers(run: Run, network: GMDiT, steps: int, batch: int) -> tuple[str, dict]:
    """Time the solvers, and the network's calls alone, at one batch size."""
    config = network.config
    size = f"{config.num_layers} layers of width {config.width}"
    case = f"GM-DiT, {size}, batch {batch}, {steps} calls"
    labels = torch.arange(batch, device=run.device) % config.num_classes
    side = config.latent_size
    x = torch.randn(batch, config.channels, side, side, device=run.device)
    calls: list[int] = []

    def alone() -> None:
        for sigma in flow_sigmas(steps).tolist()[:-1]:
            network(x, torch.full((batch,), sigma, device=run.device), labels)

    forms: dict[str, Any] = {
        name: functools.partial(sample_images, network, labels, solver=name, steps=steps)
        for name in ("euler", "gm-ode", "gm-sde")
    }
    hook = network.register_forward_hook(lambda *_: calls.append(1))
    for name, form in forms.items():
        calls.clear()
        samples: Tensor = form()
        check(len(calls) == steps, f"network calls of {name}", str(steps), len(calls))
        check_finite(samples, f"latents of {name}, {case}")
    hook.remove()
    with torch.inference_mode():
        times = take_turns({"network": alone, **forms}, run.device, **run.budget(8.0))
    figures = {}
    for name, form in forms.items():
        alone_share = quartiles(
            [t / whole for t, whole in zip(times["network"], times[name], strict=True)]
        )
        figures[name] = {
            "images a second": batch / quartiles(times[name])[1],
            "time / Euler's": ratios(times[name], times["euler"]),
            "outside the network": [1 - share for share in reversed(alone_share)],
        }
        if run.device == "cuda":
            figures[name]["extra GB"] = extra_memory(form, run.device) / GB
    return case, figures


def commands(run: Run) -> Iterator[tuple[str, dict]]:
    """Run `gmflow sample` and `training.evaluate` as people do: in bf16 on a GPU."""
    tensors = {}
    for precision in ("auto", "fp32"):
        out = run.folder / f"{precision}.safetensors"
        model = str(SHIPPED / "digits_k8.safetensors")
        given = ["sample", model, "--labels", "3", "--count", str(run.size(32, 2))]
        given += ["--solver", "gm-ode", "--precision", precision, "--device", run.device]
        cli.main([*given, "--steps", str(run.size(8, 2)), "--out", str(out)])
        (tensors[precision],) = (t for t in load_file(out).values() if t.is_floating_point())
    case = "gmflow sample, auto against fp32"
    apart = (tensors["auto"] - tensors["fp32"]).abs().mean().item()
    check(apart < 0.02, case, "a mean difference below 0.02", f"{apart:.3g}")
    yield case, {"mean difference": apart}
    place = evaluation_runs.write_place(folder_in(run, "evaluation"))
    results = evaluation_runs.run(place, run.folder / "evaluated", "--device", "auto")
    row = results["results"][0]
    numbers = {name: value for name, value in row.items() if isinstance(value, float)}
    check_finite(torch.tensor(list(numbers.values())), "figures of training.evaluate")
    yield "training.evaluate, a tiny model", numbers


def folder_in(run: Run, name: str) -> Path:
    """Create a folder for files."""
    path = run.folder / name
    path.mkdir()
    return path
