"""GM samplers and GM adapters for pipelines of diffusers; all that imports diffusers to sample.

`GMFlowScheduler` takes the place of FlowMatchEulerDiscreteScheduler in any pipeline of a flow
model. `load_gm_adapter` puts a few-step adapter (pi-Flow, Chen et al. 2025, arXiv 2510.14974;
ArcFlow, Yang et al. 2026, arXiv 2602.09014) on a pipeline of FLUX.1, Qwen-Image or FLUX.2.
"""

from importlib.util import find_spec

if find_spec("diffusers") is None:
    raise ImportError(
        "gmflow_core.diffusers needs diffusers; install it: pip install diffusers transformers"
    )

from .adapter import GMAdapter, load_gm_adapter
from .scheduler import GMFlowScheduler

__all__ = ["GMAdapter", "GMFlowScheduler", "load_gm_adapter"]
