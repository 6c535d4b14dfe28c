"""Heads of adapters: they replace a flow transformer's last layers, so that it predicts a policy.

Names and shapes are those of the published adapters (pi-Flow, Chen et al. 2025, arXiv 2510.14974;
ArcFlow, Yang et al. 2026, arXiv 2602.09014), whose weights are a LoRA and one of these heads. A
head sees only the transformer's tokens and its conditioning embedding.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..flow.policy import ArcVelocity, DXVelocity
from ..gaussians.mixture import GaussianMixture
from .position_features import time_features
from .state_dict import check_shapes, shapes_of

EPS = 1e-6  # epsilon of the last layer norm
TIME_FEATURES = 64  # of sigma, for heads that see no embedding


@dataclass(frozen=True)
class HeadLayout:
    """Layout of a base model's tokens: each is patch x patch pixels of C channels, order (c, p, p).

    Args:
        channels: C of the mixture.
        patch: pixels a side of a token.
        folded: pixels a side that a pixel of the base model's own latents holds in its channels:
            1, or `patch` for bases such as FLUX.2, whose latents are (C patch^2, h, w), a token
            for each pixel.
        modulation_bias: the base model's last adaptive norm has a bias.
        linear_only: the head takes the place of the base model's last linear layer alone, and sees
            tokens that are normalised and modulated already; its standard deviation then depends
            on sigma alone.
        channels_last: the base model's tokens have the order (p, p, c).
        negative: the base model's network returns the negative of its last layer's output.
    """

    channels: int
    patch: int = 2
    folded: int = 1
    modulation_bias: bool = True
    linear_only: bool = False
    channels_last: bool = False
    negative: bool = False

    @property
    def width(self) -> int:
        """Number of values in a token."""
        return self.channels * self.patch**2

    def image_size(self, latent_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return *S of the mixture for latents of shape (B, C', *S')."""
        *frames, height, width = latent_shape[2:]
        return (*frames, height * self.folded, width * self.folded)

    def unfold(self, latent: Tensor) -> Tensor:
        """Convert a latent (B, C', *S') to the mixture's shape (B, C, *S)."""
        return F.pixel_shuffle(latent, self.folded)

    def fold(self, image: Tensor) -> Tensor:
        """Invert `unfold`."""
        return F.pixel_unshuffle(image, self.folded)

    def count_tokens(self, size: tuple[int, ...]) -> int:
        """Return the number of tokens of an image (*size)."""
        *frames, height, width = size
        rows, columns = math.ceil(height / self.patch), math.ceil(width / self.patch)
        return math.prod(frames) * rows * columns

    def to_image(self, tokens: Tensor, size: tuple[int, ...], first: int = 0) -> Tensor:
        """Arrange the values of tokens as images, (..., N, patch^2) -> (..., *size).

        Drops pixels beyond an odd size, and tokens before and after the image's own (of text and
        of reference images).

        Args:
            first: index of the image's first token.
        """
        *frames, height, width = size
        rows, columns = math.ceil(height / self.patch), math.ceil(width / self.patch)
        lead, end = (*tokens.shape[:-2], *frames), first + self.count_tokens(size)
        image = tokens[..., first:end, :].reshape(*lead, rows, columns, self.patch, self.patch)
        image = image.transpose(-3, -2).reshape(*lead, rows * self.patch, columns * self.patch)
        return image[..., :height, :width]

    def to_tokens(self, values: Tensor) -> Tensor:
        """Convert velocities (B, C, N, patch^2) to the base's output tokens (B, N, C patch^2)."""
        values = values.permute(0, 2, 3, 1) if self.channels_last else values.transpose(1, 2)
        return -values.flatten(2) if self.negative else values.flatten(2)

    def from_tokens(self, tokens: Tensor) -> Tensor:
        """Invert `to_tokens`."""
        tokens = -tokens if self.negative else tokens
        if self.channels_last:
            return tokens.unflatten(2, (self.patch**2, self.channels)).permute(0, 3, 1, 2)
        return tokens.unflatten(2, (self.channels, self.patch**2)).transpose(1, 2)


def sigma_features(sigma: Tensor) -> Tensor:
    """Return features (B, TIME_FEATURES) of sigma (B,), for heads that see no embedding."""
    return time_features(sigma, TIME_FEATURES)


