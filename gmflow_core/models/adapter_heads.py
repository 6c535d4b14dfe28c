"""Heads that take the place of a flow transformer's last layers, so that it predicts a policy instead of one velocity.

Names and shapes are those of the published adapters (pi-Flow, Chen et al. 2025, arXiv 2510.14974), whose weights are a LoRA and
one of these heads. A head knows nothing of the transformer in front of it but its tokens and its conditioning embedding.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..flow.policy import DXVelocity
from ..gaussians.mixture import GaussianMixture
from .state_dict import check_shapes, shapes_of

EPS = 1e-6  # of the last layer norm


@dataclass(frozen=True)
class HeadLayout:
    """What a token of a base model stands for: patch x patch pixels of an image of `channels` channels, in the order (c, p, p).

    Args:
        channels: C of the mixture.
        patch: pixels a side.
        folded: how many of them the base model's own latents hold in their channels, a side: 1, or `patch` for bases such as
            FLUX.2, whose latents are (C patch^2, h, w), a token for each pixel.
        modulation_bias: whether the base model's last adaptive norm has a bias.
    """

    channels: int
    patch: int = 2
    folded: int = 1
    modulation_bias: bool = True

    @property
    def width(self) -> int:
        """Values in a token."""
        return self.channels * self.patch**2

    def image_size(self, latent_shape: tuple[int, ...]) -> tuple[int, ...]:
        """*S of the mixture for latents of shape (B, C', *S')."""
        *frames, height, width = latent_shape[2:]
        return (*frames, height * self.folded, width * self.folded)

    def unfold(self, latent: Tensor) -> Tensor:
        """A latent (B, C', *S') in the mixture's shape (B, C, *S)."""
        return F.pixel_shuffle(latent, self.folded)

    def fold(self, image: Tensor) -> Tensor:
        """The inverse of `unfold`."""
        return F.pixel_unshuffle(image, self.folded)

    def to_image(self, tokens: Tensor, size: tuple[int, ...]) -> Tensor:
        """(..., N, patch^2) -> (..., *size): the pixels of the first tokens in their places; what goes beyond an odd size, and
        further tokens (of reference images), is dropped."""
        *frames, height, width = size
        rows, columns = math.ceil(height / self.patch), math.ceil(width / self.patch)
        lead, count = tokens.shape[:-2], math.prod(frames) * rows * columns
        patches = tokens[..., :count, :].reshape(
            *lead, *frames, rows, columns, self.patch, self.patch
        )
        image = patches.transpose(-3, -2).reshape(
            *lead, *frames, rows * self.patch, columns * self.patch
        )
        return image[..., :height, :width]

    def to_tokens(self, values: Tensor) -> Tensor:
        """(B, C, N, patch^2) -> (B, N, C patch^2), as the base model gives its tokens on."""
        return values.transpose(1, 2).flatten(2)


class Head(nn.Module):
    """What the heads share: the adaptive layer norm before the projections.

    Weights are cast to the type and device of the tokens in each call: the base model may compute in any, and live on the GPU
    while the head still waits on the CPU.

    Args:
        width: D of the transformer.
    """

    def __init__(self, width: int, layout: HeadLayout):
        super().__init__()
        self.width, self.layout = width, layout
        self.norm_out = nn.ModuleDict(
            {"linear": nn.Linear(width, 2 * width, bias=layout.modulation_bias)}
        )

    def modulated(self, tokens: Tensor, embedding: Tensor) -> Tensor:
        """The tokens (B, N, D), normalised, then scaled and shifted by the embedding (B, D)."""
        scale, shift = _linear(self.norm_out["linear"], F.silu(embedding)).unsqueeze(1).chunk(2, -1)
        return F.layer_norm(tokens, (self.width,), eps=EPS) * (1 + scale) + shift


class GMHead(Head):
    """Predicts the mixture of velocities of every pixel.

    Args:
        num_gaussians: K.
        log_std_widths: of the hidden layers between the embedding and the standard deviation, which is one per image.
    """

    def __init__(
        self,
        width: int,
        layout: HeadLayout,
        num_gaussians: int,
        log_std_widths: tuple[int, ...] = (1024,),
    ):
        super().__init__(width, layout)
        self.num_gaussians = num_gaussians
        self.proj_out_means = nn.Linear(width, num_gaussians * layout.width)
        self.proj_out_logweights = nn.Linear(width, num_gaussians * layout.patch**2)
        sizes = (width, *log_std_widths, 1)
        layers = [(nn.SiLU(), nn.Linear(a, b)) for a, b in itertools.pairwise(sizes)]
        self.proj_out_logstds = nn.Sequential(*(module for pair in layers for module in pair))

    def forward(self, tokens: Tensor, embedding: Tensor) -> GaussianMixture:
        """The mixture of velocities with the space dimensions (N, patch^2), in float32.

        Args:
            tokens: (B, N, D).
            embedding: (B, D), of time and the like.
        """
        modulated = self.modulated(tokens, embedding)
        batch, count, _ = modulated.shape
        split = (batch, count, self.num_gaussians, -1, self.layout.patch**2)
        means = _linear(self.proj_out_means, modulated).reshape(split)
        log_weights = (
            _linear(self.proj_out_logweights, modulated).reshape(split).float().log_softmax(2)
        )
        log_std = embedding
        for layer in self.proj_out_logstds:
            log_std = F.silu(log_std) if isinstance(layer, nn.SiLU) else _linear(layer, log_std)
        places = (0, 2, 3, 1, 4)  # (B, N, K, C, p^2) -> (B, K, C, N, p^2)
        return GaussianMixture(
            means.permute(places), log_weights.permute(places), log_std.reshape(batch, 1, 1, 1, 1)
        )

    def to_image(self, mixture: GaussianMixture, size: tuple[int, ...]) -> GaussianMixture:
        """What `forward` gave, as a mixture of images (B, K, C, *size)."""
        means, log_weights = (
            self.layout.to_image(t, size) for t in (mixture.means, mixture.log_weights)
        )
        return GaussianMixture(
            means, log_weights, mixture.log_std.reshape(-1, 1, 1, *[1] * len(size))
        )


