"""Call other implementations of the same formulas, from their own checkouts; nothing is copied.

    PIFLOW_PATH     a checkout of Lakonik/ComfyUI-piFlow, else ~/comfy/ComfyUI-piFlow
    GMFLOW_PATH     a checkout of Lakonik/GMFlow
    LAKONLAB_PATH   a checkout of Lakonik/LakonLab

The packages that the last two need (mmcv, mmgen, ...) are seldom installed, so only the needed
definitions are run, straight from their files. Every function of a row returns, by the peer's
name, a function to call or the reason why it is not run.
"""

from __future__ import annotations

import ast
import importlib.util
import itertools
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import torch
from torch import Tensor

from gmflow_core import GaussianMixture

PLACES = {
    "ComfyUI-piFlow": ("PIFLOW_PATH", "~/comfy/ComfyUI-piFlow"),
    "GMFlow": ("GMFLOW_PATH", None),
    "LakonLab": ("LAKONLAB_PATH", None),
}
Forms = dict[str, Callable[[], Tensor] | str]
JIT = ("probabilistic_guidance_jit", "denoising_gm_convert_to_mean_jit")


def forms_of(makers: dict[str, Callable[[Path], Callable[[], Tensor]]]) -> Forms:
    """Return the forms that the makers build from checkouts, or the reasons why there are none."""
    found: Forms = {}
    for name, make in makers.items():
        variable, usual = PLACES[name]
        given = os.environ.get(variable) or usual
        if given is None or not Path(given).expanduser().is_dir():
            found[name] = f"not run: no checkout, set {variable}"
            continue
        try:
            found[name] = make(Path(given).expanduser().absolute())
        except Exception as error:  # another project's code may raise anything
            found[name] = f"not run: {type(error).__name__}: {error}"
    return found


def definitions(
    path: Path, names: tuple[str, ...], decorated: bool = True, **known: Any
) -> SimpleNamespace:
    """Run only the named functions and classes of a file, with `known` as the names they use.

    Raises:
        ImportError: the file does not define them all.
    """
    nodes = [
        node for node in ast.parse(path.read_text()).body if getattr(node, "name", None) in names
    ]
    missing = set(names) - {node.name for node in nodes}
    if missing:
        raise ImportError(f"{path} does not define {', '.join(sorted(missing))}")
    if not decorated:
        for node in nodes:
            node.decorator_list = []
    space = {
        "__name__": path.stem,
        "torch": torch,
        "math": math,
        "Optional": Optional,
        "Dict": dict,
        **known,
    }
    exec(compile(ast.Module(nodes, []), str(path), "exec"), space)  # noqa: S102
    return SimpleNamespace(**{name: space[name] for name in names})


def module(path: Path, name: str) -> Any:
    """Import a file, or a package by its __init__.py, as the module `name`."""
    if name not in sys.modules:
        place = importlib.util.spec_from_file_location(
            name, path, submodule_search_locations=[str(path.parent)]
        )
        sys.modules[name] = found = importlib.util.module_from_spec(place)
        try:
            place.loader.exec_module(found)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def gmflow_parts(root: Path) -> SimpleNamespace:
    """Load GMFlow's functions of mixtures, and its mixin with the time scaled to [0, 1]."""
    ops = module(root / "lib/ops/gmflow_ops/gmflow_ops.py", "gmflow_ops_of_gmflow")
    file = root / "lib/models/diffusions/gmflow.py"
    jit = vars(definitions(file, JIT))
    mixin = definitions(file, ("GMFlowMixin",), **vars(ops), **jit).GMFlowMixin
    return SimpleNamespace(ops=ops, flow=type("Flow", (mixin,), {"num_timesteps": 1})(), **jit)


def as_dict(mixture: GaussianMixture) -> dict[str, Tensor]:
    """Return a mixture in the peers' form."""
    return {"means": mixture.means, "logstds": mixture.log_std, "logweights": mixture.log_weights}


def image(tensor: Tensor) -> Tensor:
    """Reshape (B, ..., C) to (B, ..., C, 1, 1): the peers' points are images of one pixel."""
    return tensor[..., None, None]


def pointwise(mixture: GaussianMixture, *tensors: Tensor) -> tuple:
    """Return the arguments, points as images of one pixel."""
    if tensors[0].ndim == 4:
        return mixture, *tensors
    fields = (mixture.means, mixture.log_weights, mixture.log_std)
    return GaussianMixture(*map(image, fields)), *map(image, tensors)


def times(sigma: float, sigma_end: float, substeps: int) -> list[float]:
    """Return substeps + 1 equally spaced sigmas."""
    return [sigma + (sigma_end - sigma) * i / substeps for i in range(substeps)] + [sigma_end]


