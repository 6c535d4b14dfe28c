"""The seam to ComfyUI's sampling: the one file that knows its hooks.

A GM model (see `models.py`), or a model with a GM adapter (see `adapters.py`), is an ordinary MODEL. What wants more than its
mean velocity leaves a `MixtureRecorder` in the transformer options of the call (a plain object passes through ComfyUI's copies
of the options by reference); a wrapper around the model finds it there, waits for what the network offers, and hands it over.
Nothing is kept between two calls.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

from ..gmflow_core import DXPolicy, DXVelocity, GaussianMixture, ModeFrame, predict_x0
from ..gmflow_core.guidance import Guidance, within
from ..gmflow_core.models.heads import Head, HeadLayout
from ..gmflow_core.policy import Policy
from .notices import clear, notice

RECORDER = "gmflow_mixture_recorder"  # key in transformer_options
ADAPTER = "gmflow_adapter"  # likewise
SOURCE = "gmflow_source"  # key in a conditioning: the SourceNoise whose modes it names
LABELS = "gmflow_labels"  # likewise: integers (n,)
DEFAULT_GUIDANCE = 3.5  # what ComfyUI feeds FLUX models where a conditioning says nothing of it
ROUNDING = 1e-4  # two means that differ by less, relatively, are the same
PARTIAL = ("area", "mask", "timestep_start", "timestep_end")  # what limits a conditioning to a part of the latent or the steps
NO_MIXTURE = (
    "GM samplers and guidance need a model that predicts a Gaussian mixture at every step, and this one did not; load one with "
    "'Load GM Model', or put 'GM Adapter' on a base model (and remove nodes that skip network calls, such as LazyCache), or "
    "use a stock sampler"
)


class MixtureRecorder:
    """Collects the predictions of velocities that one call of a guider makes, by the conditioning they belong to."""

    def __init__(self):
        self.predictions: dict[object, GaussianMixture | DXVelocity] = {}
        self.guided: GaussianMixture | None = None  # of x_0; what probabilistic guidance made of them, if it did
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
        absent = any(cond.get(key) is not None for cond in conds or [] for key in ("timestep_start", "timestep_end"))
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


_waiting = threading.local()  # .predictions: a list while `add_recording`'s wrapper waits in this thread


def is_awaited() -> bool:
    """Whether somebody waits for the whole prediction of the network that runs."""
    return getattr(_waiting, "predictions", None) is not None


def offer(prediction: object) -> None:
    """Hand a prediction to whoever waits for it. Thread-local, as compiled networks are not traced anew for other options."""
    if is_awaited():
        _waiting.predictions.append(prediction)


def add_recording(
    model: comfy.model_patcher.ModelPatcher,
    finish: Callable[[Any, torch.Size], GaussianMixture | DXVelocity] = lambda prediction, shape: prediction,
) -> None:
    """Let recorders get what the model's network offers.

    Args:
        finish: makes of it, and of the latents' shape, a prediction in the solver's shape.
    """

    def apply_model_recorded(
        executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs
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
    return {**(model_options or {}), "transformer_options": {**options, RECORDER: recorder}}, recorder


# Mixture sources


def mark_noise(noise: Tensor, drawn: object) -> Tensor:
    """Leave a note on a noise tensor of what it was drawn by, for `check_noise`."""
    noise.gmflow_source = drawn
    return noise


def check_noise(executor, noise: Tensor, *args, **kwargs):
    """Say so if a model gets noise of another kind than it was trained with (N(0, I), or a mixture source), or of other modes
    than those it is told; a wrapper for ComfyUI's OUTER_SAMPLE, so that it is said with stock samplers too."""
    clear()
    guider = executor.class_obj
    record = guider.model_patcher.model.diffusion_model.source
    drawn = getattr(noise, "gmflow_source", None)
    knows = record is not None and record["conditioning"] == "mode"
    if record is None and drawn is not None:
        notice(
            "connect 'RandomNoise' to noise: this noise is from a mixture source, and the model was trained with noise from "
            "N(0, I). Expect poor images"
        )
    if record is not None and drawn is None and noise.any():  # or it is switched off
        modes = ", and its modes to positive" if knows else ""
        notice(
            f"connect 'Mixture Source Noise' to noise of SamplerCustomAdvanced{modes}: the model was trained with noise from a "
            f"mixture source of {record['num_modes']} modes, and this is not. Expect poor images"
        )
    if knows and drawn is not None:
        conds = getattr(guider, "conds", {}).get("positive") or []
        told = [cond[LABELS].tolist() for cond in conds if cond.get(LABELS) is not None]
        wrong = [modes for modes in told if modes != drawn.modes.tolist()]
        if wrong:
            notice(
                "connect noise and modes from the same 'Mixture Source Noise': the noise is of the modes "
                f"{drawn.modes.tolist()}, and the conditioning says {wrong[0]}. Expect poor images"
            )
    return executor(noise, *args, **kwargs)


