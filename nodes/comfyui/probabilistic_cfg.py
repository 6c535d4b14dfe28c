"""Probabilistic guidance (GMFlow, ICML 2025) in the place of ComfyUI's cfg."""

from __future__ import annotations

import functools
from collections.abc import Callable

import comfy.model_patcher
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...gmflow_core.flow.blended import BlendedPolicy, is_mixture, kind_of
from ...gmflow_core.sampling.guidance import Guidance, within
from .advice import set_weight
from .guard import guarded
from .latent_check import check_conditioning
from .latent_shapes import solver_shape
from .notices import notice
from .paths import path_of
from .plain_model import gaussian_of, note_use, predicts_mixture
from .recording import RECORDER, hide_our_keys, recording
from .regions import MeanOnly, covered, moved_to, policy_of
from .solver_choice import is_unconditional, no_effect

CALC = "sampler_calc_cond_batch_function"  # ComfyUI's key in model_options
NEGATIVE = "disable_cfg1_optimization"  # and another: negative predictions at cfg 1 too, if true
OURS = "GM Probabilistic Guidance"  # its value if no other node asks for that


class ProbabilisticCFG:
    """A cfg function for ComfyUI that takes `cfg` as the weight w of probabilistic guidance.

    Stock samplers get the guided mean; the recorder gets the guided mixture. Where a model predicts
    no mixture, the conditional mean with its spread is one Gaussian, which is guided.

    Args:
        orthogonal: see `Guidance`.
        part: (start, end) of the sampling that is guided, which goes from 0 to 1. The sigmas are
            those of the sampling that the model has when it runs: nodes after guidance, such as GM
            Adapter, change it.
    """

    def __init__(self, orthogonal: float, part: tuple[float, float]):
        self.orthogonal, self.part = orthogonal, part

    def interval(self, sampling) -> tuple[float, float]:
        """Return the sigmas (low, high) on the straight path between which a sampling is guided."""
        if self.part == (0.0, 1.0):
            return self.part
        path = path_of(sampling)
        low, high = (path.sigma_of(sampling.percent_to_sigma(each)) for each in self.part[::-1])
        return low, high

    def guidance(self, cfg: float, interval: tuple[float, float] = (0.0, 1.0)) -> Guidance:
        """Return the guidance with weight `cfg`.

        Raises:
            ValueError: `cfg` is no weight in [0, 1).
        """
        if not 0 <= cfg < 1:
            raise ValueError(
                f"cfg {cfg:g} does not fit: {set_weight()}; with GM Probabilistic Guidance it is "
                "the weight w, and 0 is off"
            )
        return Guidance(cfg, orthogonal=self.orthogonal, interval=interval)

    @guarded
    def __call__(self, args: dict) -> Tensor:
        """Return x minus the guided mean; ComfyUI's `sampler_cfg_function`.

        Raises:
            ValueError: `cfg` is no weight, a conditioning is missing, or the adapter on the model
                predicts no Gaussian mixture.
        """
        model, latent = args["model"], args["input"]
        sigma = straight_sigma(args)
        guidance = self.guidance(args["cond_scale"], self.interval(model.model_sampling))
        recorder = args["model_options"]["transformer_options"][RECORDER]
        recorder.asked = True
        if not guidance.acts_at(sigma):
            return args["cond"]
        if not args["input_uncond"]:
            raise ValueError(
                "no negative conditioning: probabilistic guidance needs a positive and a negative "
                "one, and a guider that passes both on as ComfyUI's own do; use GM Guider, CFG "
                "Guider or KSampler"
            )
        steers = covered(args["input_uncond"], latent, args["sigma"])
        if steers is not None and not steers.any():
            return args["cond"]  # no negative at this step
        shape, away = solver_shape(model, args["model_options"]), args["uncond_denoised"]
        if steers is not None:
            away = torch.where(steers, away, args["cond_denoised"])
        uncond = shape.to_solver(away)
        if predicts_mixture(model, args["model_options"]):
            cond = policy_of(recorder, args["input_cond"], latent, shape)
        else:
            note_use(args["model_options"])
            mean, conds = shape.to_solver(args["cond_denoised"]), args["input_cond"]
            given = latent, args["sigma"], shape
            cond = gaussian_of(mean, sigma, args["model_options"], conds, *given)
        if isinstance(cond, MeanOnly):
            notice(f"nothing is guided: found {cond.why}, so there is no mixture to guide")
            return args["cond"]
        if not is_mixture(cond):
            raise ValueError(
                f"no mixture: this adapter has {kind_of(cond)}, and probabilistic guidance needs a "
                "Gaussian mixture; use classifier-free guidance, or a GM adapter"
            )
        cond = moved_to(cond, shape.to_solver(args["cond_denoised"]))  # if a node has changed that
        blended = isinstance(cond, BlendedPolicy)
        recorder.guided = cond.map(guidance, uncond) if blended else guidance(cond, uncond)
        return latent - shape.from_solver(recorder.guided.mean(), latent.shape)

    @guarded
    def calc_cond_batch(
        self,
        args: dict,
        guider: object = None,
        former: Callable[[dict], list[Tensor]] | None = None,
    ) -> list[Tensor]:
        """Return the predictions, without the negative one where nothing is guided.

        With the other arguments set, it is ComfyUI's `sampler_calc_cond_batch_function`.

        Args:
            guider: the one that calls, whose cfg is the weight.
            former: that function of another node, which is called instead of ComfyUI's own.
        """
        if not self.needs_negative(args, guider):
            args["conds"][1] = None  # in place: functions before cfg see it, as at ComfyUI's cfg 1
        if former is not None:
            return former(args)
        names = ("model", "conds", "input", "sigma", "model_options")
        return comfy.samplers.calc_cond_batch(*(args[name] for name in names))

    def needs_negative(self, args: dict, guider: object) -> bool:
        """Return whether anything uses the negative prediction in this step."""
        options = args["model_options"]
        after = options.get("sampler_post_cfg_function", ())
        if asks_for_negative(options) or any(_reads(each, "uncond_denoised") for each in after):
            return True
        if has_stock_prediction(guider) and guider.cfg == 0:
            return False
        return within(self.interval(args["model"].model_sampling), straight_sigma(args))


