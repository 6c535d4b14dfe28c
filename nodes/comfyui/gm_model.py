"""GM networks as ordinary MODELs: stock samplers run on them and see the mean velocity."""

from __future__ import annotations

from typing import Any

import comfy.supported_models_base
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

from ...gmflow_core import GaussianMixture
from ...gmflow_core.models import GMFlowMLP
from .latent_shapes import to_latent, to_points
from .noise_check import check_noise
from .options import LABELS, NO_CLASS, RECORDER, SOURCE
from .recording import add_recording, is_awaited, offer

CHUNK = 8_192  # points that go through a 2-D network at a time: few enough for the cache


class GMNetwork(nn.Module):
    """A network that predicts mixtures as a ComfyUI diffusion model: it gives the mean velocity, and offers the mixture.

    Args:
        network: one of `gmflow_core.models`.
        data: what its samples are, see `gmflow_core.save_checkpoint`.
    """

    of_points = False  # whether every latent pixel is a sample of its own

    def __init__(self, network: nn.Module, data: dict[str, Any]):
        super().__init__()
        self.network = network
        self.label_names: list[str] = (
            data.get("labels") or []
        )  # of its classes, by number; empty if unknown
        self.source: dict[str, Any] | None = data.get("source")
        self.dtype = next(network.parameters()).dtype

    @property
    def spectrum(self) -> nn.Module | None:
        """The spectrum network of GM-SDE, if the model has one."""
        return getattr(self.network, "spectrum_net", None)

    def forward(
        self, x: Tensor, timesteps: Tensor, transformer_options: dict | None = None, **conds
    ) -> Tensor:
        """Mean velocity (B, C, H, W) at x and sigma = timesteps (B,)."""
        mean, mixture = self.predict(x, timesteps, conds, keep=is_awaited())
        if mixture is not None:
            offer(mixture)
        return mean

    def predict(
        self, x: Tensor, sigma: Tensor, conds: dict, keep: bool
    ) -> tuple[Tensor, GaussianMixture | None]:
        """The mean velocity, and, if it is to be kept, the mixture in a solver's shape."""
        raise NotImplementedError

    def check_conds(self, noise: Tensor, **conds) -> dict[str, comfy.conds.CONDRegular]:
        """What of a conditioning `predict` gets, checked before sampling starts.

        Args:
            noise: in the latents' shape.
        """
        return {}


class PointNetwork(GMNetwork):
    """A network of 2-D points: a latent (B, 2, H, W) is B * H * W points, and the mixture is (B * H * W, K, 2)."""

    of_points = True

    def predict(
        self, x: Tensor, sigma: Tensor, conds: dict, keep: bool
    ) -> tuple[Tensor, GaussianMixture | None]:
        sigma = sigma.repeat_interleave(x[0, 0].numel())
        means, mixtures = [], []
        for piece, s in zip(to_points(x).split(CHUNK), sigma.split(CHUNK), strict=True):
            mixture = self.network(piece, s)
            means.append(mixture.mean())
            if keep:
                mixtures.append(
                    (mixture.means, mixture.log_weights, mixture.log_std.expand(len(piece), 1, 1))
                )
        mean = to_latent(torch.cat(means), x.shape)
        return mean, GaussianMixture(*map(torch.cat, zip(*mixtures, strict=True))) if keep else None


class ImageNetwork(GMNetwork):
    """A network of images, of classes or modes if it knows any."""

    def predict(
        self, x: Tensor, sigma: Tensor, conds: dict, keep: bool
    ) -> tuple[Tensor, GaussianMixture | None]:
        mixture = self.network(x, sigma, conds.get("labels"))
        return mixture.mean(), mixture

    def check_conds(self, noise: Tensor, **conds) -> dict[str, comfy.conds.CONDRegular]:
        """The labels, as `predict` wants them.

        Raises:
            ValueError: there are none, or they do not fit the model or the batch; or the latents do not fit the model.
        """
        use = "'GM Class Labels' with this model gives a conditioning and a latent that fit"
        try:
            self.network.check_size(noise.shape)
        except ValueError as error:
            raise ValueError(f"{error}. {use}") from error
        labels, num_classes = conds.get(LABELS), self.network.config.num_classes
        self.check_source(conds.get(SOURCE))
        if not num_classes:
            return {}
        if labels is None:
            raise ValueError(
                f"this model generates classes, and the {conds.get('prompt_type', '')} conditioning holds no class labels "
                "(text says nothing to it); connect 'GM Class Labels', or 'GM Unconditional' for no class"
            )
        mark = conds.get("cross_attn")
        if mark is not None and not mark.any():  # ConditioningZeroOut
            labels = torch.full_like(labels, NO_CLASS)
        elif mark is not None and mark.shape[1] != 1:
            raise ValueError(
                "class labels cannot be concatenated or combined with text; give 'GM Class Labels' all the labels, one per line"
            )
        told_modes = (
            self.source is not None and self.source["conditioning"] == "mode"
        )  # which are never dropped in training
        if (told_modes or not getattr(self.network.config, "null_class", True)) and (
            labels == NO_CLASS
        ).any():
            raise ValueError(
                "this model was trained without a label for none: there is no negative conditioning for it. Use Basic Guider, "
                "or 'Autoguidance' with a weaker model"
            )
        if not NO_CLASS <= int(labels.min()) <= int(labels.max()) < num_classes:
            raise ValueError(
                f"labels {labels.tolist()} do not fit a model of {num_classes} classes. {use}"
            )
        if noise.shape[0] % len(labels):
            raise ValueError(
                f"{len(labels)} labels do not fit a batch of {noise.shape[0]} latents: its size must be {len(labels)} or a "
                f"multiple. {use}"
            )
        return {
            "labels": comfy.conds.CONDRegular(torch.where(labels == NO_CLASS, num_classes, labels))
        }

    def check_source(self, noise: Any) -> None:
        """
        Raises:
            ValueError: a conditioning names modes of a source, and the network was not trained to know them.
        """
        if noise is None:
            return
        if self.source is None or self.source["conditioning"] != "mode":
            raise ValueError(
                "the conditioning names modes of a mixture source, and this model was not trained to know them; connect 'GM "
                "Class Labels' or 'GM Unconditional' instead"
                + (
                    " (the noise may stay: the model was trained with a mixture source)"
                    if self.source
                    else ""
                )
            )
        noise.source.require_record(self.source, "this model")


