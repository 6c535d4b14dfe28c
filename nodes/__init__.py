"""The extension's nodes."""

from comfy_api.latest import ComfyExtension, io
from typing_extensions import override

from .adapters import GMFlowAdapter
from .comfyui.model_folders import register_model_folder
from .comfyui.source_noise import register_source_folder
from .conditioning import GMFlowClassLabels, GMFlowUnconditional
from .eight_bit import GMFlowLoadDiffusionModel8bit, GMFlowSaveDiffusionModel8bit
from .guidance import GMFlowAutoguidance, GMFlowGuider, GMFlowProbabilisticGuidance
from .loaders import GMFlowLoader
from .mixture_source import GMFlowSourceLoader, GMFlowSourceNoise
from .samplers import (
    GMFlowODESampler,
    GMFlowPolicySampler,
    GMFlowPolicySigmas,
    GMFlowSampler,
    GMFlowSDESampler,
    GMFlowSigmas,
)
from .views import GMFlowDensity, GMFlowPixels


class GMFlowExtension(ComfyExtension):
    """What ComfyUI asks the extension for."""

    @override
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        register_model_folder()  # here, as older versions never call on_load
        register_source_folder()
        return [
            GMFlowLoader,
            GMFlowSampler,
            GMFlowODESampler,
            GMFlowSDESampler,
            GMFlowPolicySampler,
            GMFlowSigmas,
            GMFlowPolicySigmas,
            GMFlowAdapter,
            GMFlowLoadDiffusionModel8bit,
            GMFlowSaveDiffusionModel8bit,
            GMFlowClassLabels,
            GMFlowUnconditional,
            GMFlowGuider,
            GMFlowProbabilisticGuidance,
            GMFlowAutoguidance,
            GMFlowSourceLoader,
            GMFlowSourceNoise,
            GMFlowDensity,
            GMFlowPixels,
        ]
