"""Rows of the table for the mathematics between two network calls, and for the losses."""

from __future__ import annotations

import logging
import os
import statistics
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch
from torch import Tensor

from gmflow_core import GaussianMixture, flow_sigmas, sample_gm_ode, transition_nll
from gmflow_core.fast.choice import METHOD_VARIABLE, METHODS, axis_map
from gmflow_core.gaussians.spectral import sample_with_spectrum
from gmflow_core.sampling.denoisers import class_denoiser
from gmflow_core.sampling.guidance import Guidance
from gmflow_core.sampling.rollout import rollout
from tests.helpers import F64, cast, normal, random_mixture

from . import naive, peers
from .measure import Bench, floor, quartiles, ratios, take_turns

FLOAT = 4  # bytes of a float32
START, END = 0.9, 0.4  # sigmas of a rollout
WEIGHT = 0.3  # guidance scale


def size_of(*tensors: Tensor) -> int:
    """Return the bytes that the tensors hold."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def bytes_of(mixture: GaussianMixture) -> int:
    """Return the bytes of a mixture's three fields."""
    return size_of(mixture.means, mixture.log_weights, mixture.log_std)


def describe(mixture: GaussianMixture, more: str = "") -> str:
    """Return a mixture's sizes in words, followed by `more`."""
    batch, components, channels, *space = mixture.means.shape
    place = f"{' x '.join(map(str, space))}, batch {batch}" if space else f"{batch} points"
    return f"K = {components}, C = {channels}, {place}{more}"


def inputs(
    bench: Bench, batch: int, components: int, channels: int, *space: int
) -> tuple[GaussianMixture, Tensor]:
    """Return a random mixture, and standard normal noise in the shape of its samples."""
    mixture = random_mixture(0, batch, components, channels, space, spread=1.0)
    return mixture.to(bench.device), normal(batch, channels, *space).to(bench.device)


# Rollout


def rollout_work(mixture: GaussianMixture, substeps: int) -> tuple[float, float]:
    """Return the least bytes moved and the least operations of a rollout.

    Bytes: one pass over the mixture, with x read once and written once. Operations: every substep
    computes weights and mean from K x C numbers, or it works through the K x K inner products of
    the means; the cheaper of the two counts.
    """
    batch, components, channels, *space = mixture.means.shape
    direct = 4 * components * channels * substeps
    gram = 2 * components**2 * (channels + substeps) + 4 * components * channels
    pixels = batch * torch.Size(space).numel()
    return bytes_of(mixture) + 2 * FLOAT * channels * pixels, min(direct, gram) * pixels


def our_rollouts(
    bench: Bench, mixture: GaussianMixture, x: Tensor, substeps: int, compiled: bool
) -> dict[str, Callable | str]:
    """Return the automatic choice as "ours", and every method of METHODS, by name.

    A method that does not run on this device is replaced by a text with the reason.
    """
    forms: dict[str, Callable | str] = {"ours": lambda: rollout(mixture, x, START, END, substeps)}
    for method in METHODS:
        name = f"ours, {method}"
        forms[name] = lambda method=method: rollout(mixture, x, START, END, substeps, method=method)
        if method == "triton" and bench.device != "cuda":
            forms[name] = "not run: no CUDA device"
        elif method == "compiled" and not compiled:
            forms[name] = "not run: not asked for"
        else:
            bench.problems[method] = bench.problems.get(method) or said_by(forms[name])
            if bench.problems[method]:  # rollout fell back to another method
                forms[name] = f"not run: {bench.problems[method]}"
    return forms


def said_by(function: Callable) -> str:
    """Call `function` and return the warnings it logs, joined by semicolons."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    try:
        with torch.inference_mode():
            function()
    finally:
        logging.getLogger().removeHandler(handler)
    return "; ".join(messages)


def compare_rollouts(bench: Bench, row: str, shape: tuple[int, ...], substeps: int = 32) -> dict:
    """Measure one rollout of a mixture of `shape` (B, K, C, *S) in every form."""
    mixture, x = inputs(bench, *shape)
    forms = {
        **our_rollouts(bench, mixture, x, substeps, bench.compiled),
        "naive": lambda: naive.rollout(mixture, x, START, END, substeps),
        **peers.rollouts(mixture, x, START, END, substeps),
    }
    return bench.compare(
        row,
        describe(mixture, f", {substeps} substeps"),
        forms,
        work=rollout_work(mixture, substeps),
        unit=("means", size_of(mixture.means)),
        exact=lambda: naive.rollout(cast(mixture, F64), x.to(F64), START, END, substeps),
    )


def rollout_rows(bench: Bench) -> Iterator[dict]:
    """Measure rollouts of latents of FLUX's size, of small latents, and of points."""
    yield compare_rollouts(bench, "rollout", bench.size((1, 8, 16, 96, 170), (1, 8, 16, 12, 10)))
    yield compare_rollouts(bench, "rollout", bench.size((8, 8, 4, 32, 32), (2, 8, 4, 8, 8)))
    yield compare_rollouts(bench, "rollout", bench.size((16384, 32, 2), (256, 32, 2)))


