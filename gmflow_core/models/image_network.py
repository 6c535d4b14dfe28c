"""Parts that all image networks share: settings, size checks, and the mixture at the output."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..flow.policy import DXVelocity
from ..gaussians.mixture import GaussianMixture
from .settings import LARGEST_SAMPLE, MOST_CLASSES, check_dx, check_settings
from .spectrum import SpectrumMLP


def patch_tokens(projection: nn.Conv2d, x: Tensor) -> Tensor:
    """Return the tokens (B, N, width) of images x (B, C, h, w), whose patches a layer projects.

    They are contiguous, as torch.compile needs them on a CPU: torch 2.13's code for bfloat16
    computes NaN from others.
    """
    return projection(x).flatten(2).transpose(1, 2).contiguous()


class ImageConfig:
    """Settings that image networks share; each network's config declares them with its defaults.

    Args:
        num_components: K, at least 1; 1 with a `constant_log_std` is ordinary flow matching.
        channels: C of the latents.
        latent_size: side of the latents in training; smaller latents can be sampled, larger ones
            cannot.
        patch_size: side of a token's patch; divides every latent's sides.
        num_classes: number of labels: classes, or modes of a mixture source.
        log_std_dim: hidden width of the head that predicts the log-std.
        log_std_layers: number of that head's linear layers.
        constant_log_std: fixes the mixture's log-std; None predicts it.
        spectrum_layers: hidden widths of the spectrum network that GM-SDE uses; None: the network
            has none.
        dx_segment: length of the segment of a `DXVelocity` that the network predicts instead of a
            mixture, at `num_components` times; None for a mixture.
        dx_shift: time shift of that policy.
    """

    num_components: int
    channels: int
    latent_size: int
    patch_size: int
    num_classes: int
    log_std_dim: int
    log_std_layers: int
    constant_log_std: float | None
    spectrum_layers: tuple[int, ...] | None
    dx_segment: float | None
    dx_shift: float

    @property
    def tokens(self) -> int:
        """Number of patches of a sample of the size that the network is trained on."""
        return (self.latent_size // self.patch_size) ** 2

    def check(self, *more: str) -> None:
        """Check the shared settings, and that those named in `more` are at least 1.

        Raises:
            ValueError: a value has another type, or is out of range.
        """
        check_settings(self)
        shared = ("num_components", "channels", "latent_size", "patch_size")
        for name in (*shared, "log_std_dim", "log_std_layers", *more):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.num_classes > MOST_CLASSES:
            raise ValueError(f"num_classes is {self.num_classes}; the most is {MOST_CLASSES}")
        if self.channels * self.latent_size**2 > LARGEST_SAMPLE:
            raise ValueError(
                f"channels {self.channels} x latent_size {self.latent_size} squared is more than "
                f"{LARGEST_SAMPLE} numbers for one sample"
            )
        if self.latent_size % self.patch_size:
            raise ValueError(
                f"latent_size {self.latent_size} is not divisible by patch_size {self.patch_size}"
            )
        if any(width < 1 for width in self.spectrum_layers or ()):
            raise ValueError(
                f"spectrum_layers is {list(self.spectrum_layers)}; widths must be at least 1"
            )
        check_dx(self)


class ImageNetwork:
    """Mixin for a network whose `config` is an `ImageConfig` and `gm_out` a `log_std_head`.

    Set `gradient_checkpointing` to compute the blocks again in the backward pass instead of
    keeping their activations.
    """

    config: ImageConfig
    gm_out: nn.ModuleDict
    gradient_checkpointing = False

    @property
    def channels(self) -> int:
        """Channels C of the latents."""
        return self.config.channels

    def check_size(self, shape: torch.Size) -> None:
        """Check that latents of this shape (B, C, h, w) can go through the network.

        Raises:
            ValueError: they cannot.
        """
        config = self.config
        if len(shape) != 4 or shape[1] != config.channels:
            raise ValueError(
                f"{type(self).__name__} works on latents (B, {config.channels}, h, w), "
                f"not {tuple(shape)}"
            )
        height, width = shape[2:]
        patch, most = config.patch_size, config.latent_size
        fits = min(height, width) > 0 and max(height, width) <= most
        if not fits or height % patch or width % patch:
            raise ValueError(
                f"latents of {height} x {width} do not fit this model: sides must be multiples of "
                f"{patch}, up to {most}"
            )

    def run_blocks(self, blocks: nn.ModuleList, tokens: Tensor, *condition: object) -> Tensor:
        """Return the tokens after these blocks, each called as block(tokens, *condition)."""
        for block in blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, *condition, use_reentrant=False)
            else:
                tokens = block(tokens, *condition)
        return tokens

    def mixture(
        self, tokens: Tensor, shape: torch.Size, condition: Tensor
    ) -> GaussianMixture | DXVelocity:
        """Convert output tokens to the mixture of velocities of every latent pixel.

        A network of a DX policy has velocities at K times instead of K means, and no weights.

        Args:
            tokens: (B, N, p * p * V), a patch each, row by row; the V values of a pixel are K
                means of C channels, then K logits of the weights, which may be missing if K = 1.
            shape: (B, C, h, w) of the latents.
            condition: (B, D), for `log_std`.

        Returns:
            means (B, K, C, h, w), log_weights (B, K, 1, h, w), log_std (B, 1, 1, 1, 1); or
            velocities (B, K, C, h, w) of the policy; float32.
        """
        config, patch = self.config, self.config.patch_size
        rows, columns = shape[2] // patch, shape[3] // patch
        output = tokens.float().unflatten(2, (patch, patch, -1)).unflatten(1, (rows, columns))
        output = output.permute(0, 5, 1, 3, 2, 4)  # (B, V, rows, p, columns, p)
        output = output.reshape(len(tokens), -1, *shape[2:])  # (B, V, h, w)
        count = config.num_components * config.channels
        means, logits = output[:, :count], output[:, count:]
        if config.dx_segment is not None:
            velocities = means.unflatten(1, (config.num_components, config.channels))
            return DXVelocity(velocities, config.dx_segment, config.dx_shift)
        if not logits.shape[1]:
            logits = output.new_zeros(len(output), 1, *shape[2:])
        return GaussianMixture(
            means=means.unflatten(1, (config.num_components, config.channels)),
            log_weights=logits.log_softmax(1).unsqueeze(2),
            log_std=self.log_std(condition),
        )

    def log_std(self, condition: Tensor) -> Tensor:
        """Return the log-std of each sample, (B, D) -> (B, 1, 1, 1, 1).

        The condition is detached: the transformer gets no gradient from the log-std.
        """
        constant = self.config.constant_log_std
        if constant is not None:
            log_std = torch.full((1, 1, 1, 1, 1), constant, device=condition.device)
            return log_std.expand(len(condition), -1, -1, -1, -1)
        return self.gm_out["logstd_layers"](condition.detach()).float()[:, :, None, None, None]


def log_std_head(config: ImageConfig, width: int) -> nn.ModuleDict:
    """Build the layers that predict the log-std from a condition of `width` features.

    The dict is empty if the log-std is constant, or if there is none.
    """
    head = nn.ModuleDict()
    if config.constant_log_std is None and config.dx_segment is None:
        widths = [width] + [config.log_std_dim] * (config.log_std_layers - 1) + [1]
        layers = [(nn.SiLU(), nn.Linear(a, b)) for a, b in itertools.pairwise(widths)]
        head["logstd_layers"] = nn.Sequential(*[module for layer in layers for module in layer])
    return head


def spectrum_network(config: ImageConfig) -> SpectrumMLP | None:
    """Build the spectrum network for GM-SDE; None if the config has none."""
    if config.spectrum_layers is None:
        return None
    size = (config.channels, config.latent_size, config.latent_size)
    return SpectrumMLP(size, config.spectrum_layers)
