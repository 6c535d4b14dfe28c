"""GMFlow: Gaussian-mixture flow matching (Chen et al., ICML 2025) in pure torch.

Time is sigma in [0, 1], 0 for data and 1 for noise: x_sigma = (1 - sigma) x_0 + sigma eps, and the
velocity is u = eps - x_0. Networks predict a `GaussianMixture` of u. A denoiser is any callable
(x, sigma) -> `GaussianMixture` of x_0; the samplers integrate it from noise to data:

    network, config = load_checkpoint("model.safetensors")
    x = sample_gm_ode(denoiser_of(network), noise, flow_sigmas(8))
"""

from .files.adapter_metadata import AdapterFacts, read_adapter_facts, write_adapter
from .files.checkpoint import load_checkpoint, read_metadata, save_checkpoint
from .flow.losses import nll, spectral_nll, transition_nll
from .flow.path import (
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
from .flow.policy import ArcPolicy, ArcVelocity, DXPolicy, DXVelocity, predict_x0
from .flow.single_gaussian import single_gaussian
from .gaussians.distributions import from_distribution, to_distribution
from .gaussians.divergence import entropy, entropy_bounds, kl_bounds, kl_divergence
from .gaussians.mixture import GaussianMixture, IsotropicGaussian, Mixture, TiltedMixture
from .gaussians.products import log_overlap, mixture_product, reduce_components
from .gaussians.spectral import hartley, sample_with_spectrum, spectral_log_prob
from .pipeline import ImagePipeline
from .sampling.denoisers import class_denoiser, denoiser_of, reversed_time
from .sampling.guidance import Guidance, classifier_free_guidance, probabilistic_guidance
from .sampling.images import sample_images
from .sampling.likelihood import log_likelihood
from .sampling.multistep import sample_dpmpp_2m, sample_uni_pc
from .sampling.rollout import rollout
from .sampling.second_order import second_order
from .sampling.solvers import sample_euler, sample_gm_ode, sample_gm_policy, sample_gm_sde
from .sampling.trajectory import Trajectory
from .source.files import load_source, save_source
from .source.mode_frame import ModeFrame
from .source.source import GaussianMixtureSource

GuidedMixture = TiltedMixture  # what guidance returns

__all__ = [
    "AdapterFacts",
    "ArcPolicy",
    "ArcVelocity",
    "DXPolicy",
    "DXVelocity",
    "GaussianMixture",
    "GaussianMixtureSource",
    "Guidance",
    "GuidedMixture",
    "ImagePipeline",
    "IsotropicGaussian",
    "Mixture",
    "ModeFrame",
    "TiltedMixture",
    "Trajectory",
    "class_denoiser",
    "classifier_free_guidance",
    "denoiser_of",
    "diffuse",
    "entropy",
    "entropy_bounds",
    "flow_sigmas",
    "forward_transition",
    "from_distribution",
    "hartley",
    "kl_bounds",
    "kl_divergence",
    "load_checkpoint",
    "load_source",
    "log_likelihood",
    "log_overlap",
    "mixture_product",
    "nll",
    "posterior",
    "posterior_mean",
    "predict_x0",
    "probabilistic_guidance",
    "read_adapter_facts",
    "read_metadata",
    "reduce_components",
    "reverse_transition",
    "reversed_time",
    "rollout",
    "sample_dpmpp_2m",
    "sample_euler",
    "sample_gm_ode",
    "sample_gm_policy",
    "sample_gm_sde",
    "sample_images",
    "sample_uni_pc",
    "sample_with_spectrum",
    "save_checkpoint",
    "save_source",
    "second_order",
    "shift_time",
    "single_gaussian",
    "spectral_log_prob",
    "spectral_nll",
    "to_distribution",
    "transition_nll",
    "unshift_time",
    "velocity_to_x0",
    "write_adapter",
    "x0_to_velocity",
]
