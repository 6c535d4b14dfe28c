"""Autoguidance (Karras et al. 2024) as a ComfyUI guider."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import comfy.samplers
from torch import Tensor

from ...gmflow_core.sampling.guidance import within
from .probabilistic_cfg import has_probabilistic_guidance

GUIDE = "gmflow_guide"  # key of the additional models


class Inside(comfy.samplers.Sampler):
    """A sampler that only says when its guider is ready to be called, and keeps what is made of that."""

    def __init__(self, run: Callable[[Callable[[Tensor, Tensor], Tensor]], Tensor]):
        self.run = run
        self.result: Tensor | None = None

    def sample(
        self,
        model_wrap,
        sigmas,
        extra_args,
        callback,
        noise,
        latent_image=None,
        denoise_mask=None,
        disable_pbar=False,
    ) -> Tensor:
        """The noise as it is, of no use to anybody."""
        self.result = self.run(lambda x, sigma: model_wrap(x, sigma, **extra_args))
        return noise


class AutoGuider(comfy.samplers.CFGGuider):
    """guide + scale * (main - guide), in x_0, as classifier-free guidance has it: what changes its prediction changes this too.

    The guide has a guider of its own, which is sampled with, the other one inside: so ComfyUI prepares and cleans up both
    models, with their conditionings, hooks and wrappers, in its own way. As the main model's additional model the guide is
    loaded with it. Only where both are clones of one model, with different weights (LoRA) or patches on them, can there be one
    at a time: they are loaded in turn, once a step.

    Args:
        interval: of sigmas, outside of which the guide is not called.

    Raises:
        ValueError: the models do not go together.
    """

    def __init__(
        self, model, guide, positive, guide_positive, scale: float, interval: tuple[float, float]
    ):
        check_models(model, guide)
        super().__init__(model.clone())
        self.inner_set_conds({"positive": positive})
        self.guide = comfy.samplers.CFGGuider(guide)
        self.guide.inner_set_conds({"positive": guide_positive})
        self.scale, self.interval = scale, interval
        self.call_guide: Callable[[Tensor, Tensor], Tensor] | None = None
        main, guide = self.model_patcher, self.guide.model_patcher
        self.in_turn = main.is_clone(guide) and not same_patches(main, guide)

    def sample(
        self,
        noise,
        latent_image,
        sampler,
        sigmas,
        denoise_mask=None,
        callback=None,
        disable_pbar=False,
        seed=None,
    ) -> Tensor:
        """As of any guider."""
        plain = functools.partial(
            super().sample,
            noise,
            latent_image,
            sampler,
            sigmas,
            denoise_mask,
            callback,
            disable_pbar,
            seed,
        )
        if self.scale == 1 or not any(
            within(self.interval, sigma) for sigma in sigmas[:-1].tolist()
        ):
            return plain()

        def with_guide(call_guide: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
            self.call_guide, guide = call_guide, self.guide.model_patcher
            self.model_patcher.set_additional_models(
                GUIDE, [] if self.model_patcher.is_clone(guide) else [guide]
            )
            try:
                return plain()
            finally:
                self.call_guide = None
                self.model_patcher.remove_additional_models(GUIDE)

        if self.in_turn:
            logging.info(
                "GMFlow: the guide is the same model with other weights or patches, so they are loaded in turn"
            )
        inside = Inside(with_guide)
        self.guide.sample(
            noise, latent_image, inside, sigmas, denoise_mask, disable_pbar=True, seed=seed
        )
        return inside.result

    def predict_noise(
        self,
        x: Tensor,
        timestep: Tensor,
        model_options: dict | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """The prediction of x_0, as ComfyUI calls it."""
        model_options = model_options or {}

        def main() -> Tensor:
            self.use(self.model_patcher, x)
            return comfy.samplers.calc_cond_batch(
                self.inner_model, [positive], x, timestep, model_options
            )[0]

        def guide() -> Tensor:
            self.use(self.guide.model_patcher, x)
            return self.call_guide(x, timestep)

        positive = self.conds["positive"]
        if self.call_guide is None or not within(self.interval, timestep):
            self.use(self.model_patcher, x)
            return super().predict_noise(x, timestep, model_options, seed)

        def both(_: dict) -> list[Tensor]:
            """In place of ComfyUI's own two calls; what is patched to change predictions, before guidance or after, applies."""
            if (
                self.in_turn and self.inner_model.current_patcher is self.guide.model_patcher
            ):  # it is loaded: save a turn
                guided = guide()
                return [main(), guided]
            return [main(), guide()]

        options = {**model_options, "sampler_calc_cond_batch_function": both}
        guide_positive = self.guide.conds["positive"]
        return comfy.samplers.sampling_function(
            self.inner_model,
            x,
            timestep,
            guide_positive,
            positive,
            self.scale,
            model_options=options,
            seed=seed,
        )

    def use(self, patcher: comfy.model_patcher.ModelPatcher, x: Tensor) -> None:
        """Make sure that the model's weights and patches are this clone's."""
        if self.in_turn and patcher.model.current_patcher is not patcher:
            memory = patcher.memory_required([2 * len(x), *x.shape[1:]])
            comfy.model_management.load_models_gpu([patcher], memory_required=memory)
            patcher.model.current_patcher = patcher


def same_patches(a: comfy.model_patcher.ModelPatcher, b: comfy.model_patcher.ModelPatcher) -> bool:
    """Whether two clones of a model have the same weights and layers; options of theirs are no matter, as they are handed to
    each call."""
    if a.patches_uuid != b.patches_uuid or a.object_patches.keys() != b.object_patches.keys():
        return False
    return all(a.object_patches[key] is b.object_patches[key] for key in a.object_patches)


def check_models(
    model: comfy.model_patcher.ModelPatcher, guide: comfy.model_patcher.ModelPatcher
) -> None:
    """
    Raises:
        ValueError: the two predictions are of different things.
    """
    for patcher, name in ((model, "model"), (guide, "guide")):
        if has_probabilistic_guidance(patcher):
            raise ValueError(
                f"GM Probabilistic Guidance on the {name} would take the scale for its weight; connect the model in front of it"
            )
    ours, theirs = (patcher.get_model_object("latent_format") for patcher in (model, guide))
    shapes = [(latent.latent_channels, latent.latent_dimensions) for latent in (ours, theirs)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"the model's latents have {shapes[0][0]} channels and {shapes[0][1]} dimensions, the guide's {shapes[1][0]} and "
            f"{shapes[1][1]}; take a guide for the same latents: a smaller or less trained model of the same family"
        )
    ours, theirs = (type(patcher.get_model_object("model_sampling")) for patcher in (model, guide))
    if ours.noise_scaling is not theirs.noise_scaling:
        raise ValueError(
            f"noise is added in different ways for the model ({kind_of(ours)}) and the guide ({kind_of(theirs)}), so the same "
            "latent means something else to each; take a guide of the same kind, and no ModelSampling nodes that change it"
        )


def kind_of(sampling: type) -> str:
    """How noise is added, for a message."""
    return (
        "flow matching"
        if issubclass(sampling, comfy.model_sampling.CONST)
        else "diffusion with an unbounded sigma"
    )
