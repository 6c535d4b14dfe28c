"""The seam to ComfyUI: the one file that knows its hooks.

A GM model is an ordinary MODEL: every stock sampler and guider runs on it and sees the mean velocity. A sampler of ours
leaves a `MixtureRecorder` in the transformer options of the call; the network finds it there and hands it the whole
mixture (a plain object passes through ComfyUI's copies of the options by reference).
"""

from __future__ import annotations

import logging

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models_base
import torch
from torch import Tensor, nn

from ..gmflow_core import GaussianMixture, velocity_to_x0

RECORDER = "gmflow_mixture_recorder"  # key in transformer_options
CHUNK = 8_192  # points that go through a 2-D network at a time: few enough for the cache
PARTIAL = ("area", "mask", "timestep_start", "timestep_end")  # what limits a conditioning to a part of the latent or the steps


class MixtureRecorder:
    """Collects the mixtures of velocities that one call of a guider makes, by the conditioning they belong to."""

    def __init__(self):
        self.mixtures: dict[object, list[GaussianMixture]] = {}

    def record(self, mixture: GaussianMixture, transformer_options: dict) -> None:
        """Split a network's output, whose batch (log_std's too) holds an equal chunk for each conditioning, by cond uuid."""
        uuids = transformer_options["uuids"]
        fields = (mixture.means, mixture.log_weights, mixture.log_std)
        for uuid, *chunk in zip(uuids, *[t.chunk(len(uuids)) for t in fields], strict=True):
            self.mixtures.setdefault(uuid, []).append(GaussianMixture(*chunk))


class PointNetwork(nn.Module):
    """A network of 2-D points as a ComfyUI diffusion model: a latent (B, 2, H, W) is B * H * W points."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.dtype = next(network.parameters()).dtype

    def forward(self, x: Tensor, timesteps: Tensor, transformer_options: dict | None = None, **kwargs) -> Tensor:
        """Mean velocity (B, 2, H, W) at x and sigma = timesteps (B,). The mixture of the points, (B * H * W, K, 2), goes to
        the recorder, if there is one."""
        recorder = (transformer_options or {}).get(RECORDER)
        sigma = timesteps.repeat_interleave(x[0, 0].numel())
        means, mixtures = [], []
        for piece, s in zip(to_points(x).split(CHUNK), sigma.split(CHUNK), strict=True):
            mixture = self.network(piece, s)
            means.append(mixture.mean())
            if recorder is not None:
                mixtures.append((mixture.means, mixture.log_weights, mixture.log_std.expand(len(piece), 1, 1)))
        if recorder is not None:
            recorder.record(GaussianMixture(*map(torch.cat, zip(*mixtures, strict=True))), transformer_options)
        return to_latent(torch.cat(means), x.shape)


def to_points(latent: Tensor) -> Tensor:
    """(B, 2, *S) -> (B * numel(S), 2)."""
    return latent.movedim(1, -1).reshape(-1, latent.shape[1])


def to_latent(points: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `to_points` for a latent of that shape."""
    return points.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


class PointLatent(comfy.latent_formats.LatentFormat):
    """Two channels, x and y; previews show them as colours."""

    latent_channels = 2

    def __init__(self):
        self.latent_rgb_factors = [[0.25, 0.0, 0.1], [0.0, 0.25, 0.1]]


class PointModelConfig(comfy.supported_models_base.BASE):
    """What ComfyUI wants to know of a 2-D model: a rectified flow in sigma, float32, two channels."""

    unet_config = {"disable_unet_model_creation": True}
    unet_extra_config = {}
    sampling_settings = {"shift": 1.0, "multiplier": 1.0}
    latent_format = PointLatent
    supported_inference_dtypes = [torch.float32]
    memory_usage_factor = 1.0


class PointModel(comfy.model_base.BaseModel):
    """ComfyUI's model around a `PointNetwork`."""

    def process_timestep(self, timestep: Tensor, **kwargs) -> Tensor:
        """The sigma behind a timestep: nodes that patch the time shift in (ModelSamplingSD3) bring units of their own."""
        return timestep / getattr(self.model_sampling, "multiplier", 1.0)


def point_model(network: nn.Module) -> comfy.model_patcher.ModelPatcher:
    """An ordinary MODEL around a network of 2-D points."""
    config = PointModelConfig(PointModelConfig.unet_config)
    model = PointModel(config, model_type=comfy.model_base.ModelType.FLOW)
    model.diffusion_model = PointNetwork(network)
    return comfy.model_patcher.ModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


class MixtureModel:
    """What a solver of gmflow_core needs of the model that ComfyUI hands to a sampler function.

    For a 2-D model the solver works on points (B * H * W, 2), as every point is a sample of its own.

    Args:
        model: first argument of the sampler function: it holds the guider, and applies the noise mask to what it is given.
        latent_shape: of the sampler function's x.
        extra_args: of the sampler function.
    """

    def __init__(self, model, latent_shape: torch.Size, extra_args: dict):
        self.model, self.guider, self.latent_shape, self.extra_args = model, model.inner_model, latent_shape, extra_args
        self.of_points = isinstance(self.guider.inner_model.diffusion_model, PointNetwork)
        if getattr(self.guider, "cfg", 1.0) != 1.0:
            logging.info("GMFlow: GM samplers follow the positive conditioning; classifier-free guidance is not applied")

    def to_solver(self, latent: Tensor) -> Tensor:
        """A latent in the solver's shape."""
        return to_points(latent) if self.of_points else latent

    def from_solver(self, x: Tensor) -> Tensor:
        """The inverse of `to_solver`."""
        return to_latent(x, self.latent_shape) if self.of_points else x

    def denoise(self, x: Tensor, sigma: Tensor) -> GaussianMixture:
        """The mixture of x_0 for the positive conditioning; a denoiser for gmflow_core.

        Raises:
            ValueError: the model predicts no mixture, or the positive conditioning is not a single whole one.
        """
        uuid = self._positive_uuid()
        recorder = MixtureRecorder()
        options = self.extra_args.get("model_options", {})
        options = {**options, "transformer_options": {**options.get("transformer_options", {}), RECORDER: recorder}}
        latent_sigma = sigma[:1].expand(self.latent_shape[0])
        self.model(self.from_solver(x), latent_sigma, **{**self.extra_args, "model_options": options})
        if not recorder.mixtures:
            raise ValueError(
                "GM samplers need a model that predicts a Gaussian mixture, and this one does not; load one with "
                "'Load GM Model', or use a stock sampler"
            )
        (mixture,) = recorder.mixtures[uuid]
        return velocity_to_x0(mixture, x, sigma)

    def _positive_uuid(self) -> object:
        """The uuid of the positive conditioning, which must be a single one for the whole latent and all times."""
        conds = getattr(self.guider, "conds", {}).get("positive") or []
        partial = [key for cond in conds for key in PARTIAL if cond.get(key) is not None]
        if len(conds) != 1 or partial:
            raise ValueError(
                "GM samplers need one positive conditioning for the whole latent and all steps; found "
                f"{len(conds)}{' with ' + ', '.join(partial) if partial else ''}. Remove area, mask, timestep range and "
                "combine nodes, or use a stock sampler"
            )
        return conds[0]["uuid"]

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
