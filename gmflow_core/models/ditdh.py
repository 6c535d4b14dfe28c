"""DiTDH: a diffusion transformer with a shallow, wide head (DDT) for latents of many channels, such as RAE's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..gaussians.mixture import GaussianMixture
from .mixture_output import MixtureOutput, log_std_head
from .position_features import grid_features
from .spectrum import SpectrumMLP
from .state_dict import check_shapes, shapes_of

FREQUENCIES = 256  # random ones of the time's features, each with a sine and a cosine
EPS = 1e-6  # of the norms
DERIVED = (
    "pos_embed",
    "enc_feat_rope.",
    "dec_feat_rope.",
)  # published tensors that follow from the sizes


@dataclass(frozen=True, kw_only=True)
class DiTDHConfig:
    """Hyperparameters of `DiTDH`. The defaults are the published XL model's (839 M parameters); S has 12 layers of 384 with 6
    heads as its trunk (196 M).

    Args:
        num_components: K. 1 predicts the mean, as MM-FM does; more, a mixture for every latent pixel, as GM-DiT does.
        channels: C of the latents.
        latent_size: side of the latents it is trained at; smaller ones can be sampled, larger ones cannot.
        patch_size: side of a token's patch; divides every latent's sides.
        num_classes: number of labels (classes, or modes of a mixture source); 0: the network is unconditional.
        null_class: whether there is a further label `num_classes` that stands for none.
        trunk_layers, trunk_width, trunk_heads: of the transformer that sees the condition.
        head_layers, head_width, head_heads: of the one that makes the velocity from what the trunk says of each token.
        log_std_dim, log_std_layers, spectrum_layers: as in `GMDiTConfig`.
        constant_log_std: fixes the log-std of the mixture; None predicts it. 0 with K = 1 is ordinary flow matching.

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

    def __post_init__(self):
        sizes = (
            "num_components",
            "channels",
            "latent_size",
            "patch_size",
            "log_std_dim",
            "log_std_layers",
        )
        parts = (
            "trunk_layers",
            "trunk_width",
            "trunk_heads",
            "head_layers",
            "head_width",
            "head_heads",
        )
        for name in sizes + parts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.num_classes < 0:
            raise ValueError(
                f"num_classes is {self.num_classes}; it must be 0 (unconditional) or more"
            )
        for part, width, heads in (
            ("trunk", self.trunk_width, self.trunk_heads),
            ("head", self.head_width, self.head_heads),
        ):
            if width % (4 * heads):
                raise ValueError(
                    f"{part}_width {width} is not {part}_heads {heads} times a multiple of 4, as its positions (RoPE) need it"
                )
        if self.latent_size % self.patch_size:
            raise ValueError(
                f"latent_size {self.latent_size} is not divisible by patch_size {self.patch_size}"
            )
        if self.spectrum_layers is not None:
            object.__setattr__(
                self, "spectrum_layers", tuple(self.spectrum_layers)
            )  # JSON gives a list


