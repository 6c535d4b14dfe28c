"""GM networks as ordinary MODELs: stock samplers run on them and see the mean velocity."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models_base
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

from ...gmflow_core import load_checkpoint, read_metadata
from ...gmflow_core.files.errors import FileError, printable, quoted
from ...gmflow_core.models import GMFlowMLP
from .gm_network import ImageNetwork, PointNetwork
from .guard import guarded
from .latent_shapes import to_points
from .model_folders import remember_names
from .noise_check import check_noise
from .previews import add_previews, density_of, pixel_grid
from .recording import RECORDER, add_recording

ANY_SIZE = 1e32  # as ComfyUI says "all of it" in bytes
SMALL = 100e6  # parameters below which fp32 costs little
DTYPES = {"default": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class PointLatent(comfy.latent_formats.LatentFormat):
    """Latents of two channels, x and y: every pixel is a point."""

    latent_channels = 2

    def picture(self, latent: Tensor) -> Tensor:
        """Draw latents (B, 2, *S) as one picture of their density, (H, W, 3) in [0, 1]."""
        return density_of(to_points(latent))


class PixelLatent(comfy.latent_formats.LatentFormat):
    """Images themselves, in [-1, 1], of one or three channels."""

    def __init__(self, channels: int):
        self.latent_channels = channels

    def picture(self, latent: Tensor) -> Tensor:
        """Draw images (B, C, h, w) side by side, each pixel as a square: (H, W, 3) in [0, 1]."""
        return pixel_grid(latent)


class PlainLatent(comfy.latent_formats.LatentFormat):
    """Latents that are not rescaled; previews show the first three channels."""

    def __init__(self, channels: int):
        self.latent_channels = channels
        self.latent_rgb_factors = torch.eye(channels, 3).tolist()


class GMModelConfig(comfy.supported_models_base.BASE):
    """ComfyUI's settings for a GM model: a rectified flow in sigma, computed in float32."""

    unet_config = {}
    unet_extra_config = {}
    sampling_settings = {"shift": 1.0, "multiplier": 1.0}
    manual_cast_dtype = torch.float32
    memory_usage_factor = 0.25  # ComfyUI wants one; GMModel has its own estimate

    def __init__(self, latent_format: comfy.latent_formats.LatentFormat):
        super().__init__(self.unet_config)
        self.latent_format = latent_format


class GMModel(comfy.model_base.BaseModel):
    """ComfyUI's model around a `GMNetwork`."""

    def process_timestep(self, timestep: Tensor, **kwargs) -> Tensor:
        """Return the sigma of a timestep.

        Nodes that set the time shift (ModelSamplingSD3) bring their own unit of time.
        """
        return timestep / getattr(self.model_sampling, "multiplier", 1.0)

    def memory_required(
        self, input_shape: Sequence[int], cond_shapes: dict[str, Any] | None = None
    ) -> float:
        """Return an estimate of the bytes that sampling latents of a shape needs."""
        return self.diffusion_model.memory_for(input_shape)

    @guarded
    def extra_conds(self, **conds) -> dict[str, comfy.conds.CONDRegular]:
        """Return the part of a conditioning that reaches the network."""
        return self.diffusion_model.check_conds(**conds)

    def state_dict_for_saving(self, *args, **kwargs):
        """Refuse to be saved by ComfyUI's nodes.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "a GM model cannot be saved by ComfyUI's nodes, as nothing could load that file: keep "
            "the checkpoint that GM Load Model reads"
        )


class WholePatcher(comfy.model_patcher.ModelPatcher):
    """ComfyUI's patcher of a GM model, which is on its device as a whole or not at all.

    Where memory is short, ComfyUI leaves weights in main memory, for layers of its own to fetch in
    each call. The networks of gmflow_core have torch's layers, which would meet inputs on the GPU.
    """

    def partially_load(self, device_to, extra_memory: float = 0, **options) -> float:
        """Load all weights, whatever memory ComfyUI has for them."""
        return super().partially_load(device_to, ANY_SIZE, **options)

    def partially_unload(self, device_to, memory_to_free: float = 0, **options) -> float:
        """Free nothing, upon which ComfyUI unloads the whole model."""
        return 0


def load_gm_model(source: str, weight_dtype: str = "default") -> comfy.model_patcher.ModelPatcher:
    """Load a checkpoint as an ordinary MODEL, and remember the names of its classes.

    Args:
        source: a path or hub id, see `load_checkpoint`.
        weight_dtype: one of DTYPES; by default the stored type, or float32 for small models.

    Raises:
        ValueError: the checkpoint cannot be loaded.
    """
    where = "" if os.path.exists(source) else " from the Hugging Face hub"
    logging.info("GMFlow: loading %s%s", printable(source), where)
    data = read_metadata(source)["data"]
    network, _ = load_checkpoint(source, dtype=DTYPES[weight_dtype])
    if weight_dtype == "default" and sum(p.numel() for p in network.parameters()) < SMALL:
        network = network.float()
    remember_names(data.get("labels") or [])
    try:
        return gm_model(network, data)
    except ValueError as error:
        raise FileError(source, f"cannot be used: {error}", "") from error


def gm_model(
    network: nn.Module, data: dict[str, Any] | None = None
) -> comfy.model_patcher.ModelPatcher:
    """Return an ordinary MODEL around a network of `gmflow_core.models`.

    Args:
        data: a record of its samples, see `gmflow_core.save_checkpoint`.

    Raises:
        ValueError: the samples are of an unknown kind.
    """
    data = data or {}
    if isinstance(network, GMFlowMLP):
        latent_format, wrapped = PointLatent(), PointNetwork(network, data)
    else:
        latent_format, wrapped = image_latent(network.channels, data), ImageNetwork(network, data)
    flow = comfy.model_base.ModelType.FLOW
    config = GMModelConfig(latent_format)
    few_steps = data.get("few_steps") or {}
    config.sampling_settings = {"shift": few_steps.get("shift", 1.0), "multiplier": 1.0}
    model = GMModel(config, model_type=flow, unet_model=lambda **settings: wrapped)
    # the schedule `gm` reads it there
    model.model_sampling.final_step_size = few_steps.get("final_step_size", 1.0)
    patcher = WholePatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
    add_recording(patcher)
    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, RECORDER, check_noise)
    if hasattr(latent_format, "picture"):
        add_previews(patcher)
    return patcher


def image_latent(channels: int, data: dict[str, Any]) -> comfy.latent_formats.LatentFormat:
    """Return the latent format of an image model.

    It is that of Stable Diffusion, which the stock VAE nodes fit; pixels, and latents of
    representation autoencoders, are not rescaled.

    Raises:
        ValueError: the samples are of an unknown kind.
    """
    space = data.get("space") or ("sd-vae" if channels == 4 else "pixels")
    if space == "pixels" and channels in (1, 3):
        return PixelLatent(channels)
    if space in ("pixels", "rae"):
        return PlainLatent(channels)
    if space == "sd-vae" and channels == 4:
        return comfy.latent_formats.SD15(data.get("scaling_factor", 0.18215))
    raise ValueError(
        f"this version does not know its samples, {quoted(space)} with {channels} channels, only "
        "'pixels', 'rae', and 'sd-vae' with 4 channels; update GMFlow"
    )
