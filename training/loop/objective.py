"""Compute the losses of image training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gmflow_core.flow.losses import nll, spectral_nll, transition_nll
from gmflow_core.flow.path import diffuse, forward_transition, velocity_to_x0
from gmflow_core.gaussians.mixture import GaussianMixture
from gmflow_core.models.ditdh import DiTDH
from gmflow_core.models.gmdit import GMDiT
from gmflow_core.source.mode_frame import ModeFrame
from training.loop.image_presets import ImageConfig


class Objective(nn.Module):
    """GMFlow's losses of an image network: the transition NLL and the spectral loss.

    With a mixture source whose modes the network knows, the transitions are those of the mode's
    frame, in which the noise is N(0, I) (`ModeFrame`). Losses: Chen et al., ICML 2025.

    Args:
        network: predicts a mixture of velocities.
        config: settings of the losses.
        autocast: creates the context that the network runs in.
    """

    def __init__(self, network: GMDiT | DiTDH, config: ImageConfig, autocast: Callable):
        super().__init__()
        self.network, self.config, self.autocast = network, config, autocast
        self.predict = torch.compile(network.forward) if config.compile else network.forward

    def forward(
        self,
        x0: Tensor,
        labels: Tensor,
        sigma: Tensor,
        noise_low: Tensor,
        noise_high: Tensor,
        moments: tuple[Tensor, Tensor] | None = None,
        weights: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return the losses of a batch.

        Args:
            x0: samples (B, C, h, w).
            labels: (B,), after label dropout.
            sigma: (B,), in [0, 1].
            noise_low: standard normal (B, C, h, w), to reach the lower time of a transition.
            noise_high: standard normal (B, C, h, w), for the transition itself.
            moments: mean (B, C, h, w) and standard deviation (B, ...) of each sample's mode.
            weights: (B,), of the samples in the loss; 1 if None.

        Returns:
            "loss", to minimise; "nll" and, with a spectrum network, "spectral", in nats, averaged
            over batch and pixels and summed over channels; "each" (B,), the NLL of each sample.
        """
        config = self.config
        if config.transition_ratio is None:
            noise = noise_low if moments is None else moments[0] + moments[1] * noise_low
            x = diffuse(x0, sigma, noise)
            velocity = self.mixture(x, sigma, labels)
            each = nll(velocity, noise - x0)
        else:
            frame = None if moments is None else ModeFrame(*moments)
            y0 = x0 if frame is None else frame.enter(x0, 0.0)
            sigma_low = sigma * (1 - config.transition_ratio)
            y_low = diffuse(y0, sigma_low, noise_low)
            y = forward_transition(y_low, sigma_low, sigma, noise_high)
            x = y if frame is None else frame.leave(y, sigma)
            velocity = self.mixture(x, sigma, labels)
            each = transition_nll(
                velocity if frame is None else frame.velocity(velocity), y_low, y, sigma_low, sigma
            )
        each = each.flatten(1).mean(1)
        flow = (each if weights is None else weights * each).mean()
        losses = {"loss": config.loss_weight * flow, "nll": each.mean(), "each": each.detach()}
        if self.network.spectrum_net is not None:
            constant = GaussianMixture(
                velocity.means.detach(), velocity.log_weights.detach(), velocity.log_std.detach()
            )
            log_power = self.network.spectrum_net(velocity_to_x0(constant.moment_match(), x, sigma))
            target = (x - x0) / sigma[:, None, None, None]
            losses["spectral"] = spectral_nll(constant, target, log_power).mean()
            losses["loss"] = losses["loss"] + config.spectral_weight * losses["spectral"]
        return losses

    def mixture(self, x: Tensor, sigma: Tensor, labels: Tensor) -> GaussianMixture:
        """Run the network under autocast; its output is float32, and so is all that follows."""
        with self.autocast():
            return self.predict(x, sigma, labels)