class DiTDH(MixtureOutput, nn.Module):
    """DiT^DH (Zheng et al. 2025, arXiv 2510.11690; the decoupled head is that of Wang et al. 2025, arXiv 2504.05741).

    Names and shapes are those of RAE's public `DiTwDDTHead`, of which its published checkpoints are made: `s_embedder`,
    `blocks.N` and `s_projector` are the trunk, `x_embedder`, the last of `blocks` and `final_layer` the head. What follows
    from the sizes (sine-cosine and rotary positions) is computed instead of stored. Theirs have patch size 1 and K = 1; what
    is ours is the order of a larger patch's values, `gm_out` and `spectrum_net` (as in `GMDiT`), and that the embedding
    table is absent if there are no classes. That MM-FM's own checkpoints, which are not public, have the same names is a
    guess. Set `gradient_checkpointing` to compute the blocks again in the backward pass.
    """

    Config = DiTDHConfig

    def __init__(self, config: DiTDHConfig = DiTDHConfig()):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
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
        values = config.num_components * (config.channels + (config.num_components > 1))
        self.final_layer = nn.ModuleDict(
            {
                "norm_final": nn.RMSNorm(head, eps=EPS),
                "linear": nn.Linear(head, patch * patch * values),
                "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(head, 2 * head)),
            }
        )
        self.gm_out = log_std_head(config, trunk)
        self.spectrum_net = None
        if config.spectrum_layers is not None:
            base_size = (config.channels, config.latent_size, config.latent_size)
            self.spectrum_net = SpectrumMLP(base_size, config.spectrum_layers)
        self.reset_parameters()

    def reset_parameters(self):
        """As published: every modulation is zero, so that the blocks begin as identities, and with K = 1 so is the output;
        with more, components that begin alike would remain alike."""
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
        for modulation in [
            *(block.adaLN_modulation for block in self.blocks),
            self.final_layer["adaLN_modulation"],
        ]:
            nn.init.zeros_(modulation[-1].weight)
            nn.init.zeros_(modulation[-1].bias)
        if self.config.num_components == 1:
            nn.init.zeros_(self.final_layer["linear"].weight)
        else:
            nn.init.xavier_uniform_(self.final_layer["linear"].weight)
        nn.init.zeros_(self.final_layer["linear"].bias)
        if self.config.constant_log_std is None:
            nn.init.zeros_(self.gm_out["logstd_layers"][-1].weight)
            nn.init.zeros_(self.gm_out["logstd_layers"][-1].bias)
        if self.spectrum_net is not None:
            self.spectrum_net.reset_parameters()

    @property
    def transformer_blocks(self) -> nn.ModuleList:
        """What a trainer wraps one by one."""
        return self.blocks

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> GaussianMixture:
        """
        Args:
            x: (B, C, h, w) noisy latents.
            sigma: (B,) or a scalar, in [0, 1].
            labels: (B,) integers in [0, num_classes), or `num_classes` for none if there is a null class; not read by an
                unconditional network.

        Returns:
            The mixture of velocities: means (B, K, C, h, w), log_weights (B, K, 1, h, w), log_std (B, 1, 1, 1, 1); float32.

        Raises:
            ValueError: x has other channels than the network, or a size that it cannot serve.
        """
        config, patch = self.config, self.config.patch_size
        self.check_size(x.shape)
        size, extent = (x.shape[2] // patch, x.shape[3] // patch), config.latent_size // patch
        dtype = self.final_layer["linear"].weight.dtype
        latents = x.to(dtype)
        time = self.t_embedder(torch.as_tensor(sigma, device=x.device).expand(len(x)))
        condition = time
        if self.y_embedder:
            if labels is None:
                raise ValueError(
                    f"this DiTDH is conditional; give labels from 0 to {config.num_classes - 1}"
                )
            condition = time + self.y_embedder["embedding_table"](labels.to(x.device)).to(
                time.dtype
            )
        positions = grid_features(*size, config.trunk_width, extent, x.device)
        tokens = self.s_embedder["proj"](latents).flatten(2).transpose(1, 2) + positions.to(dtype)
        rotation = grid_rotation(*size, config.trunk_width // config.trunk_heads, extent, x.device)
        tokens = self.run(
            self.blocks[: config.trunk_layers], tokens, F.silu(condition).unsqueeze(1), rotation
        )
        local = self.s_projector(F.silu(time.unsqueeze(1) + tokens))  # (B, N, head_width)
        tokens = self.x_embedder["proj"](latents).flatten(2).transpose(1, 2).to(dtype)
        rotation = grid_rotation(*size, config.head_width // config.head_heads, extent, x.device)
        tokens = self.run(self.blocks[config.trunk_layers :], tokens, local, rotation)
        shift, scale = self.final_layer["adaLN_modulation"](local).chunk(2, -1)
        tokens = self.final_layer["linear"](
            self.final_layer["norm_final"](tokens) * (1 + scale) + shift
        )
        return self.mixture(tokens, x.shape, condition)

    def run(
        self,
        blocks: nn.ModuleList,
        tokens: Tensor,
        condition: Tensor,
        rotation: tuple[Tensor, Tensor],
    ) -> Tensor:
        """The tokens after these blocks, remembered or computed again in the backward pass."""
        for block in blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, condition, rotation, use_reentrant=False)
            else:
                tokens = block(tokens, condition, rotation)
        return tokens

    @classmethod
    def from_published(
        cls, tensors: Mapping[str, Tensor], null_class: bool = True, head_layers: int = 2
    ) -> DiTDH:
        """The network of a state dict of RAE's `DiTwDDTHead`; its other sizes are those of the tensors.

        Args:
            null_class: whether the last row of the embedding table stands for no label, as it does in networks that were
                trained with label dropout.
            head_layers: how many of the blocks are the head's.

        Raises:
            ValueError: it is no such state dict; the message names a tensor that does not fit.
        """
        try:
            shapes = {name: tuple(t.shape) for name, t in tensors.items()}
            trunk, channels, patch, _ = shapes["s_embedder.proj.weight"]
            head = shapes["x_embedder.proj.weight"][0]
            trunk_dim, head_dim = (
                shapes[f"{part}_feat_rope.freqs_cos"][1] for part in ("enc", "dec")
            )
            layers = sum(name.endswith(".norm1.weight") for name in shapes)
            config = DiTDHConfig(
                channels=channels,
                latent_size=patch * math.isqrt(shapes["enc_feat_rope.freqs_cos"][0]),
                patch_size=patch,
                num_classes=shapes["y_embedder.embedding_table.weight"][0] - null_class,
                null_class=null_class,
                trunk_layers=layers - head_layers,
                trunk_width=trunk,
                trunk_heads=trunk // trunk_dim,
                head_layers=head_layers,
                head_width=head,
                head_heads=head // head_dim,
            )
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(
                f"these {len(tensors)} tensors are not those of a DiTwDDTHead with rotary positions ({error}); give the state "
                "dict of RAE's stage 2, of its averaged weights (ema) if the file has several"
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


class TimeEmbedder(nn.Module):
    """Sines, then cosines, of sigma at random frequencies, and a two-layer MLP: (B,) -> (B, width)."""

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("W", torch.empty(FREQUENCIES))  # named as published; not trained
        self.mlp = nn.Sequential(
            nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.reset_parameters()

    def reset_parameters(self):
        """The frequencies are such that bfloat16 holds them: a checkpoint in it is the same function of time."""
        nn.init.normal_(self.W)
        self.W.copy_(self.W.to(torch.bfloat16))
        for layer in (self.mlp[0], self.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, sigma: Tensor) -> Tensor:
        angle = 2 * math.pi * sigma.float().unsqueeze(-1) * self.W.float()
        features = torch.cat([angle.sin(), angle.cos()], -1)
        return self.mlp(features.to(self.mlp[0].weight.dtype))


class Block(nn.Module):
    """A transformer block with RMSNorm, SwiGLU, rotary positions and adaLN-Zero of a condition per sample or per token."""

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
        """(B, N, width), (B, 1 or N, width) -> (B, N, width); `rotation` as from `grid_rotation`."""
        modulation = self.adaLN_modulation(condition).chunk(6, -1)
        shift_attention, scale_attention, gate_attention, shift_mlp, scale_mlp, gate_mlp = (
            modulation
        )
        hidden = self.norm1(tokens) * (1 + scale_attention) + shift_attention
        tokens = tokens + gate_attention * self.attention(hidden, rotation)
        hidden = self.norm2(tokens) * (1 + scale_mlp) + shift_mlp
        gate, value = self.mlp["w12"](hidden).chunk(2, -1)
        return tokens + gate_mlp * self.mlp["w3"](F.silu(gate) * value)

    def attention(self, tokens: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """Multi-head self-attention, (B, N, width) -> (B, N, width)."""
        q, k, v = (
            self.attn["qkv"](tokens).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        )
        q, k = (rotate_pairs(t, *rotation).to(v.dtype) for t in (q, k))
        return self.attn["proj"](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def grid_rotation(
    height: int, width: int, size: int, extent: int, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of RoPE (Su et al. 2021) for a height x width grid, row by row: two of (height * width, size).

    The first half of the features turns with the row, the second with the column, in pairs of neighbours, at frequencies from
    1 down to 1e-4. As in `grid_features`, the grid is stretched to `extent` both ways.
    """
    frequency = 10000 ** (
        -torch.arange(size // 4, dtype=torch.float64, device=device) / (size // 4)
    )

    def axis(count: int) -> Tensor:
        angle = (
            torch.arange(count, dtype=torch.float64, device=device)
            .mul(extent / count)
            .outer(frequency)
        )
        return angle.repeat_interleave(2, -1)  # (count, size / 2)

    rows = axis(height).unsqueeze(1).expand(-1, width, -1)
    columns = axis(width).expand(height, -1, -1)
    angle = torch.cat([rows, columns], -1).flatten(0, 1)
    return angle.cos().float(), angle.sin().float()


def rotate_pairs(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """x (..., N, size) with every pair of neighbouring features turned by its angle."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cosine + torch.stack([-odd, even], -1).flatten(-2) * sine
