"""What image networks have in common behind their last layer: tokens become a mixture of velocities for every latent pixel."""

from __future__ import annotations

import itertools
from typing import Protocol

import torch
from torch import Tensor, nn

from ..gaussians.mixture import GaussianMixture


class OutputConfig(Protocol):
    """What `MixtureOutput` reads of a network's config; see `GMDiTConfig`."""

    num_components: int
    channels: int
    latent_size: int
    patch_size: int
    log_std_dim: int
    log_std_layers: int
    constant_log_std: float | None


class MixtureOutput:
    """Mixed into a network whose `config` is an `OutputConfig`, and whose `gm_out` is what `log_std_head` makes."""

    config: OutputConfig
    gm_out: nn.ModuleDict

    @property
    def channels(self) -> int:
        """C."""
        return self.config.channels

    def check_size(self, shape: torch.Size) -> None:
        """
        Raises:
            ValueError: latents of this shape (B, C, h, w) cannot go through the network.
        """
        config = self.config
        if len(shape) != 4 or shape[1] != config.channels:
            raise ValueError(
                f"{type(self).__name__} works on latents (B, {config.channels}, h, w), not {tuple(shape)}"
            )
        if (
            max(shape[2:]) > config.latent_size
            or shape[2] % config.patch_size
            or shape[3] % config.patch_size
        ):
            raise ValueError(
                f"latents of {shape[2]} x {shape[3]} do not fit this model: sides must be multiples of "
                f"{config.patch_size}, up to {config.latent_size}"
            )

    def mixture(self, tokens: Tensor, shape: torch.Size, condition: Tensor) -> GaussianMixture:
        """The mixture of velocities: means (B, K, C, h, w), log_weights (B, K, 1, h, w), log_std (B, 1, 1, 1, 1); float32.

        Args:
            tokens: (B, N, p * p * V), a patch each, row by row; the V values of a pixel are K means of C channels, then K
                logits of the weights, which may be missing if K = 1.
            shape: (B, C, h, w) of the latents.
            condition: (B, D), for `log_std`.
        """
        config, patch = self.config, self.config.patch_size
        rows, columns = shape[2] // patch, shape[3] // patch
        output = tokens.float().unflatten(2, (patch, patch, -1)).unflatten(1, (rows, columns))
        output = output.permute(0, 5, 1, 3, 2, 4).reshape(
            len(tokens), -1, *shape[2:]
        )  # (B, V, h, w)
        count = config.num_components * config.channels
        means, logits = output[:, :count], output[:, count:]
        if not logits.shape[1]:
            logits = output.new_zeros(len(output), 1, *shape[2:])
        return GaussianMixture(
            means=means.unflatten(1, (config.num_components, config.channels)),
            log_weights=logits.log_softmax(1).unsqueeze(2),
            log_std=self.log_std(condition),
        )

    def log_std(self, condition: Tensor) -> Tensor:
        """(B, D) -> (B, 1, 1, 1, 1); the transformer learns nothing from it."""
        if self.config.constant_log_std is not None:
            return torch.full(
                (1, 1, 1, 1, 1), self.config.constant_log_std, device=condition.device
            ).expand(len(condition), -1, -1, -1, -1)
        return self.gm_out["logstd_layers"](condition.detach()).float()[:, :, None, None, None]


def log_std_head(config: OutputConfig, width: int) -> nn.ModuleDict:
    """The layers that predict the log-std from a condition of that width; none if it is constant."""
    head = nn.ModuleDict()
    if config.constant_log_std is None:
        widths = [width] + [config.log_std_dim] * (config.log_std_layers - 1) + [1]
        layers = [(nn.SiLU(), nn.Linear(a, b)) for a, b in itertools.pairwise(widths)]
        head["logstd_layers"] = nn.Sequential(*[module for layer in layers for module in layer])
    return head
