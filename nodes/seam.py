"""The seam to ComfyUI's sampling: the one file that knows its hooks.

A GM model (see `models.py`) is an ordinary MODEL. What wants more than its mean velocity leaves a `MixtureRecorder` in the
transformer options of the call; the network finds it there and hands it the whole mixture (a plain object passes through
ComfyUI's copies of the options by reference). Nothing is kept between two calls.
"""

from __future__ import annotations

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

from ..gmflow_core import GaussianMixture, velocity_to_x0
from ..gmflow_core.guidance import Guidance, within

RECORDER = "gmflow_mixture_recorder"  # key in transformer_options
ROUNDING = 1e-4  # two means that differ by less, relatively, are the same
PARTIAL = ("area", "mask", "timestep_start", "timestep_end")  # what limits a conditioning to a part of the latent or the steps


class MixtureRecorder:
    """Collects the mixtures of velocities that one call of a guider makes, by the conditioning they belong to."""

    def __init__(self):
        self.mixtures: dict[object, GaussianMixture] = {}
        self.guided: GaussianMixture | None = None  # of x_0; what probabilistic guidance made of them, if it did
        self.asked = False  # whether the guider left cfg to probabilistic guidance

    def record(self, mixture: GaussianMixture, transformer_options: dict) -> None:
        """Split a network's output, whose batch (log_std's too) holds an equal chunk for each conditioning, by cond uuid. The
        first of each counts: nodes that call the network again, to compare, do so after the call itself."""
        uuids = transformer_options["uuids"]
        fields = (mixture.means, mixture.log_weights, mixture.log_std)
        for uuid, *chunk in zip(uuids, *[t.chunk(len(uuids)) for t in fields], strict=True):
            self.mixtures.setdefault(uuid, GaussianMixture(*chunk))

    def x0_mixture(self, conds: list[dict] | None, x: Tensor, sigma: Tensor) -> GaussianMixture:
        """The mixture of x_0 for a guider's positive conditioning, at x in a solver's shape.

        Raises:
            ValueError: the model predicts no mixture, or the conditioning is not a single one for the whole latent and all
                steps.
        """
        conds = conds or []
        partial = [key for cond in conds for key in PARTIAL if cond.get(key) is not None]
        if len(conds) != 1 or partial:
            raise ValueError(
                "GM samplers and guidance need one positive conditioning for the whole latent and all steps; found "
                f"{len(conds)}{' with ' + ', '.join(partial) if partial else ''}. Remove area, mask, timestep range and "
                "combine nodes, or use a stock sampler without probabilistic guidance"
            )
        if conds[0]["uuid"] not in self.mixtures:
            raise ValueError(
                "GM samplers and guidance need a model that predicts a Gaussian mixture at every step, and this one did not; "
                "load one with 'Load GM Model' (and remove nodes that skip network calls, such as LazyCache), or use a stock "
                "sampler"
            )
        return velocity_to_x0(self.mixtures[conds[0]["uuid"]], x, sigma)


def recording(model_options: dict | None) -> tuple[dict, MixtureRecorder]:
    """Model options with a recorder in them, and that: the one that is there already, or a new one."""
    options = (model_options or {}).get("transformer_options", {})
    recorder = options.get(RECORDER) or MixtureRecorder()
    return {**(model_options or {}), "transformer_options": {**options, RECORDER: recorder}}, recorder


# The solver's shape: of a 2-D model every point is a sample of its own


def to_points(latent: Tensor) -> Tensor:
    """(B, 2, *S) -> (B * numel(S), 2)."""
    return latent.movedim(1, -1).reshape(-1, latent.shape[1])


def to_latent(points: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `to_points` for a latent of that shape."""
    return points.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


def is_of_points(model: comfy.model_base.BaseModel) -> bool:
    """Whether it is a 2-D model."""
    return getattr(model.diffusion_model, "of_points", False)


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
        points = is_of_points(model)
        x, uncond = (to_points(t) if points else t for t in (latent, args["uncond_denoised"]))
        cond = recorder.x0_mixture(args["input_cond"], x, sigma.repeat_interleave(len(x) // len(sigma)))
        recorder.guided = guidance(cond, uncond)
        mean = recorder.guided.mean()
        return latent - (to_latent(mean, latent.shape) if points else mean)

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

    For a 2-D model the solver works on points (B * H * W, 2), as every point is a sample of its own.

    Args:
        model: first argument of the sampler function: it holds the guider, the initial noise and the original latent.
        latent_shape: of the sampler function's x.
        extra_args: of the sampler function.
    """

    def __init__(self, model, latent_shape: torch.Size, extra_args: dict):
        self.model, self.guider, self.latent_shape, self.extra_args = model, model.inner_model, latent_shape, extra_args
        self.of_points = is_of_points(self.guider.inner_model)

    @property
    def spectrum(self) -> nn.Module | None:
        """The model's spectrum network, if it has one."""
        return getattr(self.guider.inner_model.diffusion_model, "spectrum", None)

    def to_solver(self, latent: Tensor) -> Tensor:
        """A latent in the solver's shape."""
        return to_points(latent) if self.of_points else latent

    def from_solver(self, x: Tensor) -> Tensor:
        """The inverse of `to_solver`."""
        return to_latent(x, self.latent_shape) if self.of_points else x

    def denoise(self, x: Tensor, sigma: Tensor) -> GaussianMixture:
        """The mixture of x_0 that the guider makes; a denoiser for gmflow_core.

        With probabilistic guidance it is the guided one. Any other guider, and nodes that change the guided prediction
        afterwards, say a mean only: the mixture is moved there as a whole. For a CFG Guider that is classifier-free guidance as
        gmflow_core has it.

        Raises:
            ValueError: as `MixtureRecorder.x0_mixture`.
        """
        options, recorder = recording(self.extra_args.get("model_options"))
        latent_sigma = sigma[:1].expand(self.latent_shape[0])
        denoised = self.guider(self.from_solver(x), latent_sigma, model_options=options, seed=self.extra_args.get("seed"))
        mean, mixture = self.to_solver(denoised), recorder.guided
        if mixture is None:
            mixture = recorder.x0_mixture(getattr(self.guider, "conds", {}).get("positive"), x, sigma)
        shift = mean - mixture.mean()
        if recorder.guided is not None and shift.abs().max() <= ROUNDING * (1 + mean.abs().max()):
            return recorder.guided  # nothing came after
        return GaussianMixture(mixture.means + shift.unsqueeze(1), mixture.log_weights, mixture.log_std)

    def constrain(self, x: Tensor, sigma: Tensor) -> Tensor:
        """What every substep has to respect: the user's interruption, and the noise mask, outside of which x is the original
        latent at that sigma."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        mask = self.extra_args.get("denoise_mask")
        if mask is None:
            return x
        sigma = sigma.reshape(-1)[:1].expand(self.latent_shape[0])
        options = self.extra_args.get("model_options", {})
        if "denoise_mask_function" in options:
            extra = {"model": self.guider, "sigmas": self.model.sigmas}
            mask = options["denoise_mask_function"](sigma, mask, extra_options=extra)
        latent = self.from_solver(x)
        original = self.guider.inner_model.scale_latent_inpaint(
            x=latent, sigma=sigma, noise=self.model.noise, latent_image=self.model.latent_image
        )
        return self.to_solver(latent * mask + original * (1 - mask))
