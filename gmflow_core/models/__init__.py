"""Networks, by the class name in a checkpoint's metadata."""

from .ditdh import DiTDH
from .gmdit import GMDiT
from .mlp import GMFlowMLP

MODELS = {cls.__name__: cls for cls in (DiTDH, GMDiT, GMFlowMLP)}
