"""Nodes of the extension, as ComfyUI lists them."""

from comfy_api.latest import ComfyExtension, io
from typing_extensions import override

from .adapters import GMFlowAdaptedModel, GMFlowAdapter, GMFlowAdapterInfo
from .comfyui.guard import guarded_node
from .comfyui.model_folders import register_folders
from .comfyui.moved_in import register_replacements
from .comfyui.notices import register_route
from .comfyui.stock_lists import add_to_stock_lists
from .compare import GMFlowCompare, GMFlowSeedSpread
from .conditioning import GMFlowClassLabels, GMFlowUnconditional
from .eight_bit import GMFlowLoadDiffusionModel8bit, GMFlowSaveDiffusionModel8bit
from .guidance import GMFlowAutoguidance, GMFlowGuider, GMFlowProbabilisticGuidance
from .inspector import GMFlowInspector
from .loaders import GMFlowLoader
from .mixture_source import GMFlowSourceLoader, GMFlowSourceNoise
from .moved_in import GMFlowPiFlowSampler
from .plain_models import GMFlowSpread
from .samplers import (
    GMFlowODESampler,
    GMFlowPolicySampler,
    GMFlowPolicySigmas,
    GMFlowSampler,
    GMFlowSDESampler,
    GMFlowSigmas,
)
from .training import GMFlowTrainAdapter
from .views import GMFlowDensity, GMFlowPixels

NODES = [
    guarded_node(node)
    for node in (
        GMFlowLoader,
        GMFlowSampler,
        GMFlowODESampler,
        GMFlowSDESampler,
        GMFlowPolicySampler,
        GMFlowSigmas,
        GMFlowPolicySigmas,
        GMFlowSpread,
        GMFlowAdapter,
        GMFlowAdaptedModel,
        GMFlowAdapterInfo,
        GMFlowTrainAdapter,
        GMFlowPiFlowSampler,
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
        GMFlowInspector,
        GMFlowCompare,
        GMFlowSeedSpread,
    )
]


class GMFlowExtension(ComfyExtension):
    """GMFlow as a ComfyUI extension."""

    @override
    async def on_load(self) -> None:
        """Offer our nodes for those of ComfyUI-piFlow; older versions of ComfyUI never call it."""
        await register_replacements()

    @override
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Register model folders, the page's messages and stock names; return the node classes."""
        register_folders()  # here, as older versions never call on_load
        register_route()
        add_to_stock_lists()
        return list(NODES)