# The solver's shape


def to_points(latent: Tensor) -> Tensor:
    """(B, 2, *S) -> (B * numel(S), 2)."""
    return latent.movedim(1, -1).reshape(-1, latent.shape[1])


def to_latent(points: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `to_points` for a latent of that shape."""
    return points.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


class SolverShape:
    """How a model's latents, (B, C, *S), become what a solver works on."""

    def to_solver(self, latent: Tensor) -> Tensor:
        """A latent in the solver's shape."""
        return latent

    def from_solver(self, x: Tensor, latent_shape: torch.Size) -> Tensor:
        """The inverse of `to_solver`."""
        return x


class PointShape(SolverShape):
    """Of a 2-D model every point is a sample of its own."""

    def to_solver(self, latent: Tensor) -> Tensor:
        """(B, 2, *S) -> (B * numel(S), 2)."""
        return to_points(latent)

    def from_solver(self, x: Tensor, latent_shape: torch.Size) -> Tensor:
        """The inverse of `to_solver`."""
        return to_latent(x, latent_shape)


@dataclass(frozen=True)
class FoldedShape(SolverShape):
    """Latents that hold pixels of the mixture in their channels."""

    layout: HeadLayout

    def to_solver(self, latent: Tensor) -> Tensor:
        """(B, C p^2, h, w) -> (B, C, p h, p w)."""
        return self.layout.unfold(latent)

    def from_solver(self, x: Tensor, latent_shape: torch.Size) -> Tensor:
        """The inverse of `to_solver`."""
        return self.layout.fold(x)


def solver_shape(model: comfy.model_base.BaseModel, model_options: dict | None) -> SolverShape:
    """That of a model with these options."""
    if getattr(model.diffusion_model, "of_points", False):
        return PointShape()
    adapter = adapter_of(model_options)
    return FoldedShape(adapter.layout) if adapter is not None and adapter.layout.folded > 1 else SolverShape()


# Adapters


@dataclass(frozen=True)
class Adapter:
    """What samplers want to know of the GM adapter on a model.

    Args:
        layout: of the base model's tokens.
        steps: the fewest that it was made for.
        guidance: the guidance that its base model was distilled with, which it expects; None if the base has none.
        replaced: names of the base model's layers that its head stands in for.
    """

    name: str
    layout: HeadLayout
    steps: int
    guidance: float | None
    replaced: tuple[str, ...]


class HeadForward:
    """The forward of a base model's last layer, with a head in its stead: it gives the mean velocity on, and the prediction to
    whoever waits for it.

    The layer itself stays where it is: ComfyUI's memory managers, LoRA loaders and savers know weights by their place in the
    model, which all its clones share. The head is none of their weights; it is small enough to be sent to the GPU in each call.
    """

    def __init__(self, head: Head):
        self.head = head

    def __call__(self, tokens: Tensor, embedding: Tensor, modulation_dims: object = None) -> Tensor:
        """Mean velocity tokens (B, N, C p^2), in float32.

        Args:
            embedding: (B, D), or (B, M, D) where tokens of reference images have one of their own; the first is the image's,
                and what becomes of the other tokens does not matter, as the base model drops them.
        """
        prediction = self.head(tokens, embedding if embedding.ndim == 2 else embedding[:, 0])
        offer(prediction)
        return self.head.layout.to_tokens(prediction.mean())


def pass_on(tokens: Tensor) -> Tensor:
    """The forward of a layer that falls away."""
    return tokens


class ShiftedFlow(comfy.model_sampling.ModelSamplingFlux, comfy.model_sampling.CONST):
    """Flow matching with a time shift, for stock schedulers.

    Its table of sigmas is no buffer: ComfyUI's memory managers would back it up and restore it under the name that the base
    model's table has, too.

    Args:
        time_shift: see `gmflow_core.path.shift_time`.
        multiplier: of sigma, for networks that want another unit of time.
    """

    def __init__(self, time_shift: float, multiplier: float = 1.0):
        super().__init__()
        self.multiplier = multiplier
        self.set_parameters(shift=math.log(time_shift))
        self.complete = True

    def register_buffer(self, name: str, tensor: Tensor, persistent: bool = True) -> None:
        """Keep the table as an attribute, and let nobody else put one in."""
        if not getattr(self, "complete", False):
            object.__setattr__(self, name, tensor)

    def timestep(self, sigma: Tensor) -> Tensor:
        """What the network is fed."""
        return sigma * self.multiplier


def with_head(
    model: comfy.model_patcher.ModelPatcher,
    head: Head,
    layers: tuple[str, ...],
    sampling: ShiftedFlow,
    adapter: Adapter,
) -> comfy.model_patcher.ModelPatcher:
    """A clone of `model` that computes `head` in the place of the layers of its network that these names lead to: the head in
    the first, nothing in the others."""
    model = model.clone()
    for name in layers:
        forward = HeadForward(head) if name == layers[0] else pass_on
        model.add_object_patch(f"diffusion_model.{name}.forward", forward)
    add_recording(model, lambda prediction, shape: head.to_image(prediction, adapter.layout.image_size(shape)))
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, RECORDER, check_settings)
    model.model_options["transformer_options"][ADAPTER] = adapter
    model.add_object_patch("model_sampling", sampling)
    return model


