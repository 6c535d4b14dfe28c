"""Put the head of a GM adapter in the place of a base model's last layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_patcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

from ...gmflow_core.flow.policy import PolicyVelocity
from ...gmflow_core.gaussians.mixture import GaussianMixture
from ...gmflow_core.models.adapter_heads import Head, sigma_features
from .adapter_checks import check_settings
from .adapter_info import ADAPTER, Adapter, refuse_to_save
from .bases import Base
from .guard import guarded
from .recording import RECORDER, Call, add_recording, offer, sigma_of_call
from .time_shift import ShiftedFlow
from .unloading import keep_loadable


class HeadForward:
    """Forward of a base model's last layer, computed by a head.

    It returns the mean velocity, and offers the whole prediction to the recorder. The layer itself
    stays in place: ComfyUI's memory managers, LoRA loaders and savers find weights by their place
    in the model, which all its clones share. The head's weights are not among them; they are few
    enough to be sent to the GPU in each call.
    """

    def __init__(self, head: Head):
        self.head = head

    def __call__(
        self, tokens: Tensor, embedding: Tensor | None = None, modulation_dims: object = None
    ) -> Tensor:
        """Return mean velocity tokens (B, N, C p^2), in float32.

        Args:
            tokens: (B, N, D), those of reference pictures behind the image's.
            embedding: (B, D), or (B, M, D) if the tokens of reference pictures have an embedding
                of their own; the first is the image's. The base model drops the other tokens. The
                last linear layer alone gets none: its head is told sigma.
        """
        if embedding is None:
            sigma = sigma_of_call()
            if sigma is None:  # nothing but the mean is wanted, which does not depend on it
                sigma = tokens.new_zeros(1)
            embedding = sigma_features(sigma).to(tokens)
        prediction = self.head(tokens, embedding if embedding.ndim == 2 else embedding[:, 0])
        offer(prediction)
        return self.head.layout.to_tokens(prediction.mean())


def refusing_to_save(name: str) -> Callable:
    """Return a replacement of BaseModel.state_dict_for_saving, which ModelSave and others call."""

    def state_dict_for_saving(*args, **kwargs):
        refuse_to_save(name)

    return guarded(state_dict_for_saving)


def pass_on(tokens: Tensor) -> Tensor:
    """Return the tokens: the forward of a layer that is skipped."""
    return tokens


def finishing(head: Head, base: Base, network: nn.Module) -> Callable[[Any, Call], PolicyVelocity]:
    """Return a function that converts what a head has offered to the solver's shape."""

    def finish(prediction: Any, call: Call) -> PolicyVelocity:
        size, tokens = base.layout.image_size(call.shape), tokens_of(prediction)
        own = base.layout.count_tokens(size)
        return head.to_image(prediction, size, base.first_token(tokens, own, call.text, network))

    return finish


def tokens_of(prediction: Any) -> int:
    """Return the number of tokens N of what a head has offered."""
    means = prediction.means if isinstance(prediction, GaussianMixture) else prediction.velocities
    return means.shape[-2]


def record_head(
    model: comfy.model_patcher.ModelPatcher, finish: Callable[[Any, Call], PolicyVelocity]
) -> None:
    """Let recorders get what a head on a MODEL offers.

    Guidance that was put on the model before has hidden recorders from it, as it offered nothing.
    """
    model.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, RECORDER)
    add_recording(model, finish)


def with_head(
    model: comfy.model_patcher.ModelPatcher, head: Head, adapter: Adapter, sampling: ShiftedFlow
) -> comfy.model_patcher.ModelPatcher:
    """Return a clone of `model` that computes `head` instead of its base's last layers."""
    model, layers = model.clone(), adapter.base.layers
    for name in layers:
        forward = HeadForward(head) if name == layers[0] else pass_on
        model.add_object_patch(f"diffusion_model.{name}.forward", forward)
    record_head(model, finishing(head, adapter.base, model.model.diffusion_model))
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, RECORDER, check_settings)
    model.model_options["transformer_options"][ADAPTER] = adapter
    model.add_object_patch("model_sampling", sampling)
    model.add_object_patch("state_dict_for_saving", refusing_to_save(adapter.name))
    keep_loadable(model)
    return model
