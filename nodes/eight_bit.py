"""Nodes that load a 16-bit diffusion model in 8 bit, and save it."""

from __future__ import annotations

import logging
import os

import folder_paths
from comfy_api.latest import io

from .comfyui.files import fingerprint
from .comfyui.int8_files import load_8bit, new_path, save_8bit
from .comfyui.int8_layers import COMPUTE
from .comfyui.model_folders import DIFFUSION_MODELS, find_diffusion_model
from .comfyui.notices import notice
from .comfyui.schema import node_schema


class GMFlowLoadDiffusionModel8bit(io.ComfyNode):
    """A node that loads a diffusion model with int8 weights."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="GMFlowLoadDiffusionModel8bit",
            display_name="GM Load Diffusion Model (8-bit)",
            category="GMFlow/loaders",
            aliases="int8, 8 bit, quantize, quantization, load diffusion model, unet loader, "
            "flux, qwen, low vram",
            description="Loads the bf16 or fp16 file of a diffusion model (FLUX.1, Qwen-Image, and "
            "other transformers) with half the memory: the linear layers of its blocks are rounded "
            "to int8, one by one, as the file is read. The MODEL is an ordinary one: LoRA, "
            "samplers and offloading work as with Load Diffusion Model.",
            inputs=[
                io.Combo.Input(
                    "unet_name",
                    options=folder_paths.get_filename_list(DIFFUSION_MODELS),
                    tooltip="The bf16 or fp16 file, from models/diffusion_models; or one saved by "
                    "GM Save Diffusion Model (8-bit). fp8 and GGUF files are quantised already and "
                    "have loaders of their own.",
                ),
                io.Combo.Input(
                    "compute",
                    options=list(COMPUTE),
                    default="16 bit",
                    optional=True,
                    tooltip="16 bit: weights are expanded layer by layer, activations stay as they "
                    "are; the most precise. int8: activations are rounded to int8 as well; faster "
                    "on devices with fast int8 arithmetic, and the error is about 1.2 times as "
                    "large, still well below that of fp8 weights.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="An ordinary MODEL with int8 weights.")],
        )

    @classmethod
    def validate_inputs(cls, unet_name: str | None = None) -> bool | str:
        """Check that the file exists, as older versions of ComfyUI do not.

        A linked name is not known yet.
        """
        if unet_name is not None:
            find_diffusion_model(unet_name)
        return True

    @classmethod
    def fingerprint_inputs(cls, unet_name: str | None, compute: str = "16 bit") -> list:
        """Return what changes when the file is replaced."""
        if unet_name is None:
            return []
        return [unet_name, compute, *fingerprint(find_diffusion_model(unet_name))]

    @classmethod
    def execute(cls, unet_name: str, compute: str = "16 bit") -> io.NodeOutput:
        return io.NodeOutput(load_8bit(find_diffusion_model(unet_name), compute))


class GMFlowSaveDiffusionModel8bit(io.ComfyNode):
    """A node that saves an 8-bit diffusion model as a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="GMFlowSaveDiffusionModel8bit",
            display_name="GM Save Diffusion Model (8-bit)",
            category="GMFlow/loaders",
            aliases="int8, 8 bit, quantize, quantization, save model, export",
            description="Saves a model of GM Load Diffusion Model (8-bit), with the LoRAs on it, "
            "in ComfyUI's int8 layout. GM Load Diffusion Model (8-bit) reads it in any version; "
            "in ComfyUI 0.27 and newer, Load Diffusion Model reads it too.",
            inputs=[
                io.Model.Input("model", tooltip="A model in 8 bit, from before GM Adapter."),
                io.String.Input(
                    "filename_prefix",
                    default="diffusion_models/ComfyUI_int8",
                    tooltip="Path below ComfyUI's output folder; files in its subfolder "
                    "diffusion_models appear in the loaders.",
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, filename_prefix: str) -> io.NodeOutput:
        path = new_path(filename_prefix)
        save_8bit(model, path)
        where = os.path.relpath(path, os.path.dirname(folder_paths.get_output_directory()))
        notice(f"saved: {where} ({os.path.getsize(path) / 1e9:.2f} GB)", logging.INFO)
        return io.NodeOutput(ui={"text": [where]})