class Head(nn.Module):
    """Base class of the heads: the adaptive layer norm before the projections.

    Each call casts the weights to the type and device of the tokens, as the base model may compute
    in any type, and be on the GPU while the head is still on the CPU.

    Args:
        width: D of the transformer.
        layout: of its tokens. With `linear_only` the base model's own norm comes before the head.
    """

    def __init__(self, width: int, layout: HeadLayout):
        super().__init__()
        self.width, self.layout = width, layout
        if not layout.linear_only:
            self.norm_out = nn.ModuleDict(
                {"linear": nn.Linear(width, 2 * width, bias=layout.modulation_bias)}
            )

    def modulated(self, tokens: Tensor, embedding: Tensor) -> Tensor:
        """Normalise the tokens (B, N, D), then scale and shift them by the embedding (B, D)."""
        if self.layout.linear_only:
            return tokens
        scale, shift = _linear(self.norm_out["linear"], F.silu(embedding)).unsqueeze(1).chunk(2, -1)
        return F.layer_norm(tokens, (self.width,), eps=EPS) * (1 + scale) + shift

    def projected(self, layer: nn.Linear, modulated: Tensor, count: int) -> Tensor:
        """Project tokens (B, N, D) to `count` groups of values of each pixel.

        Returns:
            (B, count, C, N, patch^2), C what the layer has.
        """
        split = (*modulated.shape[:2], count, -1, self.layout.patch**2)
        return _linear(layer, modulated).reshape(split).permute(0, 2, 3, 1, 4)