class PointLatent(comfy.latent_formats.LatentFormat):
    """Two channels, x and y; previews show them as colours."""

    latent_channels = 2

    def __init__(self):
        self.latent_rgb_factors = [[0.25, 0.0, 0.1], [0.0, 0.25, 0.1]]


class PixelLatent(comfy.latent_formats.LatentFormat):
    """Pixels in [-1, 1] as they are; previews show the first three channels."""

    def __init__(self, channels: int):
        self.latent_channels = channels
        self.latent_rgb_factors = (
            torch.eye(channels, 3).tolist() if channels > 1 else [[1.0, 1.0, 1.0]]
        )


class GMModelConfig(comfy.supported_models_base.BASE):
    """What ComfyUI wants to know of a GM model: a rectified flow in sigma, in float32 whatever the weights are."""

    unet_config = {}
    unet_extra_config = {}
    sampling_settings = {"shift": 1.0, "multiplier": 1.0}
    manual_cast_dtype = torch.float32
    memory_usage_factor = 0.25

    def __init__(self, latent_format: comfy.latent_formats.LatentFormat):
        super().__init__(self.unet_config)
        self.latent_format = latent_format


class GMModel(comfy.model_base.BaseModel):
    """ComfyUI's model around a `GMNetwork`."""

    def process_timestep(self, timestep: Tensor, **kwargs) -> Tensor:
        """The sigma behind a timestep: nodes that patch the time shift in (ModelSamplingSD3) bring units of their own."""
        return timestep / getattr(self.model_sampling, "multiplier", 1.0)

    def extra_conds(self, **conds) -> dict[str, comfy.conds.CONDRegular]:
        """What of a conditioning reaches the network."""
        return self.diffusion_model.check_conds(**conds)


def gm_model(
    network: nn.Module, data: dict[str, Any] | None = None
) -> comfy.model_patcher.ModelPatcher:
    """An ordinary MODEL around a network of `gmflow_core.models`.

    Args:
        data: what its samples are, see `gmflow_core.save_checkpoint`.

    Raises:
        ValueError: they are of a kind that is unknown here.
    """
    data = data or {}
    if isinstance(network, GMFlowMLP):
        latent_format, wrapped = PointLatent(), PointNetwork(network, data)
    else:
        latent_format, wrapped = image_latent(network.channels, data), ImageNetwork(network, data)
    flow = comfy.model_base.ModelType.FLOW
    model = GMModel(
        GMModelConfig(latent_format), model_type=flow, unet_model=lambda **settings: wrapped
    )
    patcher = comfy.model_patcher.ModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
    add_recording(patcher)
    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, RECORDER, check_noise)
    return patcher


def image_latent(channels: int, data: dict[str, Any]) -> comfy.latent_formats.LatentFormat:
    """The latent format of an image model: Stable Diffusion's, with which the stock VAE nodes work; or as they are, pixels and
    the latents of representation autoencoders."""
    space = data.get("space") or ("sd-vae" if channels == 4 else "pixels")
    if space in ("pixels", "rae"):
        return PixelLatent(channels)
    if space == "sd-vae" and channels == 4:
        return comfy.latent_formats.SD15(data.get("scaling_factor", 0.18215))
    raise ValueError(
        f"the checkpoint's samples are {space!r} with {channels} channels; this version knows 'pixels', 'rae', and 'sd-vae' "
        "with 4 channels; update GMFlow"
    )
