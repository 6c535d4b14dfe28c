"""The seam to ComfyUI's sampling: the one file that knows its hooks.

A GM model (see `models.py`), or a model with a GM adapter (see `adapters.py`), is an ordinary MODEL. What wants more than its
mean velocity leaves a `MixtureRecorder` in the transformer options of the call (a plain object passes through ComfyUI's copies
of the options by reference); a wrapper around the model finds it there, waits for what the network offers, and hands it over.
Nothing is kept between two calls.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...gmflow_core import GaussianMixture, ModeFrame
from ...gmflow_core.flow.policy import Policy
from .adapter import own_shift
from .latent_shapes import solver_shape
from .notices import notice
from .options import SOURCE, Adapter, adapter_of
from .recording import recording

ROUNDING = 1e-4  # two means that differ by less, relatively, are the same


class MixtureModel:
    """What a solver of gmflow_core needs of the model that ComfyUI hands to a sampler function.

    The solver works in the shape that `solver_shape` says.

    Args:
        model: first argument of the sampler function: it holds the guider, the initial noise and the original latent.
        latent_shape: of the sampler function's x.
        extra_args: of the sampler function.
    """

    def __init__(self, model, latent_shape: torch.Size, extra_args: dict):
        self.model, self.guider, self.latent_shape, self.extra_args = (
            model,
            model.inner_model,
            latent_shape,
            extra_args,
        )
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
        self.frame = conds[0][SOURCE].frame(
            self.latent_shape[0], self.guider.model_patcher.load_device
        )

    def to_solver(self, latent: Tensor, sigma: Tensor | float) -> Tensor:
        """A latent at sigma in the solver's shape and coordinates."""
        x = self.shape.to_solver(latent)
        return x if self.frame is None else self.frame.enter(x, sigma)

    def from_solver(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """The inverse of `to_solver`."""
        return self.shape.from_solver(
            x if self.frame is None else self.frame.leave(x, sigma), self.latent_shape
        )

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
        denoised = self.guider(
            latent, latent_sigma, model_options=options, seed=self.extra_args.get("seed")
        )
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
        mask, options = (
            self.extra_args.get("denoise_mask"),
            self.extra_args.get("model_options", {}),
        )
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
