"""Representation autoencoder (RAE, arXiv 2510.11690): a frozen encoder and a ViT decoder.

The decoder is diffusers' `RAEDecoder`; its weights may have the names of RAE's published files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gmflow_core.models.position_features import grid_features
from gmflow_core.models.state_dict import check_shapes, shapes_of
from training.encoders.encoder import Encoder

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_rae import RAEDecoder

POSITIONS = "decoder_pos_embed"
RENAMES = {  # RAE's names of the attention -> diffusers'
    ".attention.attention.query.": ".attention.to_q.",
    ".attention.attention.key.": ".attention.to_k.",
    ".attention.attention.value.": ".attention.to_v.",
    ".attention.output.dense.": ".attention.to_out.0.",
}
NO_PICTURES = "this RAE has no decoder; name one in its rae.json to see pictures"


class RAE(nn.Module):
    """A frozen RAE in float32, with the members of `gmflow_core.models.vae.VAE`.

    Latents are normalised at every position: (latents - mean) / std.

    Args:
        encoder: encodes images to latents (D, h, w).
        decoder: decodes latents to images; None: latents cannot be decoded.
        mean: mean of the latents, broadcastable to (D, h, w); 0 if None.
        std: standard deviation of the latents, broadcastable to (D, h, w); 1 if None.

    Raises:
        ValueError: the decoder or the statistics do not fit the encoder's latents.
    """

    space = "rae"
    needs_noise = False  # latents are deterministic
    scaling_factor = 1.0

    def __init__(
        self,
        encoder: Encoder,
        decoder: RAEDecoder | None = None,
        mean: Tensor | None = None,
        std: Tensor | None = None,
    ):
        super().__init__()
        shape = (encoder.width, encoder.grid, encoder.grid)
        if decoder is not None:
            side = math.isqrt(decoder.num_patches)
            wanted = (decoder.decoder_embed.in_features, side, side)
            if wanted != shape:
                raise ValueError(
                    f"the decoder is for latents {wanted}, but the encoder makes {shape} of "
                    f"pictures of {encoder.input_size} pixels"
                )
        self.encoder, self.decoder = encoder, decoder
        # Pixels per latent pixel, per side
        self.factor: int = 16 if decoder is None else decoder.patch_size
        self.register_buffer("mean", check_statistic(mean, shape, "mean", torch.zeros(())))
        self.register_buffer("std", check_statistic(std, shape, "std", torch.ones(())))
        self.float().eval().requires_grad_(False)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return the latent shape (D, h, w) of an image.

        Raises:
            ValueError: the RAE is for images of another size.
        """
        side = self.encoder.grid * self.factor
        if (height, width) != (side, side):
            raise ValueError(
                f"pictures of {width}x{height} do not fit this RAE; it is for {side}x{side}"
            )
        return self.encoder.width, self.encoder.grid, self.encoder.grid

    @torch.no_grad()
    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Encode images (B, 3, H, W) in [-1, 1] to normalised latents (B, D, h, w).

        `noise` is ignored; it is there because `VAE.encode` takes one.
        """
        return self.normalise(self.encoder.latents(self.encoder(images)))

    @torch.no_grad()
    def encode_with_tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images as `encode`; return the tokens (B, D) of the whole images too."""
        hidden = self.encoder(images)
        return self.normalise(self.encoder.latents(hidden)), self.encoder.token(hidden)

    def normalise(self, latents: Tensor) -> Tensor:
        """Return (latents - mean) / std."""
        return (latents - self.mean) / self.std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode normalised latents (B, D, h, w) to images (B, 3, H, W), about [-1, 1], unclamped.

        Raises:
            ValueError: there is no decoder, or the latents have another shape.
        """
        if self.decoder is None:
            raise ValueError(NO_PICTURES)
        shape = (self.encoder.width, self.encoder.grid, self.encoder.grid)
        if tuple(latents.shape[1:]) != shape:
            raise ValueError(
                f"this RAE decodes latents {('B', *shape)}, not {tuple(latents.shape)}"
            )
        tokens = (latents.float() * self.std + self.mean).flatten(2).transpose(1, 2)  # (B, N, D)
        images = self.decoder.unpatchify(self.decoder(tokens).logits)
        return 2 * (images * self.encoder.image_std + self.encoder.image_mean) - 1


def check_statistic(
    value: Tensor | None, shape: tuple[int, ...], name: str, default: Tensor
) -> Tensor:
    """Return the latents' mean or std in float32, or `default` if there is none.

    Raises:
        ValueError: it does not broadcast to `shape`, is not finite, or is a std that is not
            positive.
    """
    if value is None:
        return default
    value = value.float()
    try:
        fits = torch.broadcast_shapes(value.shape, shape) == torch.Size(shape)
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"the latents' {name} is {tuple(value.shape)}, which does not fit latents {shape} of "
            "this encoder"
        )
    if not value.isfinite().all() or (name == "std" and not (value > 0).all()):
        positive = " and positive" if name == "std" else ""
        raise ValueError(f"the latents' {name} has values that are not finite{positive}")
    return value


def new_decoder(
    channels: int, grid: int, width: int, layers: int, heads: int, hidden: int, patch: int
) -> RAEDecoder:
    """Build RAE's ViT decoder, untrained.

    Args:
        channels: D of the latents.
        grid: tokens per side.
        width, layers, heads, hidden: of the transformer; `hidden` is the width of its MLPs.
        patch: pixels per token, per side.

    Raises:
        ModuleNotFoundError: diffusers is not installed, or older than 0.37.
    """
    try:
        from diffusers.models.autoencoders.autoencoder_rae import RAEDecoder
    except (ImportError, RuntimeError) as error:  # RuntimeError: from diffusers' lazy imports
        raise ModuleNotFoundError(
            f"an RAE's decoder needs diffusers 0.37 or newer ({error}): pip install -e '.[train]', "
            "and if the message names torchvision, uninstall it or install the build that matches "
            "torch"
        ) from error
    decoder = RAEDecoder(
        hidden_size=channels,
        decoder_hidden_size=width,
        decoder_num_hidden_layers=layers,
        decoder_num_attention_heads=heads,
        decoder_intermediate_size=hidden,
        num_patches=grid**2,
        patch_size=patch,
        image_size=grid * patch,
    )
    # diffusers' own positions equal RAE's for 16 x 16 tokens only.
    positions = torch.cat([torch.zeros(1, width), grid_features(grid, grid, width, grid)])
    decoder.decoder_pos_embed = positions.unsqueeze(0)  # (1, 1 + N, width), CLS first
    return decoder


def load_decoder(tensors: Mapping[str, Tensor], grid: int, heads: int) -> RAEDecoder:
    """Build the decoder that has these weights; its other sizes follow from the tensors.

    The prefix "decoder." is dropped and `RENAMES` is applied. The positions may be missing, as
    they can be computed, and so may the CLS token, which early decoders had as zeros.

    Args:
        tensors: state dict of RAE's GeneralDecoder, or of diffusers' AutoencoderRAE.
        grid: tokens per side.
        heads: attention heads.

    Raises:
        ModuleNotFoundError: see `new_decoder`.
        ValueError: the tensors are not such a decoder's; the message names one of them.
    """
    tensors = {
        name.removeprefix("decoder."): tensor
        for name, tensor in tensors.items()
        if name.startswith("decoder.")
    } or dict(tensors)
    for old, new in RENAMES.items():
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
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
            f"a decoder of width {width} cannot have {heads} heads; "
            "give their number in decoder_heads"
        )
    layers = sum(name.endswith(".layernorm_before.weight") for name in tensors)
    decoder = new_decoder(channels, grid, width, layers, heads, hidden, patch)
    expected = shapes_of(decoder.state_dict() | {POSITIONS: decoder.decoder_pos_embed})
    optional = {name: expected[name] for name in (POSITIONS, "trainable_cls_token")}
    target = f"a decoder of width {width} for {grid} x {grid} tokens"
    check_shapes(expected, optional | shapes_of(tensors), target)
    decoder.decoder_pos_embed = tensors.pop(POSITIONS, decoder.decoder_pos_embed)
    decoder.load_state_dict(tensors, strict=False)
    decoder.heads = heads
    return decoder