class GMHead(Head):
    """Head that predicts the mixture of velocities of every pixel.

    Args:
        num_gaussians: K.
        log_std_widths: widths of the hidden layers between the embedding and the standard
            deviation, which is one per image.
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
        sizes = (TIME_FEATURES if layout.linear_only else width, *log_std_widths, 1)
        layers = [(nn.SiLU(), nn.Linear(a, b)) for a, b in itertools.pairwise(sizes)]
        self.proj_out_logstds = nn.Sequential(*(module for pair in layers for module in pair))

    def forward(self, tokens: Tensor, embedding: Tensor) -> GaussianMixture:
        """Predict the mixture of velocities with the space dimensions (N, patch^2), in float32.

        Args:
            tokens: (B, N, D).
            embedding: (B, D), of time and other conditions; `sigma_features` (B, TIME_FEATURES)
                if the layout has `linear_only`.
        """
        modulated = self.modulated(tokens, embedding)
        means = self.projected(self.proj_out_means, modulated, self.num_gaussians)
        logits = self.projected(self.proj_out_logweights, modulated, self.num_gaussians)
        log_std = embedding
        for layer in self.proj_out_logstds:
            log_std = F.silu(log_std) if isinstance(layer, nn.SiLU) else _linear(layer, log_std)
        return GaussianMixture(
            means, logits.float().log_softmax(1), log_std.reshape(-1, 1, 1, 1, 1)
        )

    def to_image(
        self, mixture: GaussianMixture, size: tuple[int, ...], first: int = 0
    ) -> GaussianMixture:
        """Convert what `forward` returned to a mixture of images (B, K, C, *size).

        Args:
            first: index of the image's first token.
        """
        means = self.layout.to_image(mixture.means, size, first)
        log_weights = self.layout.to_image(mixture.log_weights, size, first)
        log_std = mixture.log_std.reshape(-1, 1, 1, *[1] * len(size))
        return GaussianMixture(means, log_weights, log_std)


class ArcHead(Head):
    """Head that predicts velocities that grow or decay exponentially (ArcFlow's policy).

    Args:
        num_components: K; the first is constant and has no rate.
    """

    def __init__(self, width: int, layout: HeadLayout, num_components: int):
        super().__init__(width, layout)
        self.num_components = num_components
        self.proj_out_means = nn.Linear(width, num_components * layout.width)
        self.proj_out_logweights = nn.Linear(width, num_components * layout.patch**2)
        self.proj_out_loggamma = nn.Linear(width, (num_components - 1) * layout.patch**2)

    def forward(self, tokens: Tensor, embedding: Tensor) -> ArcVelocity:
        """Predict velocities with the space dimensions (N, patch^2); arguments as of `GMHead`."""
        modulated, count = self.modulated(tokens, embedding), self.num_components
        velocities = self.projected(self.proj_out_means, modulated, count)
        logits = self.projected(self.proj_out_logweights, modulated, count)
        rates = self.projected(self.proj_out_loggamma, modulated, count - 1)
        return ArcVelocity(velocities, logits.float().log_softmax(1), rates)

    def to_image(self, velocity: ArcVelocity, size: tuple[int, ...], first: int = 0) -> ArcVelocity:
        """Convert what `forward` returned to images (B, K, C, *size); see `GMHead.to_image`."""
        parts = velocity.velocities, velocity.log_weights, velocity.rates
        return ArcVelocity(*(self.layout.to_image(part, size, first) for part in parts))


class DXHead(Head):
    """Head that predicts velocities at N times, or as N coefficients (pi-Flow's DX policy).

    Args:
        num_times: N.
        settings: keyword arguments for `DXVelocity`.
    """

    def __init__(self, width: int, layout: HeadLayout, num_times: int, settings: dict):
        super().__init__(width, layout)
        self.num_times, self.settings = num_times, settings
        self.proj_out = nn.Linear(width, num_times * layout.width)

    def forward(self, tokens: Tensor, embedding: Tensor) -> DXVelocity:
        """Predict velocities with the space dimensions (N, patch^2); arguments as of `GMHead`."""
        modulated = self.modulated(tokens, embedding)
        velocities = self.projected(self.proj_out, modulated, self.num_times)
        return DXVelocity(velocities, **self.settings)

    def to_image(self, velocity: DXVelocity, size: tuple[int, ...], first: int = 0) -> DXVelocity:
        """Convert what `forward` returned to images (B, N, C, *size); see `GMHead.to_image`."""
        return DXVelocity(self.layout.to_image(velocity.velocities, size, first), **self.settings)


HEAD_NAMES = (  # prefixes of the heads' tensors in an adapter
    "norm_out.",
    "proj_out.",
    "proj_out_means.",
    "proj_out_logweights.",
    "proj_out_logstds.",
    "proj_out_loggamma.",
)


POLICIES = ("GMFlow", "DX", "ArcFlow")  # kinds that heads predict, as `policy_config` names them


def policy_by_names(names: Collection[str]) -> str:
    """Return the kind of policy that a head predicts, by the names of its tensors."""
    if any(name.startswith("proj_out_loggamma.") for name in names):
        return "ArcFlow"
    return "DX" if "proj_out.weight" in names else "GMFlow"


def is_head_key(name: str) -> bool:
    """Return whether a tensor of an adapter belongs to its head, not to its LoRA."""
    return name.startswith(HEAD_NAMES) and "lora" not in name


def build_head(
    tensors: Mapping[str, Tensor], policy: Mapping[str, object], layout: HeadLayout, width: int
) -> Head:
    """Build the head of an adapter, with copies of its tensors in their own type.

    Args:
        tensors: of the adapter; those that belong to no head are ignored.
        policy: the policy in the adapter's metadata: `type` "GMFlow", "ArcFlow", or "DX" with the
            settings of `DXVelocity`.
        layout, width: of the base model.

    Raises:
        ValueError: the policy is unknown; or tensors are missing, left over, or of a shape that
            does not fit the base model (the message counts them and names the first).
    """
    found = {name: tensor for name, tensor in tensors.items() if is_head_key(name)}
    settings = {name: value for name, value in policy.items() if name != "type"}
    kind = policy.get("type", "GMFlow")
    with torch.device("meta"):
        if kind == "GMFlow":
            count = _groups(found, "proj_out_logweights", layout.patch**2)
            head = GMHead(width, layout, count, _log_std_widths(found))
        elif kind == "ArcFlow":
            count = _groups(found, "proj_out_logweights", layout.patch**2)
            head = ArcHead(width, layout, max(2, count))
        elif kind == "DX":
            _check_dx(settings)
            head = DXHead(width, layout, _groups(found, "proj_out", layout.width), settings)
        else:
            raise ValueError(
                f"the adapter's policy is {dict(policy)}; this version knows "
                f"{', '.join(POLICIES)}; update GMFlow"
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


def _check_dx(settings: dict[str, object]) -> None:
    """Check the settings of a DX policy.

    Raises:
        ValueError: one is unknown, or its value is out of range.
    """
    known = {field.name for field in fields(DXVelocity)} - {"velocities"}
    if settings.keys() - known:
        raise ValueError(
            f"the adapter's DX policy has settings {settings}; this version knows segment_size, "
            "shift and mode; update GMFlow"
        )
    DXVelocity(torch.empty(0), **settings)  # checks the values


def _log_std_widths(tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Return the widths of the hidden layers that predict the log-std; the default if none."""
    parts = ((n.split(".")[1], t) for n, t in tensors.items() if n.startswith("proj_out_logstds."))
    rows = {int(part): len(tensor) for part, tensor in parts if part.isdigit()}
    return tuple(rows[index] for index in sorted(rows)[:-1]) if rows else (1024,)


def _groups(tensors: Mapping[str, Tensor], name: str, size: int) -> int:
    """Return how many groups of `size` outputs a projection has; 1 if the adapter lacks it."""
    found = [tensors[key] for key in (f"{name}.weight", f"{name}.bias") if key in tensors]
    return max(1, len(found[0]) // size) if found else 1


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """Apply the layer in the type and on the device of x."""
    return F.linear(x, layer.weight.to(x), None if layer.bias is None else layer.bias.to(x))