class DXHead(Head):
    """Predicts velocities at N times (pi-Flow's DX policy).

    Args:
        settings: keyword arguments for `DXVelocity`.
    """

    def __init__(self, width: int, layout: HeadLayout, num_times: int, settings: dict):
        super().__init__(width, layout)
        self.num_times, self.settings = num_times, settings
        self.proj_out = nn.Linear(width, num_times * layout.width)

    def forward(self, tokens: Tensor, embedding: Tensor) -> DXVelocity:
        """The velocities, with the space dimensions (N, patch^2); arguments as for `GMHead`."""
        velocities = _linear(self.proj_out, self.modulated(tokens, embedding))
        velocities = velocities.reshape(
            *velocities.shape[:2], self.num_times, -1, self.layout.patch**2
        )
        return DXVelocity(velocities.permute(0, 2, 3, 1, 4), **self.settings)

    def to_image(self, velocity: DXVelocity, size: tuple[int, ...]) -> DXVelocity:
        """What `forward` gave, as images (B, N, C, *size)."""
        return DXVelocity(self.layout.to_image(velocity.velocities, size), **self.settings)


HEAD_NAMES = (
    "norm_out.",
    "proj_out.",
    "proj_out_means.",
    "proj_out_logweights.",
    "proj_out_logstds.",
)


def is_head_key(name: str) -> bool:
    """Whether a tensor of an adapter belongs to its head, not to its LoRA."""
    return name.startswith(HEAD_NAMES) and "lora" not in name


def build_head(
    tensors: Mapping[str, Tensor], policy: Mapping[str, object], layout: HeadLayout, width: int
) -> Head:
    """The head of an adapter, with copies of its tensors, in their own type.

    Args:
        tensors: of the adapter; those that belong to no head are ignored.
        policy: what the adapter's metadata say of its policy: `type` "GMFlow", or "DX" with the settings of `DXVelocity`.
        layout, width: of the base model.

    Raises:
        ValueError: the policy is unknown; tensors are missing, too many, or of a shape that does not fit the base model; the
            message names them.
    """
    found = {name: tensor for name, tensor in tensors.items() if is_head_key(name)}
    kind, settings = (
        policy.get("type", "GMFlow"),
        {name: value for name, value in policy.items() if name != "type"},
    )
    with torch.device("meta"):
        if kind == "GMFlow":
            count = _groups(found, "proj_out_logweights", layout.patch**2)
            parts = {
                name.split(".")[1]: t.shape[0]
                for name, t in found.items()
                if name.startswith("proj_out_logstds.")
            }
            rows = {int(part): size for part, size in parts.items() if part.isdigit()}
            hidden = tuple(rows[index] for index in sorted(rows)[:-1]) if rows else (1024,)
            head = GMHead(width, layout, count, hidden)
        elif kind == "DX":
            try:
                DXVelocity(torch.empty(0), **settings)
            except TypeError:
                raise ValueError(
                    f"the adapter's DX policy has settings {settings}; this version knows segment_size, shift and mode; update "
                    "GMFlow"
                ) from None
            head = DXHead(width, layout, _groups(found, "proj_out", layout.width), settings)
        else:
            raise ValueError(
                f"the adapter's policy is {dict(policy)}; this version knows GMFlow and DX; update GMFlow"
            )
    check_shapes(
        shapes_of(head.state_dict()),
        shapes_of(found),
        f"a base model of width {width} with tokens of {layout.width} values",
        source=f"the adapter's {kind} head",
        advice="the file is damaged, or made for another base model",
    )
    head.load_state_dict({name: tensor.clone() for name, tensor in found.items()}, assign=True)
    return head.eval().requires_grad_(False)


def _groups(tensors: Mapping[str, Tensor], name: str, size: int) -> int:
    """Return how many groups of `size` outputs a projection has; 1 if the adapter lacks it."""
    found = [tensors[key] for key in (f"{name}.weight", f"{name}.bias") if key in tensors]
    return max(1, len(found[0]) // size) if found else 1


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer in the type and on the device of x."""
    return F.linear(x, layer.weight.to(x), None if layer.bias is None else layer.bias.to(x))
