"""A model that ComfyUI hands to a sampler, as the solvers of gmflow_core see it."""

from __future__ import annotations

import comfy.samplers
import torch
from torch import Tensor, nn

from ...gmflow_core import GaussianMixture, ModeFrame
from ...gmflow_core.flow.blended import Followed
from ...gmflow_core.flow.scaled_paths import STRAIGHT
from .adapter_info import FewSteps, few_steps_of
from .label_conditioning import SOURCE
from .latent_shapes import solver_shape
from .notices import notice
from .paths import path_of
from .plain_model import gaussian_of, predicts_mixture
from .probabilistic_cfg import has_probabilistic_guidance
from .recording import recording
from .regions import MeanOnly, moved_to, policy_of
from .sampling_run import run_of
from .time_shift import own_shift

WATCH = "gmflow_watch"  # key in model_options: a function (policy of x_0, x, sigma) to be told


class SolverModel:
    """A denoiser for a solver of gmflow_core, in the shape that `solver_shape` gives.

    The solver works on the straight path, whatever the model's own one is: its x and sigma are
    converted on the way to the model (`path`). A model that predicts no mixture counts as one of a
    single Gaussian.

    Args:
        model: first argument of the sampler function: ComfyUI's model, or a function that another
            node puts around it, for instance to change sigma.
        latent_shape: shape of the sampler function's x.
        extra_args: the sampler function's `extra_args`.
        sigmas: of the sampler function, in the model's units.

    Raises:
        ValueError: the model's sampling is none that GM samplers know.
    """

    def __init__(self, model, latent_shape: torch.Size, extra_args: dict, sigmas: Tensor):
        self.model, self.run = model, run_of(model, extra_args)
        self.guider, self.sigmas = self.run.guider, sigmas
        self.latent_shape, self.extra_args = latent_shape, extra_args
        options, inner = extra_args.get("model_options"), self.guider.inner_model
        self.shape = solver_shape(inner, options)
        self.is_plain = not predicts_mixture(inner, options)
        self.path = path_of(inner.model_sampling) if self.is_plain else STRAIGHT
        self.mask: Tensor | None = None  # noise mask of the present step, in [0, 1]
        self.frame: ModeFrame | None = None  # coordinates the solver works in, if other than x

    @property
    def spectrum(self) -> nn.Module | None:
        """Spectrum network of the model for GM-SDE, if there is one that applies.

        It knows latents, and does not apply in the coordinates of a mixture source's modes.
        """
        if self._source is not None:
            return None
        return getattr(self.guider.inner_model.diffusion_model, "spectrum", None)

    @property
    def few_steps(self) -> FewSteps | None:
        """What the model was made for, if it is one of few steps."""
        network = self.guider.inner_model.diffusion_model
        return few_steps_of(self.extra_args.get("model_options"), network)

    @property
    def own_shift(self) -> float:
        """Time shift of the model, see `time_shift.own_shift`."""
        return own_shift(self.guider.inner_model.model_sampling)

    @property
    def highest(self) -> float:
        """Sigma of pure noise on the straight path."""
        return float(self.path.sigma_of(self.sigma_max)) if self.path.exploding else 1.0

    @property
    def sigma_max(self) -> float:
        """Highest sigma of the model, in its own units."""
        return float(self.guider.inner_model.model_sampling.sigma_max)

    @property
    def noise(self) -> Tensor | None:
        """Initial noise (B, C, *S), None if a node around the sampler hides it."""
        return self.run.noise

    @property
    def _source(self) -> dict | None:
        """Training record of the model's mixture source, if it has one."""
        return getattr(self.guider.inner_model.diffusion_model, "source", None)

    def enter_modes(self, solver: str) -> None:
        """Switch to the modes' coordinates if the model was trained with a mixture source.

        In these coordinates the noise of each mode is N(0, I), which the closed forms of the
        mixture solvers assume. The modes are read from the positive conditioning, as a sampler
        gets the noise as a bare tensor: they are those that the network is told, whatever guider
        and nodes come before it.

        Raises:
            ValueError: the network does not know the modes, or the conditioning names none.
        """
        record = self._source
        if record is None:
            return
        if record["conditioning"] != "mode":
            raise ValueError(
                f"{solver} does not fit this model: it was trained with a mixture source and does "
                "not know the modes, for which there is no closed form; choose euler "
                "(KSamplerSelect, or solver euler of GM Sampler) or another sampler that follows "
                "the mean"
            )
        conds = getattr(self.guider, "conds", {}).get("positive") or []
        if len(conds) != 1 or conds[0].get(SOURCE) is None:
            raise ValueError(
                f"no modes: {solver} needs to know those of the noise, with their means; connect "
                "'modes' "
                "of 'GM Mixture Source Noise', and nothing else, to the positive conditioning; or "
                "choose euler, for which numbers from GM Class Labels are enough"
            )
        device = self.guider.model_patcher.load_device
        self.frame = conds[0][SOURCE].frame(self.latent_shape[0], device)

    def to_solver(self, latent: Tensor, sigma: Tensor | float) -> Tensor:
        """Convert a latent at the solver's sigma to its shape and coordinates."""
        return self._from_straight(self.path.enter(latent, sigma), sigma)

    def from_solver(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """Convert x at the solver's sigma back to a latent: the inverse of `to_solver`."""
        return self.path.leave(self._straight(x, sigma), sigma)

    def denoise(self, x: Tensor, sigma: Tensor) -> Followed:
        """Return the guider's policy in x_0, in the solver's coordinates.

        Raises:
            ValueError: the model predicts no mixture.
        """
        denoiser = self.guided if self.frame is None else self.frame.denoiser(self.guided)
        return denoiser(x, sigma)

    def guided(self, x: Tensor, sigma: Tensor) -> Followed:
        """Return the guider's policy in x_0, in the latents' coordinates and the solver's shape.

        - With probabilistic guidance it is the guided mixture.
        - Other guiders, and nodes that change the guided prediction afterwards, return only a mean;
          the whole policy is shifted so that its mean matches. For a CFG Guider that is the
          classifier-free guidance of gmflow_core.
        - A model that predicts no mixture has one Gaussian around the guided mean.
        - Several positive conditionings, areas, masks and ranges of steps give a blend of policies.
        - Where only the mean is known, as for context windows, the policy is a point mass.

        A function at WATCH in the model options is called with the policy, x and sigma.

        Raises:
            ValueError: the model predicts no mixture.
        """
        policy = self._guided(x, sigma)
        watch = (self.extra_args.get("model_options") or {}).get(WATCH)
        if watch is not None:
            watch(policy, x, sigma)
        return policy

    def _guided(self, x: Tensor, sigma: Tensor) -> Followed:
        options, recorder = self.extra_args.get("model_options"), None
        if not self.is_plain or has_probabilistic_guidance(self.guider.model_patcher):
            options, recorder = recording(options)
        own_sigma = sigma[:1].expand(self.latent_shape[0])
        latent_sigma = self.path.time_of(own_sigma)
        self.mask = self.mask_at(latent_sigma)
        straight = self.shape.from_solver(x, self.latent_shape)
        if self.mask is not None:
            straight = self._given(straight, own_sigma)
        latent = self.path.leave(straight, own_sigma)
        denoised = self.call(latent, latent_sigma, options)
        mean, policy = self.shape.to_solver(denoised), recorder and recorder.guided
        conds = getattr(self.guider, "conds", {}).get("positive")
        if policy is None and self.is_plain:
            return gaussian_of(mean, sigma, options, conds, latent, latent_sigma, self.shape)
        if policy is None:
            policy = policy_of(recorder, conds, latent, self.shape)
            if isinstance(policy, MeanOnly):
                notice(
                    f"no mixture, found {policy.why}: its mean is followed, as stock samplers do; "
                    f"{policy.advice}"
                )
                return GaussianMixture.point_mass(mean)
        if recorder.guided is not None:
            return moved_to(policy, mean)  # which no node has changed, as a rule
        return policy.moved(mean - policy.mean())

    def call(self, latent: Tensor, sigma: Tensor, model_options: dict) -> Tensor:
        """Return the prediction of x_0 of the model that the sampler function was given.

        ComfyUI's own model is given no mask, as that is applied here. A function around it may
        change sigma, and with it how noisy the original must be; so ComfyUI's model inside of it
        puts it there once more, wherever nothing is to change.
        """
        own = isinstance(self.model, comfy.samplers.KSamplerX0Inpaint)
        mask = None if own or self.mask is None else self.mask.sign()
        extra = {**self.extra_args, "model_options": model_options, "denoise_mask": mask}
        return self.model(latent, sigma, **extra)

    def mask_at(self, sigma: Tensor) -> Tensor | None:
        """Return the noise mask at (B,) equal sigmas, None if there is none.

        Nodes such as Differential Diffusion make the mask a function of sigma.
        """
        mask, options = self.extra_args.get("denoise_mask"), self.extra_args.get("model_options")
        function = (options or {}).get("denoise_mask_function")
        if mask is None or function is None:
            return mask
        sigmas = self.sigmas if self.run.sigmas is None else self.run.sigmas
        extra = {"model": self.guider, "sigmas": sigmas}
        return function(sigma, mask, extra_options=extra)

    @property
    def masked(self) -> bool:
        """True if there is a noise mask."""
        return self.extra_args.get("denoise_mask") is not None

    def constrain(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Replace x where the step's noise mask is 0 by the original latent at that sigma."""
        sigma = sigma.reshape(-1)[:1].expand(self.latent_shape[0])
        straight = self._straight(x, sigma)
        original = self._original(straight, sigma)
        return self._from_straight(torch.where(self.mask > 0, straight, original), sigma)

    def blend(self, start: Tensor, sigma: float, x: Tensor, sigma_end: float) -> Tensor:
        """Return x at the end of a step of which the share m, the noise mask, counts.

        Stock samplers take m x_0 + (1 - m) original for the predicted x_0. For the straight step of
        Euler from `start` that is the share m of it, and 1 - m of one to the original. The same is
        done here with the end of any step, however many substeps led there.
        """
        sigmas = [x.new_full((self.latent_shape[0],), each) for each in (sigma, sigma_end)]
        start, end = map(self._straight, (start, x), sigmas)
        image = self.run.latent_image
        to_original = image + sigma_end / sigma * (start - image)
        return self._from_straight(self.mask * end + (1 - self.mask) * to_original, sigmas[1])

    def _given(self, straight: Tensor, sigma: Tensor) -> Tensor:
        """Return what the network is given of x, as in stock samplers: m x + (1 - m) original."""
        return self.mask * straight + (1 - self.mask) * self._original(straight, sigma)

    def _original(self, straight: Tensor, sigma: Tensor) -> Tensor:
        """Return the original latent on the straight path at sigma (B,), shaped as x there."""
        latent = self.guider.inner_model.scale_latent_inpaint(
            x=self.path.leave(straight, sigma),
            sigma=self.path.time_of(sigma),
            noise=self.run.noise,
            latent_image=self.run.latent_image,
        )
        return self.path.enter(latent, sigma)

    def _straight(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return x of the solver as latents (B, C, *S) on the straight path."""
        x = x if self.frame is None else self.frame.leave(x, sigma)
        return self.shape.from_solver(x, self.latent_shape)

    def _from_straight(self, latent: Tensor, sigma: Tensor) -> Tensor:
        """Return x in the solver's shape and coordinates: the inverse of `_straight`."""
        x = self.shape.to_solver(latent)
        return x if self.frame is None else self.frame.enter(x, sigma)
