"""The networks of a representation autoencoder (RAE, arXiv 2510.11690): a frozen vision transformer that makes latents, and a
trained one that makes pictures of them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmflow_core.models.position_features import grid_features
from training.encoders.encoder import Encoder

NO_PICTURES = "this RAE has no decoder; name one in its rae.json to see pictures"


class Decoder(nn.Module):
    """RAE's ViT decoder: tokens to pictures. Parameters are named as in its published files, whose layers are those of ViT-MAE.

    Args:
        channels: C of the latents.
        grid: tokens a side.
        width, layers, heads, hidden: of the transformer; `hidden` is the MLP's width.
        patch: pixels of a token, a side.
    """

    def __init__(
        self, channels: int, grid: int, width: int, layers: int, heads: int, hidden: int, patch: int
    ):
        super().__init__()
        self.channels, self.grid, self.patch = channels, grid, patch
        self.decoder_embed = nn.Linear(channels, width)
        self.trainable_cls_token = nn.Parameter(torch.zeros(1, 1, width))
        positions = torch.cat([torch.zeros(1, width), grid_features(grid, grid, width, grid)])
        self.register_buffer("decoder_pos_embed", positions.unsqueeze(0))
        self.decoder_layers = nn.ModuleList(
            DecoderLayer(width, heads, hidden) for _ in range(layers)
        )
        self.decoder_norm = nn.LayerNorm(width, eps=1e-12)
        self.decoder_pred = nn.Linear(width, 3 * patch**2)

    def forward(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 3, h * patch, w * patch), as the encoder is given its pictures."""
        x = self.decoder_embed(latents.flatten(2).transpose(1, 2))
        x = (
            torch.cat([self.trainable_cls_token.expand(len(x), -1, -1), x], 1)
            + self.decoder_pos_embed
        )
        for layer in self.decoder_layers:
            x = layer(x)
        x = self.decoder_pred(self.decoder_norm(x))[:, 1:]
        x = x.unflatten(2, (self.patch, self.patch, 3)).unflatten(1, (self.grid, self.grid))
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], grid: int, heads: int) -> Decoder:
        """The decoder with these weights; its other sizes are those of the tensors. Prefixes "decoder." are dropped, and
        diffusers' names of the attention translated. What is computed (the positions), and CLS, which early decoders had as
        0, may be missing.

        Raises:
            ValueError: they are not such a decoder's; the message names a tensor.
        """
        names = {
            ".to_q.": ".attention.query.",
            ".to_k.": ".attention.key.",
            ".to_v.": ".attention.value.",
        }
        names[".to_out.0."] = ".output.dense."
        tensors = {
            k.removeprefix("decoder."): t for k, t in tensors.items() if k.startswith("decoder.")
        } or dict(tensors)
        for old, new in names.items():
            tensors = {
                name.replace(".attention" + old, ".attention" + new): tensor
                for name, tensor in tensors.items()
            }
        try:
            width, channels = tensors["decoder_embed.weight"].shape
            hidden = len(tensors["decoder_layers.0.intermediate.dense.weight"])
            patch = math.isqrt(len(tensors["decoder_pred.weight"]) // 3)
        except KeyError as error:
            raise ValueError(
                f"an RAE's decoder has a tensor {error}, which is not among the {len(tensors)} found"
            ) from error
        if width % heads or width % 4:
            raise ValueError(
                f"a decoder of width {width} cannot have {heads} heads; say how many in decoder_heads"
            )
        layers = sum(name.endswith(".layernorm_before.weight") for name in tensors)
        decoder = cls(channels, grid, width, layers, heads, hidden, patch)
        expected = {name: tuple(t.shape) for name, t in decoder.state_dict().items()}
        found = {name: tuple(t.shape) for name, t in tensors.items()}
        found = {
            name: expected[name] for name in ("trainable_cls_token", "decoder_pos_embed")
        } | found
        wrong = sorted(
            name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
        )
        if wrong:
            raise ValueError(
                f"{len(wrong)} tensors do not fit a decoder of width {width} for {grid} x {grid} tokens, first {wrong[0]!r}: "
                f"expected {expected.get(wrong[0], 'none')}, found {found.get(wrong[0], 'none')}"
            )
        decoder.load_state_dict(tensors, strict=False)
        return decoder


class DecoderLayer(nn.Module):
    """A transformer layer with its norms in front."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.heads = heads
        projections = nn.ModuleDict(
            {name: nn.Linear(width, width) for name in ("query", "key", "value")}
        )
        mixed = nn.ModuleDict({"dense": nn.Linear(width, width)})
        self.layernorm_before = nn.LayerNorm(width, eps=1e-12)
        self.attention = nn.ModuleDict({"attention": projections, "output": mixed})
        self.layernorm_after = nn.LayerNorm(width, eps=1e-12)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, hidden)})
        self.output = nn.ModuleDict({"dense": nn.Linear(hidden, width)})

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, width) -> (B, N, width)."""
        normed, projections = self.layernorm_before(x), self.attention["attention"]
        q, k, v = (
            projections[n](normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for n in ("query", "key", "value")
        )
        x = x + self.attention["output"]["dense"](
            F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        )
        return x + self.output["dense"](F.gelu(self.intermediate["dense"](self.layernorm_after(x))))


class RAE(nn.Module):
    """A frozen RAE in float32, with the interface of `training.vae.VAE`; its latents are normalised for each position.

    Args:
        decoder: None: latents cannot be decoded.
        mean, std: of the latents, broadcastable to (C, h, w); None: not subtracted, not divided by.

    Raises:
        ValueError: the parts do not fit each other.
    """

    space = "rae"
    needs_noise = False  # latents are no samples
    scaling_factor = 1.0

    def __init__(
        self,
        encoder: Encoder,
        decoder: Decoder | None = None,
        mean: Tensor | None = None,
        std: Tensor | None = None,
    ):
        super().__init__()
        shape = (encoder.width, encoder.grid, encoder.grid)
        if decoder is not None and (decoder.channels, decoder.grid, decoder.grid) != shape:
            raise ValueError(
                f"the decoder is for latents {(decoder.channels, decoder.grid, decoder.grid)}, but the encoder makes {shape} "
                f"of pictures of {encoder.input_size} pixels"
            )
        self.encoder, self.decoder = encoder, decoder
        self.factor = 16 if decoder is None else decoder.patch  # pixels per latent pixel, each way
        self.register_buffer("mean", _statistic(mean, shape, "mean", torch.zeros(())))
        self.register_buffer("std", _statistic(std, shape, "std", torch.ones(())))
        self.float().eval().requires_grad_(False)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latent of a picture.

        Raises:
            ValueError: pictures of this size are not what the RAE is for.
        """
        side = self.encoder.grid * self.factor
        if (height, width) != (side, side):
            raise ValueError(
                f"pictures of {width}x{height} do not fit this RAE; it is for {side}x{side}"
            )
        return self.encoder.width, self.encoder.grid, self.encoder.grid

    @torch.no_grad()
    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Normalised latents (B, C, h, w) of pictures (B, 3, H, W) in [-1, 1]; `noise` is not used."""
        return self.normalise(self.encoder.latents(self.encoder(images)))

    @torch.no_grad()
    def encode_with_token(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What `encode` gives, and the token (B, D) that speaks for each picture as a whole."""
        hidden = self.encoder(images)
        return self.normalise(self.encoder.latents(hidden)), self.encoder.token(hidden)

    def normalise(self, latents: Tensor) -> Tensor:
        return (latents - self.mean) / self.std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) of normalised latents (B, C, h, w); about [-1, 1], not clamped.

        Raises:
            ValueError: there is no decoder, or the latents are of another shape.
        """
        if self.decoder is None:
            raise ValueError(NO_PICTURES)
        shape = (self.encoder.width, self.encoder.grid, self.encoder.grid)
        if tuple(latents.shape[1:]) != shape:
            raise ValueError(
                f"this RAE decodes latents {('B', *shape)}, not {tuple(latents.shape)}"
            )
        images = self.decoder(latents.float() * self.std + self.mean)
        return 2 * (images * self.encoder.image_std + self.encoder.image_mean) - 1


def _statistic(value: Tensor | None, shape: tuple[int, ...], name: str, default: Tensor) -> Tensor:
    if value is None:
        return default
    value = value.float()
    try:
        fits = torch.broadcast_shapes(value.shape, shape) == torch.Size(shape)
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"the latents' {name} is {tuple(value.shape)}, which does not fit latents {shape} of this encoder"
        )
    if not value.isfinite().all() or (name == "std" and not (value > 0).all()):
        raise ValueError(
            f"the latents' {name} has values that are not finite{' and positive' if name == 'std' else ''}"
        )
    return value