def substep_rows(bench: Bench) -> Iterator[dict]:
    """Measure the seconds that each further substep adds to a rollout.

    The figure is the slope of a line through the times of 2, 8, 32 and 128 substeps. The floor is
    one pass over the mixture.
    """
    mixture, x = inputs(bench, *bench.size((1, 8, 16, 96, 170), (1, 8, 16, 12, 10)))
    counts = (2, 8, 32, 128)
    forms: dict[str, Callable[[int], Tensor]] = {
        "ours": lambda count: rollout(mixture, x, START, END, count),
        "naive": lambda count: naive.rollout(mixture, x, START, END, count),
    }
    if callable(our_rollouts(bench, mixture, x, counts[0], bench.compiled)["ours, compiled"]):
        forms["ours, compiled"] = lambda count: rollout(
            mixture, x, START, END, count, method="compiled"
        )
    calls = {
        (name, count): lambda form=form, count=count: form(count)
        for name, form in forms.items()
        for count in counts
    }
    with torch.inference_mode():
        times = take_turns(
            calls, bench.device, budget=0.2 if bench.quick else 8.0, least=2 if bench.quick else 3
        )
    slopes = {
        name: [
            statistics.linear_regression(counts, repeat).slope
            for repeat in zip(*(times[name, count] for count in counts), strict=True)
        ]
        for name in forms
    }
    line = {
        "row": "substep",
        "case": describe(mixture, ", each of 2 to 128 substeps"),
        "device": bench.device,
        "unit": "",
    }
    line |= {"reference": "naive", "floor": floor(bench.rates, bytes_of(mixture), 0)}
    line["forms"] = {
        name: {
            "seconds": found,
            "median": quartiles(found)[1],
            "ratio": ratios(slopes["naive"], found),
            "over_ours": ratios(found, slopes["ours"]),
        }
        for name, found in slopes.items()
    }
    yield line


