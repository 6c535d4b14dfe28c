"""GM-DiT: a class-conditional diffusion transformer that predicts a mixture for every pixel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..flow.policy import DXVelocity
from ..gaussians.mixture import GaussianMixture
from .image_network import ImageConfig, ImageNetwork, log_std_head, patch_tokens, spectrum_network
from .position_features import grid_features, time_features

TIME_FEATURES = 256  # number of cosines and sines of the time


@dataclass(frozen=True, kw_only=True)
class GMDiTConfig(ImageConfig):
    """Hyperparameters of `GMDiT`; the defaults are the published ImageNet 256 model's.

    Args:
        num_classes: number of labels, at least 1; the label `num_classes` stands for none.
        num_layers, num_heads, head_dim: depth, attention heads and their width in the transformer.
        others: see `ImageConfig`.

    Raises:
        ValueError: a value is out of range.
    """

    num_components: int = 8
    channels: int = 4
    latent_size: int = 32
    patch_size: int = 2
    num_classes: int = 1000
    num_layers: int = 28
    num_heads: int = 16
    head_dim: int = 72
    log_std_dim: int = 1024
    log_std_layers: int = 2
    constant_log_std: float | None = None
    spectrum_layers: tuple[int, ...] | None = None
    dx_segment: float | None = None
    dx_shift: float = 1.0

    def __post_init__(self):
        self.check("num_classes", "num_layers", "num_heads")
        if self.width % 4 or self.width < 4:
            raise ValueError(
                f"num_heads {self.num_heads} x head_dim {self.head_dim} must be divisible by 4"
            )

    @property
    def width(self) -> int:
        """Number of features of a token."""
        return self.num_heads * self.head_dim


class GMDiT(ImageNetwork, nn.Module):
    """DiT (Peebles & Xie 2023) with GMFlow's output (Chen et al. 2025, arXiv 2504.05304).

    It predicts means and log-weights for every latent pixel, and one log-std for the image. The
    published model has 676 M parameters. Parameters are named as in the published checkpoints;
    those of the spectrum network begin with `spectrum_net.`.
    """

    Config = GMDiTConfig

    def __init__(self, config: GMDiTConfig = GMDiTConfig()):
        super().__init__()
        self.config = config
        width, patch = config.width, config.patch_size
        self.pos_embed = nn.ModuleDict({"proj": nn.Conv2d(config.channels, width, patch, patch)})
        self.emb = nn.ModuleDict(
            {
                "timestep_embedder": nn.ModuleDict(
                    {
                        "linear_1": nn.Linear(TIME_FEATURES, width),
                        "linear_2": nn.Linear(width, width),
                    }
                ),
                "class_embedder": nn.ModuleDict(
                    {"embedding_table": nn.Embedding(config.num_classes + 1, width)}
                ),
            }
        )
        self.transformer_blocks = nn.ModuleList(
            Block(width, config.num_heads) for _ in range(config.num_layers)
        )
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.proj_out_1 = nn.Linear(width, 2 * width)
        values = config.num_components * (config.channels + (config.dx_segment is None))
        self.proj_out_2 = nn.Linear(width, patch * patch * values)
        self.gm_out = log_std_head(config, width)
        self.spectrum_net = spectrum_network(config)
        self.reset_parameters()

    def reset_parameters(self):
        """Initialise as DiT: Xavier, and zero modulations, so that blocks begin as identities."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        patches = self.pos_embed["proj"]
        nn.init.xavier_uniform_(patches.weight.view(len(patches.weight), -1))
        nn.init.zeros_(patches.bias)
        nn.init.normal_(self.emb["class_embedder"]["embedding_table"].weight, std=0.02)
        for block in self.transformer_blocks:
            nn.init.zeros_(block.norm1["linear"].weight)
        nn.init.zeros_(self.proj_out_1.weight)
        if self.gm_out:
            nn.init.zeros_(self.gm_out["logstd_layers"][-1].weight)
        if self.spectrum_net is not None:
            self.spectrum_net.reset_parameters()

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor) -> GaussianMixture | DXVelocity:
        """Predict the mixture of velocities, or a DX policy (see `ImageConfig.dx_segment`).

        Args:
            x: (B, C, h, w) noisy latents.
            sigma: (B,) or a scalar, in [0, 1].
            labels: (B,) integers in [0, num_classes]; `num_classes` for no label.

        Returns:
            means (B, K, C, h, w), log_weights (B, K, 1, h, w), log_std (B, 1, 1, 1, 1); or
            velocities (B, K, C, h, w) of a policy; float32.

        Raises:
            ValueError: x has other channels than the network, or a size that it cannot serve.
        """
        config, patch = self.config, self.config.patch_size
        self.check_size(x.shape)
        rows, columns, extent = (
            x.shape[2] // patch,
            x.shape[3] // patch,
            config.latent_size // patch,
        )
        dtype = self.proj_out_2.weight.dtype
        positions = grid_features(rows, columns, config.width, extent, x.device).to(dtype)
        tokens = patch_tokens(self.pos_embed["proj"], x.to(dtype)) + positions
        condition = self.condition(torch.as_tensor(sigma, device=x.device).expand(len(x)), labels)
        tokens = self.run_blocks(self.transformer_blocks, tokens, condition)
        shift, scale = self.proj_out_1(F.silu(condition)).unsqueeze(1).chunk(2, -1)
        tokens = self.proj_out_2(self.norm_out(tokens) * (1 + scale) + shift)
        return self.mixture(tokens, x.shape, condition)

    def condition(self, sigma: Tensor, labels: Tensor) -> Tensor:
        """Return the time's plus the label's embedding: (B,), (B,) -> (B, width)."""
        embedder = self.emb["timestep_embedder"]
        features = time_features(sigma, TIME_FEATURES).to(embedder["linear_1"].weight.dtype)
        time = embedder["linear_2"](F.silu(embedder["linear_1"](features)))
        label = self.emb["class_embedder"]["embedding_table"](labels.to(time.device))
        return time + label.to(time.dtype)


class Block(nn.Module):
    """A transformer block with adaptive layer norm (adaLN-Zero)."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.ModuleDict({"linear": nn.Linear(width, 6 * width)})
        self.attn1 = nn.ModuleDict(
            {name: nn.Linear(width, width) for name in ("to_q", "to_k", "to_v")}
        )
        self.attn1["to_out"] = nn.ModuleList([nn.Linear(width, width)])
        # as published: the first projection with its activation is at 0, an unused dropout at 1
        first = nn.ModuleDict({"proj": nn.Linear(width, 4 * width)})
        self.ff = nn.ModuleDict(
            {"net": nn.ModuleList([first, nn.Identity(), nn.Linear(4 * width, width)])}
        )

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """Transform tokens (B, N, width) under a condition (B, width)."""
        modulation = self.norm1["linear"](F.silu(condition)).unsqueeze(1)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, -1)
        hidden = F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6) * (1 + scale_attn) + shift_attn
        tokens = tokens + gate_attn * self.attention(hidden)
        hidden = F.layer_norm(tokens, tokens.shape[-1:], eps=1e-5) * (1 + scale_mlp) + shift_mlp
        first, _, last = self.ff["net"]
        return tokens + gate_mlp * last(F.gelu(first["proj"](hidden), approximate="tanh"))

    def attention(self, tokens: Tensor) -> Tensor:
        """Apply multi-head self-attention, (B, N, width) -> (B, N, width)."""
        q, k, v = (
            self.attn1[name](tokens).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for name in ("to_q", "to_k", "to_v")
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.attn1["to_out"][0](mixed)
