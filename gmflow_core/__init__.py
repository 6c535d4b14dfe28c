"""GMFlow: Gaussian-mixture flow matching (Chen et al., ICML 2025) in pure torch."""

from .checkpoint import load_checkpoint, read_metadata, save_checkpoint
from .guidance import GuidedMixture, probabilistic_guidance
from .losses import nll, transition_nll
from .mixture import GaussianMixture, IsotropicGaussian
from .path import (
    diffuse,
    flow_sigmas,
    forward_transition,
    posterior,
    posterior_mean,
    reverse_transition,
    velocity_to_x0,
    x0_to_velocity,
)
from .rollout import rollout
from .solvers import denoiser_of, sample_euler, sample_gm_ode, sample_gm_sde, second_order

__all__ = [
    "GaussianMixture",
    "GuidedMixture",
    "IsotropicGaussian",
    "denoiser_of",
    "diffuse",
    "flow_sigmas",
    "forward_transition",
    "load_checkpoint",
    "nll",
    "posterior",
    "posterior_mean",
    "probabilistic_guidance",
    "read_metadata",
    "reverse_transition",
    "rollout",
    "sample_euler",
    "sample_gm_ode",
    "sample_gm_sde",
    "save_checkpoint",
    "second_order",
    "transition_nll",
    "velocity_to_x0",
    "x0_to_velocity",
]
