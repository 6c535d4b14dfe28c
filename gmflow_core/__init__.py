"""GMFlow: Gaussian-mixture flow matching (Chen et al., ICML 2025) in pure torch."""

from .checkpoint import load_checkpoint, read_metadata, save_checkpoint
from .guidance import Guidance, GuidedMixture, classifier_free_guidance, probabilistic_guidance
from .images import class_denoiser, sample_images
from .losses import nll, spectral_nll, transition_nll
from .mixture import GaussianMixture, IsotropicGaussian
from .path import (
    diffuse,
    flow_sigmas,
    forward_transition,
    posterior,
    posterior_mean,
    reverse_transition,
    shift_time,
    unshift_time,
    velocity_to_x0,
    x0_to_velocity,
)
from .policy import DXPolicy, DXVelocity, predict_x0
from .rollout import rollout
from .solvers import (
    denoiser_of,
    sample_dpmpp_2m,
    sample_euler,
    sample_gm_ode,
    sample_gm_policy,
    sample_gm_sde,
    second_order,
)
from .source import GaussianMixtureSource, ModeFrame, load_source, save_source
from .spectral import hartley, sample_with_spectrum

__all__ = [
    "DXPolicy",
    "DXVelocity",
    "GaussianMixture",
    "GaussianMixtureSource",
    "Guidance",
    "GuidedMixture",
    "IsotropicGaussian",
    "ModeFrame",
    "class_denoiser",
    "classifier_free_guidance",
    "denoiser_of",
    "diffuse",
    "flow_sigmas",
    "forward_transition",
    "hartley",
    "load_checkpoint",
    "load_source",
    "nll",
    "posterior",
    "posterior_mean",
    "predict_x0",
    "probabilistic_guidance",
    "read_metadata",
    "reverse_transition",
    "rollout",
    "sample_dpmpp_2m",
    "sample_euler",
    "sample_gm_ode",
    "sample_gm_policy",
    "sample_gm_sde",
    "sample_images",
    "sample_with_spectrum",
    "save_checkpoint",
    "save_source",
    "second_order",
    "shift_time",
    "spectral_nll",
    "transition_nll",
    "unshift_time",
    "velocity_to_x0",
    "x0_to_velocity",
]