def adapter_of(model_options: dict | None) -> Adapter | None:
    """The adapter on a model with these options."""
    return (model_options or {}).get("transformer_options", {}).get(ADAPTER)


def check_settings(executor, *args, **kwargs):
    """Say so if what is sampled does not fit the adapter; a wrapper for ComfyUI's OUTER_SAMPLE, so that it is said with stock
    samplers too."""
    clear()
    guider = executor.class_obj
    adapter = adapter_of(guider.model_options)
    if adapter.guidance is not None:
        conds = [cond for conds in getattr(guider, "conds", {}).values() for cond in conds or []]
        values = {cond.get("guidance", DEFAULT_GUIDANCE) for cond in conds} - {adapter.guidance}
        if values:
            asked = ", ".join(sorted("none at all" if value is None else f"{value:g}" for value in values))
            notice(
                f"the adapter {adapter.name} was made with a guidance of {adapter.guidance:g}, and the conditioning asks for "
                f"{asked}, which gives poor images; set FluxGuidance to {adapter.guidance:g}"
            )
        cfg = getattr(guider, "cfg", 1.0)
        if cfg != (0.0 if has_probabilistic_guidance(guider.model_patcher) else 1.0):
            notice(
                f"this base model has its guidance built in (distilled) and never learned what a negative prompt is: with a "
                f"guidance of {cfg:g} on top expect poor images; take Basic Guider, or cfg 1"
            )
    places = tuple(f"diffusion_model.{name}." for name in adapter.replaced)
    lost = sorted(key for key in guider.model_patcher.patches if key.startswith(places))
    if lost:
        notice(
            f"a LoRA on this model changes {', '.join(lost)}, which the head of {adapter.name} stands in for: that part of the "
            "LoRA has no effect"
        )
    return executor(*args, **kwargs)


