"""The extension's nodes."""

from comfy_api.latest import ComfyExtension, io
from typing_extensions import override

from .adapters import GMFlowAdapter
from .autoguidance import GMFlowAutoguidance
from .conditioning import GMFlowClassLabels, GMFlowUnconditional
from .guidance import GMFlowGuider, GMFlowProbabilisticGuidance
from .loaders import GMFlowLoader, register_model_folder
from .quantized import GMFlowLoadDiffusionModel8bit, GMFlowSaveDiffusionModel8bit
from .samplers import (
    GMFlowODESampler,
    GMFlowPolicySampler,
    GMFlowPolicySigmas,
    GMFlowSampler,
    GMFlowSDESampler,
    GMFlowSigmas,
)
from .sources import GMFlowSourceLoader, GMFlowSourceNoise, register_source_folder
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
