"""Nodes that load a 16-bit diffusion model in 8 bit, and save it.

ComfyUI builds a network out of the layers of an *operations* class. The class handed over here has a `Linear` that rounds
its weight to int8 while the state dict is being loaded, one layer at a time (`gmflow_core.quantize` has the arithmetic).
Where ComfyUI has an int8 layout of its own (0.27 and newer), its `Linear` keeps the weight, so its memory manager, LoRA and
saving are ComfyUI's own; elsewhere `Int8Linear` does. Both read and write the same files, ComfyUI's `int8_tensorwise`.
"""

from __future__ import annotations

import logging
import os

import comfy.utils
import folder_paths
from comfy_api.latest import io
from safetensors.torch import save_file

from .comfyui.int8_files import load_8bit, saved_state
from .comfyui.int8_layers import COMPUTE

FOLDER = "diffusion_models"


class GMFlowLoadDiffusionModel8bit(io.ComfyNode):
    """A diffusion model with int8 weights."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GMFlowLoadDiffusionModel8bit",
            display_name="Load Diffusion Model (8-bit)",
            category="GMFlow",
            description="Loads the bf16 or fp16 file of a diffusion model (FLUX.1, Qwen-Image, and other transformers) with "
            "half the memory: the linear layers of its blocks are rounded to int8, one by one, as the file is read. The "
            "MODEL is an ordinary one: LoRA, samplers and offloading work as with Load Diffusion Model.",
            inputs=[
                io.Combo.Input(
                    "unet_name",
                    options=folder_paths.get_filename_list(FOLDER),
                    tooltip="The bf16 or fp16 file, from models/diffusion_models; or one saved by Save Diffusion Model "
                    "(8-bit). fp8 and GGUF files are quantised already and have loaders of their own.",
                ),
                io.Combo.Input(
                    "compute",
                    options=list(COMPUTE),
                    default="16 bit",
                    optional=True,
                    tooltip="16 bit: weights are expanded layer by layer, activations stay as they are; the most precise. "
                    "int8: activations are rounded to int8 as well; faster where the device has fast int8 arithmetic, "
                    "and the error is about 1.2 times as large, still well below that of fp8 weights.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="An ordinary MODEL with int8 weights.")],
        )

    @classmethod
    def validate_inputs(cls, unet_name: str | None = None) -> bool | str:
        """The file must exist; older versions of ComfyUI do not look. A name that comes over a wire is not known yet."""
        if unet_name is None or folder_paths.get_full_path(FOLDER, unet_name):
            return True
        return f"there is no file {unet_name!r} in {folder_paths.get_folder_paths(FOLDER)}; put it there and press R"

    @classmethod
    def fingerprint_inputs(cls, unet_name: str | None, compute: str = "16 bit") -> list:
        """A file that was replaced is loaded again."""
        if unet_name is None:
            return []
        stat = os.stat(folder_paths.get_full_path_or_raise(FOLDER, unet_name))
        return [unet_name, compute, stat.st_mtime, stat.st_size]

    @classmethod
    def execute(cls, unet_name: str, compute: str = "16 bit") -> io.NodeOutput:
        return io.NodeOutput(
            load_8bit(folder_paths.get_full_path_or_raise(FOLDER, unet_name), compute)
        )


class GMFlowSaveDiffusionModel8bit(io.ComfyNode):
    """An 8-bit diffusion model as a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GMFlowSaveDiffusionModel8bit",
            display_name="Save Diffusion Model (8-bit)",
            category="GMFlow",
            description="Saves a model loaded by Load Diffusion Model (8-bit), with the LoRAs that are on it, in ComfyUI's "
            "int8 layout. Load Diffusion Model (8-bit) reads it in any version; ComfyUI 0.27 and newer also with Load "
            "Diffusion Model.",
            inputs=[
                io.Model.Input("model", tooltip="A model in 8 bit, from before GM Adapter."),
                io.String.Input(
                    "filename_prefix",
                    default="diffusion_models/ComfyUI_int8",
                    tooltip="Below ComfyUI's output folder; files in its subfolder diffusion_models appear in the loaders.",
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, model: comfy.model_patcher.ModelPatcher, filename_prefix: str
    ) -> io.NodeOutput:
        folder, name, counter, _, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory()
        )
        path = os.path.join(folder, f"{name}_{counter:05}_.safetensors")
        state = {key: weight.contiguous() for key, weight in saved_state(model).items()}
        save_file(state, path, metadata={"format": "pt"})
        logging.info("GMFlow: saved %s, %.2f GB", path, os.path.getsize(path) / 1e9)
        return io.NodeOutput(ui={"text": [path]})