def own_shift(model_sampling) -> float:
    """The time shift of a flow model's sampling, however it is parametrised: the odds of sigma half-way.

    Raises:
        ValueError: it is no flow model's.
    """
    highest, half = float(model_sampling.sigma_max), float(model_sampling.percent_to_sigma(0.5))
    if not 0 < half < highest <= 1:
        raise ValueError(
            f"GM samplers are for flow models, with sigmas up to 1, and this one's go up to {highest:.4g}; connect a model "
            "from Load GM Model or GM Adapter, and remove nodes such as ModelSamplingDiscrete"
        )
    return half / (1 - half)


# Probabilistic guidance


class ProbabilisticCFG:
    """A cfg function for ComfyUI that takes `cfg` as the weight w of probabilistic guidance: stock samplers get the guided
    mean, and the recorder the guided mixture.

    Args:
        orthogonal, interval: see `Guidance`.
    """

    def __init__(self, orthogonal: float, interval: tuple[float, float]):
        self.orthogonal, self.interval = orthogonal, interval

    def guidance(self, cfg: float) -> Guidance:
        """
        Raises:
            ValueError: `cfg` is no weight.
        """
        if not 0 <= cfg < 1:
            raise ValueError(
                f"cfg is {cfg:g}, but with 'GM Probabilistic Guidance' it is the weight w in [0, 1): 0 for none, 0.1 to 0.5 as "
                "a rule. Set cfg of the sampler or guider to that (Basic Guider has none: use GM Guider or CFG Guider)"
            )
        return Guidance(cfg, orthogonal=self.orthogonal, interval=self.interval)

    def __call__(self, args: dict) -> Tensor:
        """x minus the guided mean; ComfyUI's `sampler_cfg_function`."""
        guidance, model, latent, sigma = self.guidance(args["cond_scale"]), args["model"], args["input"], args["sigma"]
        recorder = args["model_options"]["transformer_options"][RECORDER]
        recorder.asked = True
        if not guidance.acts_at(sigma):
            return args["cond"]
        if not args["input_uncond"]:
            raise ValueError(
                "probabilistic guidance needs a positive and a negative conditioning, and a guider that passes them on as "
                "ComfyUI's own do; use GM Guider, CFG Guider or KSampler"
            )
        shape = solver_shape(model, args["model_options"])
        x, uncond = shape.to_solver(latent), shape.to_solver(args["uncond_denoised"])
        cond = recorder.x0_policy(args["input_cond"], x, sigma.repeat_interleave(len(x) // len(sigma)))
        if cond is None:
            why = recorder.why_not_single(args["input_cond"], x)
            notice(f"found {why}, so there is no single mixture to guide: nothing is guided")
            return args["cond"]
        if isinstance(cond, DXPolicy):
            raise ValueError(
                "probabilistic guidance needs a Gaussian mixture, and this adapter has a DX policy; use classifier-free "
                "guidance, or a GM adapter"
            )
        recorder.guided = guidance(cond, uncond)
        return latent - shape.from_solver(recorder.guided.mean(), latent.shape)

    def calc_cond_batch(self, args: dict) -> list[Tensor]:
        """The predictions, without the negative one outside of the interval; ComfyUI's `sampler_calc_cond_batch_function`."""
        positive, negative = args["conds"]
        conds = [positive, negative if within(self.interval, args["sigma"]) else None]
        return comfy.samplers.calc_cond_batch(args["model"], conds, args["input"], args["sigma"], args["model_options"])


def with_probabilistic_guidance(
    model: comfy.model_patcher.ModelPatcher, orthogonal: float = 1.0, interval: tuple[float, float] = (0.0, 1.0)
) -> comfy.model_patcher.ModelPatcher:
    """A clone of `model` whose `cfg` is the weight of probabilistic guidance, in every sampler and guider; settings that were
    there before are replaced.

    Raises:
        ValueError: another node has put its own cfg function in.
    """
    other = model.model_options.get("sampler_cfg_function")
    if other is not None and not has_probabilistic_guidance(model):
        raise ValueError(
            f"a node before has put a cfg function of its own into this model ({_name_of(other)}: RescaleCFG and the like), "
            "and there can be one only; remove that node, or use it without probabilistic guidance"
        )
    model, function = model.clone(), ProbabilisticCFG(orthogonal, interval)
    model.set_model_sampler_cfg_function(function, disable_cfg1_optimization=True)
    model.set_model_sampler_calc_cond_batch_function(function.calc_cond_batch)
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, RECORDER, predict_noise_recorded)
    return model


def has_probabilistic_guidance(model: comfy.model_patcher.ModelPatcher) -> bool:
    """Whether `with_probabilistic_guidance` has been here."""
    return isinstance(model.model_options.get("sampler_cfg_function"), ProbabilisticCFG)


def predict_noise_recorded(executor, x: Tensor, timestep: Tensor, model_options: dict | None = None, seed: int | None = None):
    """Give every call of a guider a recorder; a wrapper for ComfyUI's PREDICT_NOISE.

    Raises:
        ValueError: the guider made something else of cfg.
    """
    options, recorder = recording(model_options)
    function = options.get("sampler_cfg_function")
    if not isinstance(function, ProbabilisticCFG):
        raise ValueError(
            f"a node behind 'GM Probabilistic Guidance' has put its own cfg function in its place ({_name_of(function)}: "
            "RescaleCFG and the like), and would take the weight for a cfg scale; remove one of the two"
        )
    result = executor(x, timestep, options, seed)
    if not recorder.asked:
        raise ValueError(
            "this guider computes its own cfg and would take the weight of 'GM Probabilistic Guidance' for a cfg scale; use GM "
            "Guider, CFG Guider or KSampler, or remove GM Probabilistic Guidance"
        )
    return result


def _name_of(function: object) -> str:
    """Where a function comes from, for a message."""
    return getattr(function, "__qualname__", type(function).__qualname__).split(".<locals>")[0]


class MixtureModel:
    """What a solver of gmflow_core needs of the model that ComfyUI hands to a sampler function.

    The solver works in the shape that `solver_shape` says.

    Args:
        model: first argument of the sampler function: it holds the guider, the initial noise and the original latent.
        latent_shape: of the sampler function's x.
        extra_args: of the sampler function.
    """

    def __init__(self, model, latent_shape: torch.Size, extra_args: dict):
        self.model, self.guider, self.latent_shape, self.extra_args = model, model.inner_model, latent_shape, extra_args
        self.shape = solver_shape(self.guider.inner_model, extra_args.get("model_options"))
        self.mask: Tensor | None = None  # of the step that runs
        self.frame: ModeFrame | None = None  # what the solver works in

    @property
    def spectrum(self) -> nn.Module | None:
        """The model's spectrum network, if it has one."""
        return getattr(self.guider.inner_model.diffusion_model, "spectrum", None)

    @property
    def adapter(self) -> Adapter | None:
        """The GM adapter on the model."""
        return adapter_of(self.extra_args.get("model_options"))

    @property
    def own_shift(self) -> float:
        """The model's time shift."""
        return own_shift(self.guider.inner_model.model_sampling)

    @property
    def has_source(self) -> bool:
        """Whether the model was trained with a mixture source."""
        return self._source is not None

    @property
    def _source(self) -> dict | None:
        return getattr(self.guider.inner_model.diffusion_model, "source", None)

    def enter_modes(self, solver: str) -> None:
        """Let the solver work in the coordinates in which the noise of the modes is N(0, I), if the model was trained with a
        mixture source: its closed forms hold there only.

        The positive conditioning knows the modes; the noise, which a sampler gets as a tensor, does not. So they are those that
        the network is told, whatever the guider and the nodes before it.

        Raises:
            ValueError: the network does not know the modes, or the conditioning does not say them.
        """
        record = self._source
        if record is None:
            return
        if record["conditioning"] != "mode":
            raise ValueError(
                f"{solver} has no closed form for a model that was trained with a mixture source and does not know the modes; "
                "choose euler (KSamplerSelect, or solver euler of GM Sampler) or another sampler that follows the mean"
            )
        conds = getattr(self.guider, "conds", {}).get("positive") or []
        if len(conds) != 1 or conds[0].get(SOURCE) is None:
            raise ValueError(
                f"{solver} needs to know the modes of the noise, with their means: connect 'modes' of 'Mixture Source Noise', "
                "alone, to the positive conditioning; or choose euler, for which numbers from GM Class Labels are enough"
            )
        self.frame = conds[0][SOURCE].frame(self.latent_shape[0], self.guider.model_patcher.load_device)

    def to_solver(self, latent: Tensor, sigma: Tensor | float) -> Tensor:
        """A latent at sigma in the solver's shape and coordinates."""
        x = self.shape.to_solver(latent)
        return x if self.frame is None else self.frame.enter(x, sigma)

    def from_solver(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """The inverse of `to_solver`."""
        return self.shape.from_solver(x if self.frame is None else self.frame.leave(x, sigma), self.latent_shape)

    def denoise(self, x: Tensor, sigma: Tensor) -> Policy:
        """The policy in x_0 that the guider makes; a denoiser for gmflow_core, in the solver's coordinates.

        Raises:
            ValueError: the model predicts no mixture.
        """
        denoiser = self.guided if self.frame is None else self.frame.denoiser(self.guided)
        return denoiser(x, sigma)

    def guided(self, x: Tensor, sigma: Tensor) -> Policy:
        """The same at x in the latents' coordinates and the solver's shape.

        With probabilistic guidance it is the guided mixture. Any other guider, and nodes that change the guided prediction
        afterwards, say a mean only: the policy is moved there as a whole. For a CFG Guider that is classifier-free guidance as
        gmflow_core has it. Where the positive conditioning is not a single one for the whole latent and all steps, there is
        nothing but the mean: a mixture of one component without a spread.

        Raises:
            ValueError: the model predicts no mixture.
        """
        options, recorder = recording(self.extra_args.get("model_options"))
        latent_sigma = sigma[:1].expand(self.latent_shape[0])
        self.mask = self.mask_at(latent_sigma)
        latent = self.shape.from_solver(x, self.latent_shape)
        denoised = self.guider(latent, latent_sigma, model_options=options, seed=self.extra_args.get("seed"))
        mean, policy = self.shape.to_solver(denoised), recorder.guided
        if policy is None:
            conds = getattr(self.guider, "conds", {}).get("positive")
            policy = recorder.x0_policy(conds, x, sigma)
            if policy is None:
                notice(
                    f"found {recorder.why_not_single(conds, x)}, so there is no single mixture: the sampler follows the mean, "
                    "as stock samplers do. One prompt for the whole image and all steps makes use of the mixture"
                )
                return GaussianMixture.point_mass(mean)
        shift = mean - policy.mean()
        if recorder.guided is not None and shift.abs().max() <= ROUNDING * (1 + mean.abs().max()):
            return recorder.guided  # nothing came after
        return policy.moved(shift)

    def mask_at(self, sigma: Tensor) -> Tensor | None:
        """The noise mask at (B,) equal sigmas, where a node may have put a function of it in; None if there is none."""
        mask, options = self.extra_args.get("denoise_mask"), self.extra_args.get("model_options", {})
        if mask is None or "denoise_mask_function" not in options:
            return mask
        extra = {"model": self.guider, "sigmas": self.model.sigmas}
        return options["denoise_mask_function"](sigma, mask, extra_options=extra)

    @property
    def masked(self) -> bool:
        """Whether there is a noise mask."""
        return self.extra_args.get("denoise_mask") is not None

    def constrain(self, x: Tensor, sigma: Tensor) -> Tensor:
        """What every substep has to respect: the noise mask of the step, outside of which x is the original latent at that
        sigma."""
        sigma = sigma.reshape(-1)[:1].expand(self.latent_shape[0])
        latent = self.from_solver(x, sigma)
        original = self.guider.inner_model.scale_latent_inpaint(
            x=latent, sigma=sigma, noise=self.model.noise, latent_image=self.model.latent_image
        )
        return self.to_solver(latent * self.mask + original * (1 - self.mask), sigma)
