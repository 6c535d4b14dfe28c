"""GM networks as ComfyUI diffusion models: they return a mean velocity, and offer the mixture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import comfy.conds
import torch
from torch import Tensor, nn

from ...gmflow_core import DXVelocity, GaussianMixture
from ...gmflow_core.files.errors import quoted
from ...gmflow_core.flow.policy import PolicyVelocity
from .adapter_info import Student
from .label_conditioning import LABELS, NO_CLASS, SOURCE, problem_of
from .latent_shapes import to_latent, to_points
from .recording import is_awaited, offer

CHUNK = 8_192  # points in one call of a 2-D network: few enough for the CPU's cache
FLOAT = 4  # bytes
MIXTURES = 4  # tensors of that size that a solver holds at once: 2 to 3, counted on the CPU
HOW_TO_FIT = "'GM Class Labels' with this model gives a conditioning and a latent that fit"


class GMNetwork(nn.Module):
    """A network that predicts mixtures, as a ComfyUI diffusion model.

    Args:
        network: one of `gmflow_core.models`.
        data: a record of its samples, see `gmflow_core.save_checkpoint`.
    """

    of_points = False  # True if every latent pixel is a sample of its own
    wide = 24  # tensors as wide as the network in a call: 14 in GM-DiT, 22 in DiT-DH, counted

    def __init__(self, network: nn.Module, data: dict[str, Any]):
        super().__init__()
        self.network = network
        self.label_names: list[str] = data.get("labels") or []  # by number; empty if unknown
        self.source: dict[str, Any] | None = data.get("source")
        few_steps = data.get("few_steps")
        self.student = None if few_steps is None else Student.of_record(few_steps)
        self.dtype = next(network.parameters()).dtype
        # nodes such as RenormCFG read these of every network
        self.in_channels = self.out_channels = 2 if self.of_points else network.channels

    @property
    def takes_labels(self) -> bool:
        """True if the network is conditioned on classes or modes."""
        config = getattr(self.network, "config", None)
        return not self.of_points and bool(getattr(config, "num_classes", 0))

    @property
    def spectrum(self) -> nn.Module | None:
        """Spectrum network of GM-SDE, if the model has one."""
        return getattr(self.network, "spectrum_net", None)

    def forward(
        self, x: Tensor, timesteps: Tensor, transformer_options: dict | None = None, **conds
    ) -> Tensor:
        """Return the mean velocity (B, C, H, W) at x and sigma = timesteps (B,)."""
        mean, mixture = self.predict(x, timesteps, conds, keep=is_awaited())
        if mixture is not None:
            offer(mixture)
        return mean

    def predict(
        self, x: Tensor, sigma: Tensor, conds: dict, keep: bool
    ) -> tuple[Tensor, PolicyVelocity | None]:
        """Return the mean velocity, and, if `keep`, the whole prediction in the solver's shape."""
        raise NotImplementedError

    def memory_for(self, shape: Sequence[int]) -> float:
        """Return an estimate of the bytes that sampling latents of a shape (B, C, *S) needs."""
        config, pixels = self.network.config, shape[0] * math.prod(shape[2:])
        mixture = config.num_components * (self.in_channels + 1)
        return FLOAT * (self.wide * self.width_for(pixels) + MIXTURES * mixture * pixels)

    def width_for(self, pixels: int) -> float:
        """Return the size of the widest tensor of all samples or tokens that are computed at once.

        Args:
            pixels: of the whole batch of latents.
        """
        raise NotImplementedError

    def check_conds(self, noise: Tensor, **conds) -> dict[str, comfy.conds.CONDRegular]:
        """Check a conditioning before sampling starts, and return what `predict` gets of it.

        Args:
            noise: in the latents' shape.
        """
        return {}


class PointNetwork(GMNetwork):
    """A network of 2-D points: a latent (B, 2, H, W) is B * H * W points.

    A mixture is (B * H * W, K, 2).
    """

    of_points = True
    wide = 6  # counted: 5

    def width_for(self, pixels: int) -> float:
        return min(pixels, CHUNK) * self.network.config.hidden_dim

    def predict(
        self, x: Tensor, sigma: Tensor, conds: dict, keep: bool
    ) -> tuple[Tensor, PolicyVelocity | None]:
        sigma = sigma.repeat_interleave(x[0, 0].numel())
        means, found = [], []
        for piece, s in zip(to_points(x).split(CHUNK), sigma.split(CHUNK), strict=True):
            velocity = self.network(piece, s)
            means.append(velocity.mean())
            if keep:
                found.append(velocity)
        return to_latent(torch.cat(means), x.shape), joined(found) if keep else None


