"""The networks, by the class name that a checkpoint's metadata carries."""

from .ditdh import DiTDH
from .gmdit import GMDiT
from .mlp import GMFlowMLP

MODELS = {cls.__name__: cls for cls in (DiTDH, GMDiT, GMFlowMLP)}