def rollouts(
    x0: GaussianMixture, x: Tensor, sigma: float, sigma_end: float, substeps: int
) -> Forms:
    """Return the peers' substeps between two network calls."""
    shape = x.shape
    x0, x = pointwise(x0, x)
    sigmas = [x.new_full((len(x), 1, 1, 1), value) for value in times(sigma, sigma_end, substeps)]
    velocity = {"means": (x.unsqueeze(1) - x0.means) / sigma, "logweights": x0.log_weights}
    velocity["logstds"] = x0.log_std - math.log(sigma)

    def policy(cls: type) -> Callable[[], Tensor]:
        def run() -> Tensor:
            policy, now = cls(velocity, x, sigmas[0].flatten()), x
            for here, there in itertools.pairwise(sigmas):
                now = now + policy.pi(now, here) * (there - here)
            return now.reshape(shape)

        return run

    def piflow(root: Path) -> Callable[[], Tensor]:
        return policy(
            module(root / "modules/piflow_policies/__init__.py", "policies_of_piflow").GMFlowPolicy
        )

    def lakonlab(root: Path) -> Callable[[], Tensor]:
        folder = root / "lakonlab/models/diffusions"
        known = vars(definitions(folder / "gmflow.py", ("gmflow_posterior_mean_jit",)))
        known |= vars(
            definitions(root / "lakonlab/ops/gmflow_ops/gmflow_ops.py", ("gm_temperature",))
        )
        base = module(folder / "piflow_policies/base.py", "base_of_lakonlab")
        known["BasePolicy"] = base.BasePolicy
        return policy(
            definitions(
                folder / "piflow_policies/gmflow.py", ("GMFlowPolicy",), **known
            ).GMFlowPolicy
        )

    def gmflow(root: Path) -> Callable[[], Tensor]:
        parts = gmflow_parts(root)
        return lambda: gmflow_substeps(parts, as_dict(x0), x, sigmas).reshape(shape)

    return forms_of({"ComfyUI-piFlow": piflow, "GMFlow": gmflow, "LakonLab": lakonlab})


def gmflow_substeps(
    parts: SimpleNamespace, gm: dict[str, Tensor], x: Tensor, sigmas: list[Tensor]
) -> Tensor:
    """Run the substeps of GMFlow's sampler, with the Euler step of its scheduler."""
    now = x
    for substep, (here, there) in enumerate(itertools.pairwise(sigmas)):
        if substep == 0:
            mean = parts.ops.gm_to_mean(gm)
        else:
            mean = parts.flow.denoising_gm_convert_to_mean(
                gm, now, x, here, sigmas[0], prediction_type="x0"
            )
        now = now + (now - mean) / here * (there - here)
    return now


def guided_gm_odes(
    velocities: list[GaussianMixture], x: Tensor, sigmas: list[float], substeps: int, weight: float
) -> Forms:
    """Return the peers' GM-ODE 2 with probabilistic guidance, without the network's time.

    `velocities` are the network's outputs for [cond, uncond].
    """

    def gmflow(root: Path) -> Callable[[], Tensor]:
        parts = gmflow_parts(root)
        ops, flow = parts.ops, parts.flow

        def run() -> Tensor:
            now, batch = x, len(x)
            flow.init_gm_cache()
            for velocity, sigma, sigma_next in zip(
                velocities, sigmas[:-1], sigmas[1:], strict=True
            ):
                time = now.new_tensor(sigma)
                gm = flow.u_to_x_0(as_dict(velocity), torch.cat([now, now]), time)
                cond = {key: value[:batch] for key, value in gm.items()}
                uncond = {key: value[batch:] for key, value in gm.items()}
                gaussian = ops.gm_to_iso_gaussian(cond)[0]
                gaussian["var"] = gaussian["var"].mean((-1, -2), keepdim=True)
                guided, bias, var = parts.probabilistic_guidance_jit(
                    gaussian["mean"], gaussian["var"], ops.gm_to_mean(uncond), weight
                )
                quotient = ops.iso_gaussian_mul_iso_gaussian(guided, gaussian, 1, -1)
                gm = ops.gm_mul_iso_gaussian(cond, quotient, 1, 1)[0]
                size = time - sigma_next
                gm, _ = flow.gm_2nd_order(
                    gm, guided, now, time, size, weight, cond, gaussian, var, bias
                )
                now = gmflow_substeps(
                    parts,
                    gm,
                    now,
                    [now.new_tensor(value) for value in times(sigma, sigma_next, substeps)],
                )
            return now

        return run

    return forms_of({"GMFlow": gmflow})


def transports(mixture: GaussianMixture, z: Tensor) -> Forms:
    """Return the peers' maps from standard normal samples to samples of the mixture."""

    def gmflow(root: Path) -> Callable[[], Tensor]:
        ops = module(root / "lib/ops/gmflow_ops/gmflow_ops.py", "gmflow_ops_of_gmflow")
        if z.device.type != "cuda":
            raise RuntimeError("its inverse CDF is a CUDA extension")
        ops.get_backend()
        return lambda: ops.gaussian_samples_to_gm_samples(as_dict(mixture), z.unsqueeze(1)).squeeze(
            1
        )

    return forms_of({"GMFlow": gmflow})


def losses(
    velocity: GaussianMixture, x_low: Tensor, x_high: Tensor, low: Tensor, high: Tensor
) -> Forms:
    """Return the peers' transition NLL (B, *S)."""
    shape = (len(x_low), *x_low.shape[2:])
    velocity, x_low, x_high = pointwise(velocity, x_low, x_high)

    def gmflow(root: Path) -> Callable[[], Tensor]:
        flow = gmflow_parts(root).flow
        file = root / "lib/models/losses/diffusion_loss.py"
        nll = definitions(
            file, ("gaussian_mixture_nll_loss",), decorated=False
        ).gaussian_mixture_nll_loss

        def run() -> Tensor:
            gm = flow.reverse_transition(as_dict(velocity), x_high, low, high)
            return nll(gm["means"], x_low, gm["logstds"], gm["logweights"]).reshape(shape)

        return run

    return forms_of({"GMFlow": gmflow})
