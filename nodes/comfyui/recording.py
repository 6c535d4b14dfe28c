"""Hand the mixture that a network predicts to the sampler that asked for it.

A model that predicts mixtures is an ordinary MODEL, and returns a mean velocity. A sampler that
wants the whole mixture puts a `MixtureRecorder` in the transformer options of its call (ComfyUI
copies the options, but passes a plain object on by reference). A wrapper around the model finds the
recorder, collects what the network offers, and records it. Nothing is kept between two calls.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.model_patcher
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...gmflow_core.flow.blended import Followed
from ...gmflow_core.flow.policy import PolicyVelocity
from .adapter_info import ADAPTER
from .guard import guarded
from .sampling_run import watched

RECORDER = "gmflow_mixture_recorder"  # key in transformer_options, and of our wrappers
OURS = (RECORDER, ADAPTER)  # our keys in transformer_options


@dataclass(frozen=True)
class Call:
    """One call of a network, in which a recorder waits.

    Args:
        shape: of the latents, (B, C, *S).
        sigma: (B,).
        text: tokens of the conditioning; 0 without one.
    """

    shape: torch.Size
    sigma: Tensor
    text: int = 0


class MixtureRecorder:
    """Velocities predicted in one call of a guider, by the conditioning they belong to."""

    def __init__(self):
        self.predictions: dict[object, PolicyVelocity] = {}
        self.sigmas: dict[object, Tensor] = {}  # (B,) that the network was given
        self.guided: Followed | None = None  # of x_0, set by probabilistic guidance
        self.asked = False  # whether the guider left cfg to probabilistic guidance

    def record(
        self,
        prediction: PolicyVelocity,
        sigma: Tensor,
        transformer_options: dict,
    ) -> None:
        """Split a network's output by conditioning, and keep the first of each.

        The batch (that of log_std too) holds an equal chunk for each conditioning. The first
        counts, as nodes that call the network again, to compare, do so after the guider's call.

        Args:
            sigma: (B,), as the network was given it.
        """
        uuids = transformer_options["uuids"]
        chunks = zip(prediction.chunk(len(uuids)), sigma.chunk(len(uuids)), strict=True)
        for uuid, (chunk, sigma_chunk) in zip(uuids, chunks, strict=True):
            if uuid not in self.predictions:
                self.predictions[uuid], self.sigmas[uuid] = chunk, sigma_chunk


# Thread-local rather than an argument, as networks compiled by torch.compile are not traced again
# when transformer options change. `predictions` is a list while a recorder waits in this thread,
# and `call` what it waits in.
_waiting = threading.local()


def is_awaited() -> bool:
    """Return whether a recorder waits for the whole prediction of the network that runs."""
    return getattr(_waiting, "predictions", None) is not None


def offer(prediction: object) -> None:
    """Hand a prediction to the recorder that waits in this thread, if one does."""
    if is_awaited():
        _waiting.predictions.append(prediction)


def sigma_of_call() -> Tensor | None:
    """Return sigma (B,) of the call in which a recorder waits in this thread; None if none does."""
    return _waiting.call.sigma if is_awaited() else None


def unchanged(prediction: Any, call: Call) -> PolicyVelocity:
    """Return a prediction that is in the solver's shape already."""
    return prediction


def add_recording(
    model: comfy.model_patcher.ModelPatcher,
    finish: Callable[[Any, Call], PolicyVelocity] = unchanged,
) -> None:
    """Let recorders get what the model's network offers.

    Args:
        finish: converts a prediction to the solver's shape.
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
        """Run the model and record its prediction; a wrapper for ComfyUI's APPLY_MODEL."""
        options = transformer_options or {}
        recorder = options.get(RECORDER)
        inner = _without_ours(options)
        _waiting.predictions = predictions = None if recorder is None else []
        text = c_crossattn.shape[1] if getattr(c_crossattn, "ndim", 0) > 1 else 0
        _waiting.call = call = Call(x.shape, t, text)
        try:
            result = executor(x, t, c_concat, c_crossattn, control, inner, **kwargs)
        finally:
            _waiting.predictions = None
        if predictions:
            recorder.record(finish(predictions[0], call), t, options)
        return result

    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, RECORDER, guarded(apply_model_recorded))
    model.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, RECORDER, watched)


def hide_our_keys(model: comfy.model_patcher.ModelPatcher) -> None:
    """Keep our keys in the transformer options from a network that offers no predictions."""

    def apply_model_plain(
        executor, x, t, c_concat=None, c_crossattn=None, control=None, options=None, **kwargs
    ) -> Tensor:
        """Run the model; a wrapper for ComfyUI's APPLY_MODEL."""
        inner = _without_ours(options or {})
        return executor(x, t, c_concat, c_crossattn, control, inner, **kwargs)

    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, RECORDER, apply_model_plain)


def _without_ours(transformer_options: dict) -> dict:
    """Return transformer options without our keys: TorchCompileModel expects the same in all."""
    return {key: value for key, value in transformer_options.items() if key not in OURS}


def recording(model_options: dict | None) -> tuple[dict, MixtureRecorder]:
    """Return model options that hold a recorder, and the recorder: the present one or a new one."""
    options = (model_options or {}).get("transformer_options", {})
    recorder = options.get(RECORDER) or MixtureRecorder()
    options = {**options, RECORDER: recorder}
    return {**(model_options or {}), "transformer_options": options}, recorder