def asks_for_negative(model_options: dict) -> bool:
    """Return whether a node other than ours asks for the negative prediction at any cfg.

    Normalized Attention Guidance does.
    """
    return model_options.get(NEGATIVE, False) not in (False, OURS)


def has_stock_prediction(guider: object) -> bool:
    """Return whether a guider predicts as CFGGuider does, with its `cfg` as it stands."""
    method = getattr(getattr(guider, "predict_noise", None), "__func__", None)
    return method is comfy.samplers.CFGGuider.predict_noise


def straight_sigma(args: dict) -> Tensor:
    """Return the sigma (B,) on the straight path, from what ComfyUI hands to its functions."""
    return path_of(args["model"].model_sampling).sigma_of(args["sigma"])


def with_probabilistic_guidance(
    model: comfy.model_patcher.ModelPatcher,
    orthogonal: float = 1.0,
    part: tuple[float, float] = (0.0, 1.0),
) -> comfy.model_patcher.ModelPatcher:
    """Return a clone of `model` whose `cfg` is the weight of probabilistic guidance.

    It is so in every sampler and guider. Settings of an earlier call are replaced.

    Args:
        orthogonal, part: see `ProbabilisticCFG`.

    Raises:
        ValueError: another node has put its own cfg function on the model.
    """
    other = model.model_options.get("sampler_cfg_function")
    if other is not None and not has_probabilistic_guidance(model):
        raise _refusal(other, "each changes what cfg does, in its own way")
    model, function = model.clone(), ProbabilisticCFG(orthogonal, part)
    if not predicts_mixture(model.model, model.model_options):
        hide_our_keys(model)
    model.set_model_sampler_cfg_function(function)
    if not asks_for_negative(model.model_options):
        model.model_options[NEGATIVE] = OURS
    model.remove_wrappers_with_key(WrappersMP.PREDICT_NOISE, RECORDER)
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, RECORDER, predict_noise_recorded)
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, RECORDER, check_conditionings)
    return model


def has_probabilistic_guidance(model: comfy.model_patcher.ModelPatcher) -> bool:
    """Return whether a model's `cfg` is the weight of probabilistic guidance."""
    return isinstance(model.model_options.get("sampler_cfg_function"), ProbabilisticCFG)


@guarded
def check_conditionings(executor, *args, **kwargs):
    """Check the conditionings of a guided model; a wrapper for ComfyUI's OUTER_SAMPLE.

    Raises:
        ValueError: a conditioning is of another model.
    """
    guider = executor.class_obj
    check_conditioning(guider.model_patcher, getattr(guider, "conds", {}))
    cfg = getattr(guider, "cfg", 0)
    if cfg and is_unconditional(guider.model_patcher):
        no_effect(f"guidance {cfg:g}", "this model takes no conditioning, so none to steer from")
    return executor(*args, **kwargs)


@guarded
def predict_noise_recorded(
    executor,
    x: Tensor,
    timestep: Tensor,
    model_options: dict | None = None,
    seed: int | None = None,
):
    """Give a guider's call a recorder, and spare it what it does not need.

    It is a wrapper for ComfyUI's PREDICT_NOISE.

    Raises:
        ValueError: the guider or another node would use the weight as a cfg scale.
    """
    options, recorder = recording(model_options)
    function = options.get("sampler_cfg_function")
    if not isinstance(function, ProbabilisticCFG):
        raise _refusal(function)
    kinds = ("sampler_pre_cfg_function", "sampler_post_cfg_function")
    for other in (other for kind in kinds for other in options.get(kind, ())):
        if _reads(other, "cond_scale"):
            raise _refusal(other)
    options[CALC] = functools.partial(
        function.calc_cond_batch, guider=executor.class_obj, former=options.get(CALC)
    )
    result = executor(x, timestep, options, seed)
    # a step whose prediction a node outside of the guider keeps (LazyCache) asks nothing
    if not (recorder.asked or has_stock_prediction(executor.class_obj)):
        raise ValueError(
            "another guider is needed: this one computes its own cfg, and would use the weight of "
            "'GM Probabilistic Guidance' as a cfg scale; use GM Guider, CFG Guider or KSampler, or "
            "remove GM Probabilistic Guidance"
        )
    return result


def _refusal(
    function: object,
    why: str = "it takes the cfg, which is a weight below 1 here, for an ordinary one",
) -> ValueError:
    """Return the error for another node's function that does not go with ours."""
    return ValueError(
        f"{name_of(function)} does not go with GM Probabilistic Guidance: {why}; remove or bypass "
        "one of the two nodes"
    )


def _reads(function: object, key: str) -> bool:
    """Return whether a node's function around cfg reads a value, by the key that it asks for."""
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    return key in getattr(code, "co_consts", ())


def name_of(function: object) -> str:
    """Return the node that a function comes from, for a message."""
    return getattr(function, "__qualname__", type(function).__qualname__).partition(".")[0]
