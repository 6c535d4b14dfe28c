"""Hand the mixture that a network predicts to the sampler that asked for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...gmflow_core import DXVelocity, GaussianMixture, predict_x0
from ...gmflow_core.flow.policy import Policy
from .options import RECORDER

PARTIAL = (
    "area",
    "mask",
    "timestep_start",
    "timestep_end",
)  # what limits a conditioning to a part of the latent or the steps
NO_MIXTURE = (
    "GM samplers and guidance need a model that predicts a Gaussian mixture at every step, and this one did not; load one with "
    "'Load GM Model', or put 'GM Adapter' on a base model (and remove nodes that skip network calls, such as LazyCache), or "
    "use a stock sampler"
)


class MixtureRecorder:
    """Collects the predictions of velocities that one call of a guider makes, by the conditioning they belong to."""

    def __init__(self):
        self.predictions: dict[object, GaussianMixture | DXVelocity] = {}
        self.guided: GaussianMixture | None = (
            None  # of x_0; what probabilistic guidance made of them, if it did
        )
        self.asked = False  # whether the guider left cfg to probabilistic guidance

    def record(self, prediction: GaussianMixture | DXVelocity, transformer_options: dict) -> None:
        """Split a network's output, whose batch (log_std's too) holds an equal chunk for each conditioning, by cond uuid. The
        first of each counts: nodes that call the network again, to compare, do so after the call itself."""
        uuids = transformer_options["uuids"]
        for uuid, chunk in zip(uuids, prediction.chunk(len(uuids)), strict=True):
            self.predictions.setdefault(uuid, chunk)

    def x0_policy(self, conds: list[dict] | None, x: Tensor, sigma: Tensor) -> Policy | None:
        """The policy in x_0 for a guider's positive conditioning, at x in a solver's shape; None where there is no single
        prediction for the whole latent, for which `why_not_single` has the reason.

        Raises:
            ValueError: the model predicts no mixture.
        """
        absent = any(
            cond.get(key) is not None
            for cond in conds or []
            for key in ("timestep_start", "timestep_end")
        )
        if not self.predictions and not absent:
            raise ValueError(NO_MIXTURE)
        if self.why_not_single(conds, x):
            return None
        if conds[0]["uuid"] not in self.predictions:
            raise ValueError(NO_MIXTURE)
        return predict_x0(self.predictions[conds[0]["uuid"]].to(x.device), x, sigma)

    def why_not_single(self, conds: list[dict] | None, x: Tensor) -> str:
        """What was predicted, or asked for, that is more or less than one thing for the whole latent and all steps; "" if
        nothing."""
        partial = [key for cond in conds or [] for key in PARTIAL if cond.get(key) is not None]
        if len(conds or []) != 1:
            return f"{len(conds or [])} positive conditionings"
        if partial:
            return f"a positive conditioning with {', '.join(partial)}"
        prediction = self.predictions.get(conds[0]["uuid"])
        if prediction is not None and not prediction.fits(x):
            return "predictions for parts of the latent (context windows, tiles)"
        return ""


_waiting = (
    threading.local()
)  # .predictions: a list while `add_recording`'s wrapper waits in this thread


def is_awaited() -> bool:
    """Whether somebody waits for the whole prediction of the network that runs."""
    return getattr(_waiting, "predictions", None) is not None


def offer(prediction: object) -> None:
    """Hand a prediction to whoever waits for it. Thread-local, as compiled networks are not traced anew for other options."""
    if is_awaited():
        _waiting.predictions.append(prediction)


def add_recording(
    model: comfy.model_patcher.ModelPatcher,
    finish: Callable[[Any, torch.Size], GaussianMixture | DXVelocity] = lambda prediction, shape: (
        prediction
    ),
) -> None:
    """Let recorders get what the model's network offers.

    Args:
        finish: makes of it, and of the latents' shape, a prediction in the solver's shape.
    """

    def apply_model_recorded(
        executor,
        x,
        t,
        c_concat=None,
        c_crossattn=None,
        control=None,
        transformer_options=None,
        **kwargs,
    ) -> Tensor:
        """A wrapper for ComfyUI's APPLY_MODEL."""
        options = transformer_options or {}
        recorder = options.get(RECORDER)
        _waiting.predictions = predictions = None if recorder is None else []
        try:
            result = executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
        finally:
            _waiting.predictions = None
        if predictions:
            recorder.record(finish(predictions[0], x.shape), options)
        return result

    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, RECORDER, apply_model_recorded)


def recording(model_options: dict | None) -> tuple[dict, MixtureRecorder]:
    """Model options with a recorder in them, and that: the one that is there already, or a new one."""
    options = (model_options or {}).get("transformer_options", {})
    recorder = options.get(RECORDER) or MixtureRecorder()
    return {
        **(model_options or {}),
        "transformer_options": {**options, RECORDER: recorder},
    }, recorder
