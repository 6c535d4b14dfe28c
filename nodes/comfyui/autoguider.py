"""Autoguidance (Karras et al. 2024, arXiv 2406.02507) as a ComfyUI guider."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import comfy.hooks
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...gmflow_core.sampling.guidance import within
from .finite import report_result
from .guard import guarded
from .latent_check import check_conditioning
from .plain_model import without_spread
from .probabilistic_cfg import CALC, asks_for_negative, has_probabilistic_guidance, name_of
from .recording import RECORDER
from .regions import covered
from .solver_choice import no_effect
from .time_shift import check_flow

GUIDE = "gmflow_guide"  # key of the additional models
AROUND = tuple(f"sampler_{name}_function" for name in ("pre_cfg", "cfg", "post_cfg"))  # ComfyUI's
Predict = Callable[[Tensor, Tensor], Tensor]  # (x, sigma) -> x_0


class InsideSampler(comfy.samplers.Sampler):
    """A sampler that calls a function as soon as its guider is ready, and keeps the result.

    Args:
        run: called with a function that returns the guider's prediction.
    """

    def __init__(self, run: Callable[[Predict], Tensor]):
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
        """Run the function; return the noise, as a sampler must return some tensor."""
        self.result = self.run(lambda x, sigma: model_wrap(x, sigma, **extra_args))
        return noise


class AutoGuider(comfy.samplers.CFGGuider):
    """A guider that predicts guide + scale * (main - guide) in x_0.

    It goes through ComfyUI's classifier-free guidance, so nodes that change that change this too.

    The guide has a guider of its own. Sampling starts with the guide's guider and runs the main
    one inside of it, so that ComfyUI prepares and cleans up both models, with their conditionings,
    hooks and wrappers, in its own way. The guide is an additional model of the main one, and is
    loaded with it. Only if both are clones of one model, with different weights (LoRA) or patches,
    can just one be loaded: then they are loaded in turn, in every step. The hooks of clones are
    put on the weights in turn in any case. Where no conditioning of the guide counts, nothing is
    guided.

    Args:
        interval: sigmas (low, high) outside of which the guide is not called.

    Raises:
        ValueError: the models do not go together.
    """

    def __init__(
        self, model, guide, positive, guide_positive, scale: float, interval: tuple[float, float]
    ):
        check_models(model, guide)
        super().__init__(model.clone())
        self.inner_set_conds({"positive": positive})
        self.guide = comfy.samplers.CFGGuider(without_spread(guide, model))
        self.guide.inner_set_conds({"positive": guide_positive})
        give_own_keyframes(self.guide.original_conds["positive"])
        for guider in (self, self.guide):
            check_conditioning(guider.model_patcher, guider.original_conds)
        self.scale, self.interval = scale, interval
        self.call_guide: Predict | None = None  # set while sampling with the guide
        main, guide = self.model_patcher, self.guide.model_patcher
        self.one_model = main.is_clone(guide)
        self.in_turn = self.one_model and not same_patches(main, guide)

    @guarded
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
        """Sample as any guider does, inside the guide's guider if the guide has any effect."""
        sample_main = functools.partial(
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
        steps = sigmas[:-1].tolist()
        if self.scale == 1 or not any(within(self.interval, sigma) for sigma in steps):
            result = sample_main()
            report_result(result, self)
            return result
        if self.in_turn:
            logging.info(
                "GMFlow: the guide is the same model with other weights or patches, so they are "
                "loaded in turn"
            )
        inside = InsideSampler(functools.partial(self._sample_with_guide, sample_main))
        self.guide.sample(
            noise, latent_image, inside, sigmas, denoise_mask, disable_pbar=True, seed=seed
        )
        report_result(inside.result, self)
        return inside.result

    def _sample_with_guide(self, sample_main: Callable[[], Tensor], call_guide: Predict) -> Tensor:
        """Sample with the main model while the guide's guider is ready to be called."""
        self.call_guide, guide = call_guide, self.guide.model_patcher
        additional = [] if self.one_model else [guide]
        self.model_patcher.set_additional_models(GUIDE, additional)
        try:
            return sample_main()
        finally:
            self.call_guide = None
            self.model_patcher.remove_additional_models(GUIDE)

    @guarded
    def predict_noise(
        self,
        x: Tensor,
        timestep: Tensor,
        model_options: dict | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """Return the guided prediction of x_0; the name is ComfyUI's."""
        model_options = model_options or {}
        if self.call_guide is None or not within(self.interval, timestep):
            self._switch_to(self.model_patcher, x)
            return super().predict_noise(x, timestep, model_options, seed)
        both = functools.partial(self._predict_both, x, timestep, model_options)
        return comfy.samplers.sampling_function(
            self.inner_model,
            x,
            timestep,
            self.guide.conds["positive"],
            self.conds["positive"],
            self.scale,
            model_options={**model_options, CALC: both},
            seed=seed,
        )

    def _predict_both(
        self, x: Tensor, timestep: Tensor, model_options: dict, args: dict
    ) -> list[Tensor]:
        """Return the predictions of main model and guide.

        It replaces ComfyUI's own two calls (CALC); patches that change predictions, before guidance
        or after it, still apply, and find the main model.
        """

        def main() -> Tensor:
            self._switch_to(self.model_patcher, x)
            conds = [self.conds["positive"]]
            return comfy.samplers.calc_cond_batch(
                self.inner_model, conds, x, timestep, model_options
            )[0]

        def guide() -> Tensor:
            self._switch_to(self.guide.model_patcher, x)
            return self.call_guide(x, timestep)

        loaded = self.inner_model.current_patcher
        if self.one_model and loaded is self.guide.model_patcher:  # first, to switch once less
            guided, result = guide(), main()
        else:
            result, guided = main(), guide()
        if not self.in_turn or any(model_options.get(name) for name in AROUND):
            self._switch_to(self.model_patcher, x)
        counts = covered(self.guide.conds["positive"], x, timestep)
        return [result, guided if counts is None else torch.where(counts, guided, result)]

    def _switch_to(self, patcher: comfy.model_patcher.ModelPatcher, x: Tensor) -> None:
        """Give the one model that both are clones of the weights, patches and hooks of a clone."""
        model = patcher.model
        if not self.one_model or model.current_patcher is patcher:
            return
        model.current_patcher.unpatch_hooks()  # only this clone knows how to take its hooks off
        if self.in_turn:
            memory = patcher.memory_required([2 * len(x), *x.shape[1:]])
            comfy.model_management.load_models_gpu([patcher], memory_required=memory)
        model.current_patcher = patcher


def give_own_keyframes(conds: list[dict]) -> None:
    """Give conditionings copies of their hooks, whose keyframes nobody else has.

    Keyframes tell only the first who asks in a step that the strength of a hook has changed: of two
    models with the same, the second would keep the strength from before.
    """
    groups: dict[int, comfy.hooks.HookGroup] = {}
    keyframes: dict[int, comfy.hooks.HookKeyframeGroup] = {}
    for cond in conds:
        hooks = cond.get("hooks")
        if hooks is None:
            continue
        if id(hooks) not in groups:
            groups[id(hooks)] = own = comfy.hooks.HookGroup()
            for hook in hooks.hooks:
                shared, hook = hook.hook_keyframe, hook.clone()
                hook.hook_keyframe = keyframes.setdefault(id(shared), shared.clone())
                own.add(hook)
        cond["hooks"] = groups[id(hooks)]


def same_patches(a: comfy.model_patcher.ModelPatcher, b: comfy.model_patcher.ModelPatcher) -> bool:
    """Return whether two clones of a model have the same weights and layers.

    Their options may differ, as those are handed to each call. LoRAs that bypass the weights are
    injections.
    """
    for name in ("injections", "weight_wrapper_patches"):
        if getattr(a, name, {}) != getattr(b, name, {}):
            return False
    if a.patches_uuid != b.patches_uuid or a.object_patches.keys() != b.object_patches.keys():
        return False
    return all(a.object_patches[key] is b.object_patches[key] for key in a.object_patches)


def check_models(
    model: comfy.model_patcher.ModelPatcher, guide: comfy.model_patcher.ModelPatcher
) -> None:
    """Check that model and guide predict the same thing.

    Raises:
        ValueError: they do not.
    """
    for patcher, name in ((model, "model"), (guide, "guide")):
        if has_probabilistic_guidance(patcher):
            raise ValueError(
                f"GM Probabilistic Guidance on the {name} would use the scale as its weight; "
                "connect the model from before that node"
            )
        if patcher.get_wrappers(WrappersMP.APPLY_MODEL, RECORDER):  # it predicts mixtures
            check_flow(patcher.get_model_object("model_sampling"))
        if asks_for_negative(patcher.model_options):
            no_effect(
                f"a node on the {name} that needs a negative prediction (Normalized Attention "
                "Guidance)",
                "GM Autoguidance has none",
            )
        other = patcher.model_options.get(CALC)
        if other is not None:
            raise ValueError(
                f"{name_of(other)} on the {name} does not go with GM Autoguidance: such functions "
                "have to do with a negative prediction, and the guide takes its place; connect the "
                "model from before that node"
            )
    ours, theirs = (patcher.get_model_object("latent_format") for patcher in (model, guide))
    shapes = [(latent.latent_channels, latent.latent_dimensions) for latent in (ours, theirs)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"the guide does not fit: its latents have {shapes[1][0]} channels and {shapes[1][1]} "
            f"dimensions, the model's {shapes[0][0]} and {shapes[0][1]}; use a guide for the same "
            "latents: a smaller or less trained model of the same family"
        )
    ours, theirs = (type(patcher.get_model_object("model_sampling")) for patcher in (model, guide))
    if ours.noise_scaling is not theirs.noise_scaling:
        raise ValueError(
            "the guide does not fit: noise is added in different ways for the model "
            f"({kind_of(ours)}) and the guide ({kind_of(theirs)}), so the same latent means "
            "different things to them; use a guide of the same kind, and no ModelSampling nodes "
            "that change it"
        )


def kind_of(sampling: type) -> str:
    """Return how noise is added, for a message."""
    if issubclass(sampling, comfy.model_sampling.CONST):
        return "flow matching"
    return "diffusion with an unbounded sigma"