def joined(velocities: list[PolicyVelocity]) -> PolicyVelocity:
    """Return the velocities of pieces of a batch of points, (n, ...) each, as one."""
    if isinstance(velocities[0], DXVelocity):
        return replace(velocities[0], velocities=torch.cat([v.velocities for v in velocities]))
    parts = ((v.means, v.log_weights, v.log_std.expand(len(v.means), 1, 1)) for v in velocities)
    return GaussianMixture(*map(torch.cat, zip(*parts, strict=True)))


class ImageNetwork(GMNetwork):
    """A network of images, conditioned on classes or modes if it was trained with any."""

    def width_for(self, pixels: int) -> float:
        config = self.network.config
        widths = (getattr(config, name, 0) for name in ("width", "trunk_width", "head_width"))
        return pixels / config.patch_size**2 * max(widths)

    def predict(
        self, x: Tensor, sigma: Tensor, conds: dict, keep: bool
    ) -> tuple[Tensor, PolicyVelocity | None]:
        mixture = self.network(x, sigma, conds.get("labels"))
        return mixture.mean(), mixture

    @property
    def knows_modes(self) -> bool:
        """True if the labels are the modes of a mixture source, which training never drops."""
        return self.source is not None and self.source["conditioning"] == "mode"

    def check_conds(self, noise: Tensor, **conds) -> dict[str, comfy.conds.CONDRegular]:
        """Check latents and labels, and return the labels as `predict` takes them.

        Raises:
            ValueError: there are no labels; or labels or latents do not fit the model or the batch.
        """
        try:
            self.network.check_size(noise.shape)
        except ValueError as error:
            raise ValueError(f"{error}. {HOW_TO_FIT}") from error
        problem = problem_of(conds)
        if problem:
            raise ValueError(f"the conditioning is damaged: its {problem}. {HOW_TO_FIT}")
        self.check_source(conds.get(SOURCE))
        num_classes = self.network.config.num_classes
        if not num_classes:
            return {}
        labels = self.labels_of(conds)
        self.check_labels(labels, batch=noise.shape[0])
        labels = torch.where(labels == NO_CLASS, num_classes, labels)
        return {"labels": comfy.conds.CONDRegular(labels)}

    def labels_of(self, conds: dict) -> Tensor:
        """Return a conditioning's labels (n,).

        Raises:
            ValueError: it has none, or text beside them.
        """
        labels, tensor = conds.get(LABELS), conds.get("cross_attn")
        if labels is None:
            raise ValueError(
                f"no class labels in the {conds.get('prompt_type', '')} conditioning: this model "
                "generates classes, and ignores text; connect 'GM Class Labels', or 'GM "
                "Unconditional' for no class"
            )
        if tensor is not None and not tensor.any():  # ConditioningZeroOut
            return torch.full_like(labels, NO_CLASS)
        if tensor is not None and tensor.shape[1] != 1:
            raise ValueError(
                "class labels cannot be concatenated or combined with text; give 'GM Class Labels' "
                "all the labels, one per line"
            )
        return labels

    def check_labels(self, labels: Tensor, batch: int) -> None:
        """Check that labels fit the model, and a batch of that size.

        Raises:
            ValueError: they do not.
        """
        num_classes = self.network.config.num_classes
        has_null_class = getattr(self.network.config, "null_class", True) and not self.knows_modes
        if not has_null_class and (labels == NO_CLASS).any():
            raise ValueError(
                "no negative conditioning fits this model: it was trained without a label for no "
                "class; use Basic Guider, or GM Autoguidance with a weaker model"
            )
        if not NO_CLASS <= int(labels.min()) <= int(labels.max()) < num_classes:
            raise ValueError(
                f"labels {quoted(labels.tolist())} do not fit a model of {num_classes} classes. "
                f"{HOW_TO_FIT}"
            )
        if batch % len(labels):
            raise ValueError(
                f"{len(labels)} labels do not fit a batch of {batch} latents: its size must be "
                f"{len(labels)} or a multiple. {HOW_TO_FIT}"
            )

    def check_source(self, noise: Any) -> None:
        """Check that the model was trained with the source whose modes a conditioning names.

        Args:
            noise: the SourceNoise in the conditioning, None if it names no modes.

        Raises:
            ValueError: it was not.
        """
        if noise is None:
            return
        if not self.knows_modes:
            remark = " (the noise may stay: the model was trained with a mixture source)"
            raise ValueError(
                "this model does not know modes: the conditioning names those of a mixture source, "
                "and it was not trained with them; connect 'GM Class Labels' or 'GM Unconditional' "
                "instead"
                f"{remark if self.source else ''}"
            )
        noise.source.require_record(self.source, "this model")