def growth_rows(bench: Bench) -> Iterator[dict]:
    """Measure curves of a rollout's time against K, pixels, substeps and batch."""
    components, channels, side, substeps = bench.size((8, 16, 64, 32), (4, 4, 8, 4))
    axes = {
        "components": [
            (1, k, channels, side, side, substeps)
            for k in bench.size((1, 2, 4, 8, 16, 32, 64), (2, 4))
        ],
        "pixels": [
            (1, components, channels, n, n, substeps)
            for n in bench.size((8, 16, 32, 64, 128, 256), (4, 8))
        ],
        "substeps": [
            (1, components, channels, side, side, n)
            for n in bench.size((1, 2, 4, 8, 16, 32, 64, 128), (1, 4))
        ],
        "batch": [
            (n, components, channels, side // 2, side // 2, substeps)
            for n in bench.size((1, 2, 4, 8, 16), (1, 2))
        ],
    }
    for axis, sizes in axes.items():
        curve = {"row": "growth", "axis": axis, "device": bench.device, "points": []}
        for *shape, count in sizes:
            mixture, x = inputs(bench, *shape)
            forms = our_rollouts(bench, mixture, x, count, compiled=False)
            forms["naive"] = lambda mixture=mixture, x=x, count=count: naive.rollout(
                mixture, x, START, END, count
            )
            ready = {name: form for name, form in forms.items() if callable(form)}
            with torch.inference_mode():
                times = take_turns(ready, bench.device, budget=0.0, least=2 if bench.quick else 3)
            value = {
                "components": shape[1],
                "pixels": shape[3] * shape[4],
                "substeps": count,
                "batch": shape[0],
            }[axis]
            least = floor(bench.rates, *rollout_work(mixture, count))["seconds"]
            curve["points"].append({"value": value, "seconds": times, "floor": least})
        curve["base"] = {
            "components": components,
            "channels": channels,
            "pixels": side**2,
            "substeps": substeps,
            "batch": 1,
        }
        if axis == "batch":
            curve["base"]["pixels"] = (side // 2) ** 2
        yield curve


# Solver steps


def compiled(function: Callable) -> Callable:
    """Return a form of `function` that runs with the environment asking for "compiled"."""

    def run() -> Tensor:
        before = os.environ.get(METHOD_VARIABLE)
        os.environ[METHOD_VARIABLE] = "compiled"
        try:
            return function()
        finally:
            del os.environ[METHOD_VARIABLE]
            if before is not None:
                os.environ[METHOD_VARIABLE] = before

    return run


def with_compiled(bench: Bench, function: Callable) -> dict[str, Callable | str]:
    """Return `function` as "ours", and its compiled form or the reason why there is none."""
    form = compiled(function)
    said = "not asked for"
    if bench.compiled:
        said = said_by(lambda: [form() for _ in range(3)])  # compilation starts at a later call
    return {"ours": function, "ours, compiled": f"not run: {said}" if said else form}


def transport_rows(bench: Bench) -> Iterator[dict]:
    """Measure GM-SDE's draw: principal axes and inverse Knothe-Rosenblatt map.

    One line without a spectrum, one with a spectrum.
    """
    mixture, z = inputs(bench, *bench.size((8, 8, 4, 32, 32), (2, 4, 3, 6, 8)))
    log_power = 0.3 * normal(*z.shape, seed=2).to(z)
    axes = mixture.principal_axes()
    batch, components, channels, *space = mixture.means.shape
    pixels = batch * torch.Size(space).numel()
    work = (bytes_of(mixture) + 2 * size_of(z), 2 * channels**2 * (components + 1) * pixels)
    shared = {"unit": ("means", size_of(mixture.means))}
    exact, exact_axes = cast(mixture, F64), axes.to(F64)
    straight = exact_axes.flatten(1, -3).squeeze(1)  # the naive form's shape, (B, C, C)

    def ours(axes: Tensor | None = None) -> Tensor:
        return mixture.from_normal(z, axes, axis_map(z.device))

    def ours_with_spectrum(axes: Tensor | None = None) -> Tensor:
        return sample_with_spectrum(mixture, log_power, z, axes, axis_map(z.device))

    yield bench.compare(
        "transport",
        describe(mixture, ", from_normal"),
        {
            **with_compiled(bench, ours),
            "naive": lambda: naive.from_normal(mixture, z),
            **peers.transports(mixture, z),
        },
        work=work,
        exact=lambda: exact.from_normal(z.to(F64), exact_axes),
        results={  # all forms share one set of axes, because the signs of axes are arbitrary
            "ours": lambda: ours(axes),
            "ours, compiled": compiled(lambda: ours(axes)),
            "naive": lambda: naive.from_normal(mixture, z, straight.to(z)),
        },
        **shared,
    )
    yield bench.compare(
        "transport",
        describe(mixture, ", sample_with_spectrum"),
        {
            **with_compiled(bench, ours_with_spectrum),
            "naive": lambda: naive.sample_with_spectrum(mixture, log_power, z),
        },
        work=(work[0] + size_of(log_power), work[1]),
        exact=lambda: sample_with_spectrum(exact, log_power.to(F64), z.to(F64), exact_axes),
        results={
            "ours": lambda: ours_with_spectrum(axes),
            "ours, compiled": compiled(lambda: ours_with_spectrum(axes)),
            "naive": lambda: naive.sample_with_spectrum(mixture, log_power, z, straight.to(z)),
        },
        **shared,
    )


def guided_rows(bench: Bench) -> Iterator[dict]:
    """Measure four steps of GM-ODE 2 with probabilistic guidance and 4 substeps each.

    The network's outputs are made beforehand, so its time does not count. The first step has no
    second-order correction.
    """
    for shape in (
        bench.size((8, 8, 4, 32, 32), (2, 4, 3, 6, 8)),
        bench.size((1, 8, 16, 96, 170), (1, 4, 5, 6, 8)),
    ):
        yield compare_guided_steps(bench, *shape)


def compare_guided_steps(
    bench: Bench, batch: int, components: int, channels: int, *space: int
) -> dict:
    """Measure the guided steps at one size."""
    sigmas, substeps = flow_sigmas(4).tolist(), 4
    outputs = [
        random_mixture(seed, 2 * batch, components, channels, space, spread=1.0)
        for seed in range(4)
    ]
    outputs = [output.to(bench.device) for output in outputs]
    x = normal(batch, channels, *space).to(bench.device)

    def ours(outputs: list[GaussianMixture], x: Tensor) -> Tensor:
        replies = iter(outputs)

        def network(x: Tensor, sigma: Tensor, labels: Tensor) -> GaussianMixture:
            return next(replies)

        network.config = SimpleNamespace(num_classes=1)
        denoiser = class_denoiser(
            network, torch.zeros(batch, dtype=torch.int64, device=x.device), Guidance(WEIGHT)
        )
        return sample_gm_ode(denoiser, x, sigmas, order=2, substeps=substeps)

    least = [rollout_work(outputs[0], substeps)] * 4
    return bench.compare(
        "guided steps",
        describe(outputs[0].chunk(2)[0], ", 4 steps of 4 substeps"),
        {
            **with_compiled(bench, lambda: ours(outputs, x)),
            "naive": lambda: naive.guided_gm_ode(outputs, x, sigmas, substeps, WEIGHT),
            **peers.guided_gm_odes(outputs, x, sigmas, substeps, WEIGHT),
        },
        work=(
            sum(moved for moved, _ in least),
            sum(flops for _, flops in least) / 2,
        ),  # the substeps read only the guided half
        unit=("means", size_of(outputs[0].means) / 2),
        exact=lambda: naive.guided_gm_ode(
            [cast(output, F64) for output in outputs], x.to(F64), sigmas, substeps, WEIGHT
        ),
    )


# Losses


def gradients(loss: Tensor, velocity: GaussianMixture) -> Tensor:
    """Return the gradients of the mean loss in the mixture's three fields, flattened."""
    fields = (velocity.means, velocity.log_weights, velocity.log_std)
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss.mean(), fields)])


