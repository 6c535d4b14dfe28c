"""Nodes that load GM models."""

from __future__ import annotations

import os

import folder_paths
from comfy_api.latest import io

from ..gmflow_core.checkpoint import SHIPPED, load_checkpoint
from .seam import point_model

FOLDER = "gmflow"


def register_model_folder() -> None:
    """Make the `gmflow` folders known to ComfyUI, in this order: those of extra_model_paths.yaml (there already),
    models/gmflow, the shipped models."""
    default = os.path.join(folder_paths.models_dir, FOLDER)
    os.makedirs(default, exist_ok=True)
    for path in (default, str(SHIPPED)):
        folder_paths.add_model_folder_path(FOLDER, path)
    paths, _ = folder_paths.folder_names_and_paths[FOLDER]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, folder_paths.supported_pt_extensions)


class GMFlowLoader(io.ComfyNode):
    """A GM checkpoint as a MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GMFlowLoader",
            display_name="Load GM Model",
            category="GMFlow",
            description="Loads a model that predicts a Gaussian mixture. The MODEL is an ordinary one: stock samplers run on "
            "it and follow the mixture's mean; the GM samplers use the whole mixture.",
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=folder_paths.get_filename_list(FOLDER),
                    tooltip="A checkpoint from the models/gmflow folder (or the gmflow folders of extra_model_paths.yaml), or "
                    "one that comes with the extension: checkerboard_k64. What `python -m training.checkerboard` "
                    "writes can be copied there as it is.",
                )
            ],
            outputs=[io.Model.Output(tooltip="For the GM samplers, or any stock sampler.")],
        )

    @classmethod
    def fingerprint_inputs(cls, model_name: str) -> tuple[float, int]:
        """A file that was trained on is loaded again."""
        stat = os.stat(folder_paths.get_full_path_or_raise(FOLDER, model_name))
        return stat.st_mtime, stat.st_size

    @classmethod
    def execute(cls, model_name: str) -> io.NodeOutput:
        network, _ = load_checkpoint(folder_paths.get_full_path_or_raise(FOLDER, model_name))
        return io.NodeOutput(point_model(network))
