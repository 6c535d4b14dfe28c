"""DiTDH: a diffusion transformer with a shallow, wide head, for latents of many channels (RAE)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..flow.policy import DXVelocity
from ..gaussians.mixture import GaussianMixture
from .image_network import ImageConfig, ImageNetwork, log_std_head, patch_tokens, spectrum_network
from .position_features import grid_angles, grid_features
from .state_dict import check_shapes, shapes_of

FREQUENCIES = 256  # random frequencies in the time's features, each with a sine and a cosine
EPS = 1e-6  # epsilon of the norms
PARTS = ("trunk", "head")
LABEL_TABLE = "y_embedder.embedding_table.weight"  # name of the labels' embeddings
DERIVED = ("pos_embed", "enc_feat_rope.", "dec_feat_rope.")  # published, but follow from the sizes


@dataclass(frozen=True, kw_only=True)
class DiTDHConfig(ImageConfig):
    """Hyperparameters of `DiTDH`; the defaults are those of the published XL model.

    XL has 838.4 M parameters, or 846.7 M with 8192 modes for labels and no null class. S has 12
    trunk layers of width 384 with 6 heads (196.4 M).

    Args:
        num_components: K. 1 predicts the mean, as MM-FM does; more predict a mixture for every
            latent pixel, as GM-DiT does.
        num_classes: number of labels (classes, or modes of a mixture source); 0: the network is
            unconditional.
        null_class: add a label `num_classes` that stands for none.
        trunk_layers, trunk_width, trunk_heads: sizes of the transformer that sees the condition.
        head_layers, head_width, head_heads: sizes of the one that predicts the velocity from the
            trunk's output at each token.
        constant_log_std: fixes the log-std of the mixture; None predicts it. 0 with K = 1 is
            ordinary flow matching.
        others: see `ImageConfig`.

    Raises:
        ValueError: a value is out of range.
    """

    num_components: int = 1
    channels: int = 768
    latent_size: int = 16
    patch_size: int = 1
    num_classes: int = 1000
    null_class: bool = True
    trunk_layers: int = 28
    trunk_width: int = 1152
    trunk_heads: int = 16
    head_layers: int = 2
    head_width: int = 2048
    head_heads: int = 16
    log_std_dim: int = 1024
    log_std_layers: int = 2
    constant_log_std: float | None = 0.0
    spectrum_layers: tuple[int, ...] | None = None
    dx_segment: float | None = None
    dx_shift: float = 1.0

    def __post_init__(self):
        self.check(*(f"{part}_{size}" for part in PARTS for size in ("layers", "width", "heads")))
        if self.num_classes < 0:
            raise ValueError(
                f"num_classes is {self.num_classes}; it must be 0 (unconditional) or more"
            )
        for part in PARTS:
            width, heads = getattr(self, f"{part}_width"), getattr(self, f"{part}_heads")
            if width % (4 * heads):
                raise ValueError(
                    f"{part}_width {width} is not {part}_heads {heads} times a multiple of 4, "
                    "as its positions (RoPE) need it"
                )


class DiTDH(ImageNetwork, nn.Module):
    """DiT^DH (Zheng et al. 2025, arXiv 2510.11690), with a mixture of velocities at its output.

    The decoupled head is that of DDT (Wang et al. 2025, arXiv 2504.05741).

    Names and shapes are those of RAE's public `DiTwDDTHead` and its published checkpoints:
    `s_embedder`, the first of `blocks` and `s_projector` are the trunk; `x_embedder`, the last of
    `blocks` and `final_layer` are the head. Sine-cosine and rotary positions follow from the sizes,
    so they are computed instead of stored.

    The published networks have patch size 1 and K = 1. These parts are ours: the order of the
    values in a larger patch, `gm_out` and `spectrum_net` (as in `GMDiT`), and a network without
    the embedding table if there are no classes. MM-FM's own checkpoints are not public; that they
    have the same names is a guess.
    """

    Config = DiTDHConfig

    def __init__(self, config: DiTDHConfig = DiTDHConfig()):
        super().__init__()
        self.config = config
        patch, trunk, head = config.patch_size, config.trunk_width, config.head_width
        self.s_embedder = nn.ModuleDict({"proj": nn.Conv2d(config.channels, trunk, patch, patch)})
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(config.channels, head, patch, patch)})
        self.t_embedder = TimeEmbedder(trunk)
        labels = config.num_classes + config.null_class if config.num_classes else 0
        self.y_embedder = nn.ModuleDict(
            {"embedding_table": nn.Embedding(labels, trunk)} if labels else {}
        )
        self.s_projector = nn.Linear(trunk, head) if trunk != head else nn.Identity()
        self.blocks = nn.ModuleList(
            [Block(trunk, config.trunk_heads) for _ in range(config.trunk_layers)]
            + [Block(head, config.head_heads) for _ in range(config.head_layers)]
        )
        weights = config.num_components > 1 and config.dx_segment is None
        values = config.num_components * (config.channels + weights)
        self.final_layer = nn.ModuleDict(
            {
                "norm_final": nn.RMSNorm(head, eps=EPS),
                "linear": nn.Linear(head, patch * patch * values),
                "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(head, 2 * head)),
            }
        )
        self.gm_out = log_std_head(config, trunk)
        self.spectrum_net = spectrum_network(config)
        self.reset_parameters()

    def reset_parameters(self):
        """Initialise as published: zero modulations, so that blocks begin as identities.

        With K = 1 the output layer is zero too. With more components it is not, as components that
        begin alike would stay alike.
        """
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.RMSNorm)):
                module.reset_parameters()
        for embedder in (self.s_embedder, self.x_embedder):
            weight = embedder["proj"].weight
            nn.init.xavier_uniform_(weight.view(len(weight), -1))
            nn.init.zeros_(embedder["proj"].bias)
        self.t_embedder.reset_parameters()
        if self.y_embedder:
            nn.init.normal_(self.y_embedder["embedding_table"].weight, std=0.02)
        modulations = [block.adaLN_modulation for block in self.blocks]
        for modulation in (*modulations, self.final_layer["adaLN_modulation"]):
            nn.init.zeros_(modulation[-1].weight)
            nn.init.zeros_(modulation[-1].bias)
        if self.config.num_components == 1:
            nn.init.zeros_(self.final_layer["linear"].weight)
        else:
            nn.init.xavier_uniform_(self.final_layer["linear"].weight)
        nn.init.zeros_(self.final_layer["linear"].bias)
        if self.gm_out:
            nn.init.zeros_(self.gm_out["logstd_layers"][-1].weight)
            nn.init.zeros_(self.gm_out["logstd_layers"][-1].bias)
        if self.spectrum_net is not None:
            self.spectrum_net.reset_parameters()

    @property
    def transformer_blocks(self) -> nn.ModuleList:
        """Blocks of trunk and head, under the name that GMDiT gives them, for trainers."""
        return self.blocks

    def forward(
        self, x: Tensor, sigma: Tensor, labels: Tensor | None = None
    ) -> GaussianMixture | DXVelocity:
        """Predict the mixture of velocities, or a DX policy (see `ImageConfig.dx_segment`).

        Args:
            x: (B, C, h, w) noisy latents.
            sigma: (B,) or a scalar, in [0, 1].
            labels: (B,) integers in [0, num_classes), or `num_classes` for none if there is a null
                class; ignored by an unconditional network.

        Returns:
            means (B, K, C, h, w), log_weights (B, K, 1, h, w), log_std (B, 1, 1, 1, 1); or
            velocities (B, K, C, h, w) of a policy; float32.

        Raises:
            ValueError: x has other channels than the network, or a size that it cannot serve;
                labels are missing.
        """
        config, patch = self.config, self.config.patch_size
        self.check_size(x.shape)
        size, extent = (x.shape[2] // patch, x.shape[3] // patch), config.latent_size // patch
        dtype = self.final_layer["linear"].weight.dtype
        latents = x.to(dtype)
        time = self.t_embedder(torch.as_tensor(sigma, device=x.device).expand(len(x)))
        condition = self.condition(time, labels)
        # trunk: its output is the condition of each token in the head
        positions = grid_features(*size, config.trunk_width, extent, x.device).to(dtype)
        tokens = patch_tokens(self.s_embedder["proj"], latents) + positions
        rotation = grid_rotation(*size, config.trunk_width // config.trunk_heads, extent, x.device)
        trunk, head = self.blocks[: config.trunk_layers], self.blocks[config.trunk_layers :]
        tokens = self.run_blocks(trunk, tokens, F.silu(condition).unsqueeze(1), rotation)
        local = self.s_projector(F.silu(time.unsqueeze(1) + tokens))  # (B, N, head_width)
        # head: predicts the velocity of each token
        tokens = patch_tokens(self.x_embedder["proj"], latents).to(dtype)
        rotation = grid_rotation(*size, config.head_width // config.head_heads, extent, x.device)
        tokens = self.run_blocks(head, tokens, local, rotation)
        shift, scale = self.final_layer["adaLN_modulation"](local).chunk(2, -1)
        tokens = self.final_layer["norm_final"](tokens) * (1 + scale) + shift
        return self.mixture(self.final_layer["linear"](tokens), x.shape, condition)

    def condition(self, time: Tensor, labels: Tensor | None) -> Tensor:
        """Return the time's embedding (B, width) plus the label's, if the network has labels.

        Raises:
            ValueError: labels are missing.
        """
        if not self.y_embedder:
            return time
        if labels is None:
            raise ValueError(
                f"this DiTDH is conditional; give labels from 0 to {self.config.num_classes - 1}"
            )
        return time + self.y_embedder["embedding_table"](labels.to(time.device)).to(time.dtype)

    @classmethod
    def from_published(
        cls, tensors: Mapping[str, Tensor], null_class: bool = True, head_layers: int = 2
    ) -> DiTDH:
        """Build the network of a state dict of RAE's `DiTwDDTHead`, with sizes from its tensors.

        Args:
            tensors: the state dict; without a table of labels it is an unconditional network.
            null_class: the last row of the embedding table stands for no label, as it does in
                networks that were trained with label dropout.
            head_layers: number of blocks in the head.

        Raises:
            ValueError: it is no such state dict; the message names a tensor that does not fit.
        """
        try:
            config = _published_config(shapes_of(tensors), null_class, head_layers)
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(
                f"these {len(tensors)} tensors are not those of a DiTwDDTHead with rotary "
                f"positions ({error}); give the state dict of RAE's stage 2, of its averaged "
                "weights (ema) if the file has several"
            ) from error
        with torch.device("meta"):
            network = cls(config)
        kept = {name: t.float() for name, t in tensors.items() if not name.startswith(DERIVED)}
        check_shapes(
            shapes_of(network.state_dict()),
            shapes_of(kept),
            f"a {config}",
            advice="this version knows RMSNorm, SwiGLU, adaLN with shifts, and no qk-norm",
        )
        network.load_state_dict(kept, assign=True)
        return network


def _published_config(
    shapes: Mapping[str, tuple[int, ...]], null_class: bool, head_layers: int
) -> DiTDHConfig:
    """Return the config of a published network with tensors of these shapes."""
    trunk, channels, patch, _ = shapes["s_embedder.proj.weight"]
    head = shapes["x_embedder.proj.weight"][0]
    trunk_dim, head_dim = (shapes[f"{part}_feat_rope.freqs_cos"][1] for part in ("enc", "dec"))
    layers = sum(name.endswith(".norm1.weight") for name in shapes)
    return DiTDHConfig(
        channels=channels,
        latent_size=patch * math.isqrt(shapes["enc_feat_rope.freqs_cos"][0]),
        patch_size=patch,
        num_classes=table[0] - null_class if (table := shapes.get(LABEL_TABLE)) else 0,
        null_class=null_class,
        trunk_layers=layers - head_layers,
        trunk_width=trunk,
        trunk_heads=trunk // trunk_dim,
        head_layers=head_layers,
        head_width=head,
        head_heads=head // head_dim,
    )


class TimeEmbedder(nn.Module):
    """Sines, then cosines, of sigma at random frequencies, and a two-layer MLP."""

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("W", torch.empty(FREQUENCIES))  # named as published; not trained
        self.mlp = nn.Sequential(
            nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.reset_parameters()

    def reset_parameters(self):
        """Draw the frequencies, rounded to bfloat16, and the weights of the MLP.

        A checkpoint in bfloat16 holds these frequencies exactly: the same function of time.
        """
        nn.init.normal_(self.W)
        self.W.copy_(self.W.to(torch.bfloat16))
        for layer in (self.mlp[0], self.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, sigma: Tensor) -> Tensor:
        """Embed the times (B,) in [0, 1] as (B, width)."""
        angle = 2 * math.pi * sigma.float().unsqueeze(-1) * self.W.float()
        features = torch.cat([angle.sin(), angle.cos()], -1)
        return self.mlp(features.to(self.mlp[0].weight.dtype))


class Block(nn.Module):
    """A transformer block with RMSNorm, SwiGLU, rotary positions and adaLN-Zero."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        hidden = int(2 / 3 * (4 * width))
        self.norm1 = nn.RMSNorm(width, eps=EPS)
        self.attn = nn.ModuleDict(
            {"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)}
        )
        self.norm2 = nn.RMSNorm(width, eps=EPS)
        self.mlp = nn.ModuleDict(
            {"w12": nn.Linear(width, 2 * hidden), "w3": nn.Linear(hidden, width)}
        )
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, tokens: Tensor, condition: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """Transform tokens (B, N, width).

        Args:
            condition: (B, 1, width) per sample, or (B, N, width) per token.
            rotation: as from `grid_rotation`.
        """
        modulation = self.adaLN_modulation(condition)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, -1)
        hidden = self.norm1(tokens) * (1 + scale_attn) + shift_attn
        tokens = tokens + gate_attn * self.attention(hidden, rotation)
        hidden = self.norm2(tokens) * (1 + scale_mlp) + shift_mlp
        gate, value = self.mlp["w12"](hidden).chunk(2, -1)
        return tokens + gate_mlp * self.mlp["w3"](F.silu(gate) * value)

    def attention(self, tokens: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """Apply multi-head self-attention, (B, N, width) -> (B, N, width)."""
        qkv = self.attn["qkv"](tokens).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, size)
        q, k = (rotate_pairs(t, *rotation).to(v.dtype) for t in (q, k))
        return self.attn["proj"](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def grid_rotation(
    height: int, width: int, size: int, extent: int, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of RoPE (Su et al. 2021) for a grid of patches, row by row.

    The first half of the features turns with the row, the second with the column, in pairs of
    neighbours; see `grid_angles` for frequencies and `extent`.

    Returns:
        Two tensors (height * width, size), float32.
    """
    angles = grid_angles(height, width, size // 4, extent, device)
    angle = torch.cat([each.repeat_interleave(2, -1) for each in angles], -1).flatten(0, 1)
    return angle.cos().float(), angle.sin().float()


def rotate_pairs(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate every pair of neighbouring features of x (..., N, size) by its angle."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cosine + torch.stack([-odd, even], -1).flatten(-2) * sine