def loss_rows(bench: Bench) -> Iterator[dict]:
    """Measure the transition NLL: the forward pass, and the forward with the backward pass.

    Gradients are taken in the network's three outputs.
    """
    for shape in (
        bench.size((4096, 64, 2), (64, 8, 2)),
        bench.size((32, 8, 4, 32, 32), (2, 8, 4, 8, 8)),
    ):
        mixture, x_high = inputs(bench, *shape)
        x_low = 0.5 * (x_high + normal(*x_high.shape, seed=2).to(x_high))
        high = torch.linspace(0.05, 0.95, len(x_high), device=bench.device)
        yield compare_losses(bench, mixture, (x_low, x_high, 0.5 * high, high), backward=False)
        yield compare_losses(bench, mixture, (x_low, x_high, 0.5 * high, high), backward=True)


def compare_losses(
    bench: Bench, mixture: GaussianMixture, given: tuple[Tensor, ...], backward: bool
) -> dict:
    """Measure `transition_nll(mixture, *given)`, with gradients if `backward`."""

    def leaf(dtype: torch.dtype) -> GaussianMixture:
        fields = (mixture.means, mixture.log_weights, mixture.log_std)
        return GaussianMixture(
            *(field.to(dtype, copy=True).requires_grad_(backward) for field in fields)
        )

    velocity, exact, wide = leaf(torch.float32), leaf(F64), [tensor.to(F64) for tensor in given]
    forms: dict[str, Callable[[], Tensor] | str] = {
        "ours": lambda: transition_nll(velocity, *given),
        "naive": lambda: naive.transition_nll(velocity, *given),
        **peers.losses(velocity, *given),
    }
    if backward:
        forms = {
            name: (lambda form=form: gradients(form(), velocity)) if callable(form) else form
            for name, form in forms.items()
        }
    moved, flops = bytes_of(mixture) + size_of(*given), 3 * mixture.means.numel()
    return bench.compare(
        "loss",
        describe(mixture, ", forward and backward" if backward else ", forward"),
        forms,
        work=(moved + bytes_of(mixture), 3 * flops) if backward else (moved, flops),
        unit=("means", size_of(mixture.means)),
        exact=lambda: (
            gradients(naive.transition_nll(exact, *wide), exact)
            if backward
            else naive.transition_nll(exact, *wide)
        ),
        gradient=backward,
    )


ROWS = {
    "rollout": rollout_rows,
    "substep": substep_rows,
    "growth": growth_rows,
    "transport": transport_rows,
    "guided": guided_rows,
    "loss": loss_rows,
}
