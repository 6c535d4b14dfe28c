"""MLP for the 2-D experiments: it predicts a mixture of velocities for every point on its own."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..flow.policy import DXVelocity
from ..gaussians.mixture import GaussianMixture
from .position_features import time_features
from .settings import MOST_CLASSES, check_dx, check_settings


@dataclass(frozen=True, kw_only=True)
class GMFlowMLPConfig:
    """Hyperparameters of `GMFlowMLP`.

    Args:
        num_components: K, at least 1; 1 with a `constant_log_std` is ordinary flow matching.
        embed_dim: number of time features and of position features, divisible by 4.
        hidden_dim, num_layers: width and number of hidden layers.
        min_period, max_period: shortest and longest period of the position features, in units of x.
        constant_log_std: fixes the mixture's log-std; None predicts it.
        num_classes: number of labels, such as the modes of a source; 0: the network is
            unconditional.
        dx_segment: length of the segment of a `DXVelocity` that the network predicts instead of a
            mixture, at `num_components` times; None for a mixture.
        dx_shift: time shift of that policy.

    Raises:
        ValueError: a value is out of range.
    """

    num_components: int = 64
    embed_dim: int = 256
    hidden_dim: int = 512
    num_layers: int = 5
    min_period: float = 0.005
    max_period: float = 50.0
    constant_log_std: float | None = None
    num_classes: int = 0
    dx_segment: float | None = None
    dx_shift: float = 1.0

    def __post_init__(self):
        check_settings(self)
        check_dx(self)
        for name in ("num_components", "embed_dim", "hidden_dim", "num_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.embed_dim % 4:
            raise ValueError(
                f"embed_dim is {self.embed_dim}; it must be divisible by 4 (sine and cosine of x "
                "and y)"
            )
        if not 0 <= self.num_classes <= MOST_CLASSES:
            raise ValueError(
                f"num_classes is {self.num_classes}; it must be from 0 to {MOST_CLASSES}"
            )
        if not 0 < self.min_period < self.max_period:
            raise ValueError(f"periods must satisfy 0 < {self.min_period} < {self.max_period}")


class GMFlowMLP(nn.Module):
    """GMFlow's toy network: position and time features, SiLU layers, a head per parameter.

    Parameters are named as in the reference implementation (`net.N`, `out_means`,
    `out_logweights`, `out_logstds`).
    """

    channels = 2
    Config = GMFlowMLPConfig

    def __init__(self, config: GMFlowMLPConfig = GMFlowMLPConfig()):
        super().__init__()
        self.config = config
        inputs = (3 if config.num_classes else 2) * config.embed_dim
        widths = [inputs] + [config.hidden_dim] * config.num_layers
        layers = [(nn.Linear(a, b), nn.SiLU()) for a, b in itertools.pairwise(widths)]
        self.net = nn.Sequential(*[module for layer in layers for module in layer])
        self.out_means = nn.Linear(config.hidden_dim, 2 * config.num_components)
        mixture = config.dx_segment is None
        if mixture:
            self.out_logweights = nn.Linear(config.hidden_dim, config.num_components)
        if mixture and config.constant_log_std is None:
            self.out_logstds = nn.Linear(config.hidden_dim, 1)
        if config.num_classes:
            self.embed_labels = nn.Embedding(config.num_classes, config.embed_dim)
        self.reset_parameters()

    def reset_parameters(self):
        """Initialise with Kaiming weights; mixture weights are equal and log-std is 0 at first."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)
        if self.config.dx_segment is not None:
            return
        nn.init.zeros_(self.out_logweights.weight)
        if self.config.constant_log_std is None:
            nn.init.zeros_(self.out_logstds.weight)

    def forward(
        self, x: Tensor, sigma: Tensor, labels: Tensor | None = None
    ) -> GaussianMixture | DXVelocity:
        """Predict the mixture of velocities, or a DX policy (see `GMFlowMLPConfig.dx_segment`).

        Args:
            x: (B, 2, *S) noisy points; every position of *S is a point of its own.
            sigma: (B,) or a scalar, in [0, 1].
            labels: (B,) integers below `num_classes`; None for an unconditional network.

        Returns:
            means (B, K, 2, *S), log_weights (B, K, 1, *S), log_std (B, 1, 1, *S); or velocities
            (B, K, 2, *S) of a policy; float32.

        Raises:
            ValueError: x does not have two channels; labels are missing, or not expected.
        """
        if x.ndim < 2 or x.shape[1] != self.channels:
            raise ValueError(
                f"GMFlowMLP works on 2-D points: x must be (B, 2, ...), not {tuple(x.shape)}"
            )
        if (labels is None) != (self.config.num_classes == 0):
            came = "no labels came" if labels is None else "labels came"
            raise ValueError(
                f"this GMFlowMLP knows {self.config.num_classes} labels, but {came}; "
                "they belong together"
            )
        points = x.movedim(1, -1)  # (B, *S, 2)
        sigma = torch.as_tensor(sigma, device=x.device).expand(x.shape[0])
        time = time_features(sigma, self.config.embed_dim, include_end=True)  # (B, E)
        if labels is not None:
            time = torch.cat([time, self.embed_labels(labels).to(time)], -1)  # (B, 2 E)
        time = time.reshape(x.shape[0], *[1] * (x.ndim - 2), -1).expand(*points.shape[:-1], -1)
        features = torch.cat([time, self.position_features(points)], -1)
        hidden = self.net(features.to(self.out_means.weight.dtype))  # (B, *S, H)
        means = self.out_means(hidden).float().unflatten(-1, (-1, 2)).movedim((-2, -1), (1, 2))
        if self.config.dx_segment is not None:
            return DXVelocity(means, self.config.dx_segment, self.config.dx_shift)
        log_weights = self.out_logweights(hidden).float().log_softmax(-1)
        log_weights = log_weights.movedim(-1, 1).unsqueeze(2)
        if self.config.constant_log_std is None:
            log_std = self.out_logstds(hidden).float().movedim(-1, 1).unsqueeze(2)
        else:
            log_std = means.new_full([1] * means.ndim, self.config.constant_log_std)
        return GaussianMixture(means, log_weights, log_std)

    def position_features(self, points: Tensor) -> Tensor:
        """Return sines, then cosines, of each coordinate, (..., 2) -> (..., E).

        The periods are spaced geometrically from `min_period` to `max_period`.
        """
        c = self.config
        log_period = torch.linspace(
            math.log(c.min_period), math.log(c.max_period), c.embed_dim // 4, device=points.device
        )
        angle = points.float().unsqueeze(-1) * (2 * math.pi / log_period.exp())  # (..., 2, E / 4)
        return torch.cat([angle.sin(), angle.cos()], -1).flatten(-2)
