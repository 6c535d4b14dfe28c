"""GM-DiT: a class-conditional diffusion transformer that predicts a mixture of velocities for every latent pixel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..gaussians.mixture import GaussianMixture
from .mixture_output import MixtureOutput, log_std_head
from .position_features import grid_features, time_features
from .spectrum import SpectrumMLP

TIME_FEATURES = 256


@dataclass(frozen=True, kw_only=True)
class GMDiTConfig:
    """Hyperparameters of `GMDiT`. The defaults are the published ImageNet 256 model's (676 M parameters).

    Args:
        num_components: K, at least 1; 1 with a `constant_log_std` is ordinary flow matching.
        channels: C of the latents.
        latent_size: side of the latents it is trained at; smaller ones can be sampled, larger ones cannot.
        patch_size: side of a token's patch; divides every latent's sides.
        num_classes: number of labels; label `num_classes` stands for none.
        num_layers, num_heads, head_dim: of the transformer.
        log_std_dim: hidden width of the head that predicts the log-std.
        log_std_layers: number of its linear layers.
        constant_log_std: fixes the mixture's log-std instead of predicting it.
        spectrum_layers: hidden widths of the spectrum network that GM-SDE uses; None: the model has none.

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

    def __post_init__(self):
        for name in (
            "num_components",
            "channels",
            "latent_size",
            "patch_size",
            "num_classes",
            "num_layers",
            "num_heads",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.width % 4 or self.width < 4:
            raise ValueError(
                f"num_heads {self.num_heads} x head_dim {self.head_dim} must be divisible by 4"
            )
        if self.latent_size % self.patch_size:
            raise ValueError(
                f"latent_size {self.latent_size} is not divisible by patch_size {self.patch_size}"
            )
        if self.log_std_dim < 1 or self.log_std_layers < 1:
            raise ValueError(
                f"log_std_dim {self.log_std_dim} and log_std_layers {self.log_std_layers} must be at least 1"
            )
        if self.spectrum_layers is not None:
            object.__setattr__(
                self, "spectrum_layers", tuple(self.spectrum_layers)
            )  # JSON gives a list

    @property
    def width(self) -> int:
        """Features of a token."""
        return self.num_heads * self.head_dim


class GMDiT(MixtureOutput, nn.Module):
    """DiT (Peebles & Xie 2023) with GMFlow's output: means and log-weights for every pixel, one log-std for the image.

    Its parameters are named as in the published checkpoints; those of the spectrum network begin with `spectrum_net.`. Set
    `gradient_checkpointing` to compute the blocks again in the backward pass instead of keeping their activations.
    """

    Config = GMDiTConfig

    def __init__(self, config: GMDiTConfig = GMDiTConfig()):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
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
        self.proj_out_2 = nn.Linear(
            width, patch * patch * config.num_components * (config.channels + 1)
        )
        self.gm_out = log_std_head(config, width)
        self.spectrum_net = None
        if config.spectrum_layers is not None:
            base_size = (config.channels, config.latent_size, config.latent_size)
            self.spectrum_net = SpectrumMLP(base_size, config.spectrum_layers)
        self.reset_parameters()

    def reset_parameters(self):
        """As DiT: Xavier, with every modulation zero, so that the blocks begin as identities."""
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
        if self.config.constant_log_std is None:
            nn.init.zeros_(self.gm_out["logstd_layers"][-1].weight)
        if self.spectrum_net is not None:
            self.spectrum_net.reset_parameters()

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor) -> GaussianMixture:
        """
        Args:
            x: (B, C, h, w) noisy latents.
            sigma: (B,) or a scalar, in [0, 1].
            labels: (B,) integers in [0, num_classes]; `num_classes` for no label.

        Returns:
            The mixture of velocities: means (B, K, C, h, w), log_weights (B, K, 1, h, w), log_std (B, 1, 1, 1, 1); float32.

        Raises:
            ValueError: x has other channels than the network, or a size that it cannot serve.
        """
        config, patch = self.config, self.config.patch_size
        self.check_size(x.shape)
        rows, columns = x.shape[2] // patch, x.shape[3] // patch
        weight = self.proj_out_2.weight
        positions = grid_features(
            rows, columns, config.width, config.latent_size // patch, x.device
        )
        tokens = self.pos_embed["proj"](x.to(weight.dtype)).flatten(2).transpose(
            1, 2
        ) + positions.to(weight.dtype)
        condition = self.condition(torch.as_tensor(sigma, device=x.device).expand(len(x)), labels)
        for block in self.transformer_blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, condition, use_reentrant=False)
            else:
                tokens = block(tokens, condition)
        shift, scale = self.proj_out_1(F.silu(condition)).unsqueeze(1).chunk(2, -1)
        tokens = self.proj_out_2(self.norm_out(tokens) * (1 + scale) + shift)
        return self.mixture(tokens, x.shape, condition)

    def condition(self, sigma: Tensor, labels: Tensor) -> Tensor:
        """The sum of the time's and the label's embedding: (B,), (B,) -> (B, width)."""
        embedder = self.emb["timestep_embedder"]
        features = time_features(sigma, TIME_FEATURES).to(embedder["linear_1"].weight.dtype)
        time = embedder["linear_2"](F.silu(embedder["linear_1"](features)))
        return time + self.emb["class_embedder"]["embedding_table"](labels.to(time.device)).to(
            time.dtype
        )


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
        # the activation is at index 0 (with the first projection), a dropout that is never used at 1
        first = nn.ModuleDict({"proj": nn.Linear(width, 4 * width)})
        self.ff = nn.ModuleDict(
            {"net": nn.ModuleList([first, nn.Identity(), nn.Linear(4 * width, width)])}
        )

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """(B, N, width), (B, width) -> (B, N, width)."""
        modulation = self.norm1["linear"](F.silu(condition)).unsqueeze(1).chunk(6, -1)
        shift_attention, scale_attention, gate_attention, shift_mlp, scale_mlp, gate_mlp = (
            modulation
        )
        hidden = (
            F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6) * (1 + scale_attention)
            + shift_attention
        )
        tokens = tokens + gate_attention * self.attention(hidden)
        hidden = F.layer_norm(tokens, tokens.shape[-1:], eps=1e-5) * (1 + scale_mlp) + shift_mlp
        first, _, last = self.ff["net"]
        return tokens + gate_mlp * last(F.gelu(first["proj"](hidden), approximate="tanh"))

    def attention(self, tokens: Tensor) -> Tensor:
        """Multi-head self-attention, (B, N, width) -> (B, N, width)."""
        q, k, v = (
            self.attn1[name](tokens).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for name in ("to_q", "to_k", "to_v")
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.attn1["to_out"][0](mixed)
