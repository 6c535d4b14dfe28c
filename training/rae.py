"""The representation autoencoder (RAE, arXiv 2510.11690): a frozen vision transformer makes latents, a trained one pictures.

Wherever a VAE can be named (--vae), so can an RAE:

    rae-dinov2-b, rae-siglip2-b, rae-mae-b    the published ones, their parts fetched from the hub
    OWNER/NAME or FOLDER                      with config.json and safetensors of diffusers' AutoencoderRAE, such as
                                              nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08
    FOLDER                                    with rae.json, which names the parts: {"encoder": "facebook/vit-mae-base",
                                              "decoder": "decoder.safetensors", "statistics": "statistics.safetensors"}

An encoder is a folder or hub id for transformers; the other parts are files, in FOLDER or as OWNER/NAME/PATH on the hub, and
may be missing: without a decoder there are latents but no pictures. Statistics for images of one's own, to be named in such a
rae.json, and published DiT^DH networks (.pt) as GMFlow's checkpoints:

    python -m training.rae statistics --data IMAGES --vae FOLDER --out FOLDER/statistics.safetensors
    torchrun --nproc-per-node 8 -m training.rae statistics --data IMAGES --vae FOLDER --out FOLDER/statistics.safetensors
    python -m training.rae convert --source stage2_model.pt --out ditdh_xl.safetensors
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gmflow_core.models.features import grid_features
from training.latents import whole_file
from training.vae import WEIGHTS, download, hub_errors

PARTS, CONFIG = "rae.json", "config.json"
EPS = 1e-5  # added to the latents' variances
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5,) * 3, (0.5,) * 3)
NO_PICTURES = "this RAE has no decoder; name one in its rae.json to see pictures"


class Family(NamedTuple):
    """A kind of encoder, by its `model_type` in transformers."""

    model: str  # class of transformers
    config: str
    norm: str  # attribute of the last LayerNorm
    input_size: int  # side of the pictures that it is given
    normalisation: tuple[tuple[float, ...], tuple[float, ...]]  # mean and std of its pictures, of values in [0, 1]


FAMILIES = {
    "dinov2_with_registers": Family("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", "layernorm", 224, IMAGENET),
    "siglip_vision_model": Family("SiglipVisionModel", "SiglipVisionConfig", "post_layernorm", 256, HALF),
    "vit_mae": Family("ViTMAEModel", "ViTMAEConfig", "layernorm", 256, IMAGENET),
}
DIFFUSERS = {  # encoder_type of an AutoencoderRAE -> model_type, and the side of the pictures that its position table is for
    "dinov2": ("dinov2_with_registers", 518),
    "siglip2": ("siglip_vision_model", 256),
    "mae": ("vit_mae", 224),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """What an RAE is made of; the fields of rae.json.

    Args:
        encoder: folder or hub id of a model of transformers.
        decoder: file of the decoder's weights (.safetensors or .pt).
        statistics: file of the latents' mean and variance (.safetensors or .pt).
        decoder_heads: attention heads of the decoder, which its weights do not tell.
        input_size: side of the pictures that the encoder is given; that of its kind if None.
    """

    encoder: str
    decoder: str | None = None
    statistics: str | None = None
    decoder_heads: int = 16
    input_size: int | None = None


_COLLECTION = "nyu-visionx/RAE-collections"
PRESETS = {
    "rae-dinov2-b": Parts(
        encoder="facebook/dinov2-with-registers-base",
        decoder=f"{_COLLECTION}/decoders/dinov2/wReg_base/ViTXL_n08/model.pt",
        statistics=f"{_COLLECTION}/stats/dinov2/wReg_base/imagenet1k/stat.pt",
    ),
    "rae-siglip2-b": Parts(
        encoder="google/siglip2-base-patch16-256",
        decoder=f"{_COLLECTION}/decoders/siglip2/base_p16_i256/ViTXL_n08/model.pt",
        statistics=f"{_COLLECTION}/stats/siglip2/base_p16_i256/ImageNet1k/stat.pt",
    ),
    "rae-mae-b": Parts(
        encoder="facebook/vit-mae-base",
        decoder=f"{_COLLECTION}/decoders/mae/base_p16/ViTXL_n08/model.pt",
        statistics=f"{_COLLECTION}/stats/mae/base_p16/ImageNet1k/stat.pt",
    ),
}


class Encoder(nn.Module):
    """A frozen vision transformer in float32. Its last LayerNorm has no affine part, except for what `token` gives.

    Args:
        network: a model of transformers, of one of `FAMILIES`.
        input_size: side of the pictures that it is given.

    Raises:
        ValueError: the pictures do not divide into its patches.
    """

    def __init__(self, network: nn.Module, input_size: int | None = None):
        super().__init__()
        self.network = network.float().eval().requires_grad_(False)
        self.kind: str = network.config.model_type
        family = FAMILIES[self.kind]
        self.input_size = input_size or family.input_size
        patch = network.config.patch_size
        if self.input_size % patch:
            raise ValueError(f"input_size {self.input_size} is not divisible by the encoder's patches of {patch} pixels")
        self.grid = self.input_size // patch  # tokens a side
        self.width: int = network.config.hidden_size
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in family.normalisation)
        self.register_buffer("image_mean", mean)
        self.register_buffer("image_std", std)
        norm = getattr(self._body(), family.norm)
        self.register_buffer("scale", norm.weight.detach().clone())
        self.register_buffer("shift", norm.bias.detach().clone())
        nn.init.ones_(norm.weight)
        nn.init.zeros_(norm.bias)

    def _body(self) -> nn.Module:
        """Where the layers are: older versions of transformers wrap those of SigLIP once more."""
        return getattr(self.network, "vision_model", self.network)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """The last hidden states of pictures (B, 3, H, W) in [-1, 1]: (B, N, D), those of patches last, row by row."""
        x = images.float() / 2 + 0.5
        if x.shape[2:] != (self.input_size, self.input_size):
            x = F.interpolate(x, (self.input_size, self.input_size), mode="bicubic")
        x = (x - self.image_mean) / self.image_std
        settings = {}
        if self.kind != "dinov2_with_registers":
            settings["interpolate_pos_encoding"] = True
        if self.kind == "vit_mae":  # the order of its tokens; with a mask_ratio of 0 it keeps all
            settings["noise"] = torch.arange(self.grid**2, dtype=x.dtype, device=x.device).expand(len(x), -1)
        return self.network(pixel_values=x, **settings).last_hidden_state

    def latents(self, hidden: Tensor) -> Tensor:
        """The tokens of the patches, (B, D, h, w)."""
        return hidden[:, -(self.grid**2) :].transpose(1, 2).unflatten(2, (self.grid, self.grid))

    @torch.no_grad()
    def token(self, hidden: Tensor) -> Tensor:
        """One token (B, D) for each picture, as the encoder was trained to give it: CLS, or SigLIP's pooled output."""
        if self.kind == "siglip_vision_model":
            return self._body().head(hidden * self.scale + self.shift)
        return hidden[:, 0] * self.scale + self.shift


class Decoder(nn.Module):
    """RAE's ViT decoder: tokens to pictures. Parameters are named as in its published files, whose layers are those of ViT-MAE.

    Args:
        channels: C of the latents.
        grid: tokens a side.
        width, layers, heads, hidden: of the transformer; `hidden` is the MLP's width.
        patch: pixels of a token, a side.
    """

    def __init__(self, channels: int, grid: int, width: int, layers: int, heads: int, hidden: int, patch: int):
        super().__init__()
        self.channels, self.grid, self.patch = channels, grid, patch
        self.decoder_embed = nn.Linear(channels, width)
        self.trainable_cls_token = nn.Parameter(torch.zeros(1, 1, width))
        positions = torch.cat([torch.zeros(1, width), grid_features(grid, grid, width, grid)])
        self.register_buffer("decoder_pos_embed", positions.unsqueeze(0))
        self.decoder_layers = nn.ModuleList(DecoderLayer(width, heads, hidden) for _ in range(layers))
        self.decoder_norm = nn.LayerNorm(width, eps=1e-12)
        self.decoder_pred = nn.Linear(width, 3 * patch**2)

    def forward(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 3, h * patch, w * patch), as the encoder is given its pictures."""
        x = self.decoder_embed(latents.flatten(2).transpose(1, 2))
        x = torch.cat([self.trainable_cls_token.expand(len(x), -1, -1), x], 1) + self.decoder_pos_embed
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
        names = {".to_q.": ".attention.query.", ".to_k.": ".attention.key.", ".to_v.": ".attention.value."}
        names[".to_out.0."] = ".output.dense."
        tensors = {k.removeprefix("decoder."): t for k, t in tensors.items() if k.startswith("decoder.")} or dict(tensors)
        for old, new in names.items():
            tensors = {name.replace(".attention" + old, ".attention" + new): tensor for name, tensor in tensors.items()}
        try:
            width, channels = tensors["decoder_embed.weight"].shape
            hidden = len(tensors["decoder_layers.0.intermediate.dense.weight"])
            patch = math.isqrt(len(tensors["decoder_pred.weight"]) // 3)
        except KeyError as error:
            raise ValueError(f"an RAE's decoder has a tensor {error}, which is not among the {len(tensors)} found") from error
        if width % heads or width % 4:
            raise ValueError(f"a decoder of width {width} cannot have {heads} heads; say how many in decoder_heads")
        layers = sum(name.endswith(".layernorm_before.weight") for name in tensors)
        decoder = cls(channels, grid, width, layers, heads, hidden, patch)
        expected = {name: tuple(t.shape) for name, t in decoder.state_dict().items()}
        found = {name: tuple(t.shape) for name, t in tensors.items()}
        found = {name: expected[name] for name in ("trainable_cls_token", "decoder_pos_embed")} | found
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
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
        projections = nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")})
        mixed = nn.ModuleDict({"dense": nn.Linear(width, width)})
        self.layernorm_before = nn.LayerNorm(width, eps=1e-12)
        self.attention = nn.ModuleDict({"attention": projections, "output": mixed})
        self.layernorm_after = nn.LayerNorm(width, eps=1e-12)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, hidden)})
        self.output = nn.ModuleDict({"dense": nn.Linear(hidden, width)})

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, width) -> (B, N, width)."""
        normed, projections = self.layernorm_before(x), self.attention["attention"]
        q, k, v = (projections[n](normed).unflatten(-1, (self.heads, -1)).transpose(1, 2) for n in ("query", "key", "value"))
        x = x + self.attention["output"]["dense"](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
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

    def __init__(self, encoder: Encoder, decoder: Decoder | None = None, mean: Tensor | None = None, std: Tensor | None = None):
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
            raise ValueError(f"pictures of {width}x{height} do not fit this RAE; it is for {side}x{side}")
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
            raise ValueError(f"this RAE decodes latents {('B', *shape)}, not {tuple(latents.shape)}")
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
        raise ValueError(f"the latents' {name} is {tuple(value.shape)}, which does not fit latents {shape} of this encoder")
    if not value.isfinite().all() or (name == "std" and not (value > 0).all()):
        raise ValueError(f"the latents' {name} has values that are not finite{' and positive' if name == 'std' else ''}")
    return value


class RunningStatistics:
    """Mean and variance of every entry of latents, in one pass: moments of each batch in float32 about its own mean, of all in
    float64 (Chan et al. 1979).

    Args:
        shape: (C, h, w).
    """

    def __init__(self, shape: tuple[int, ...]):
        self.count = torch.zeros((), dtype=torch.float64)
        self.mean = torch.zeros(shape, dtype=torch.float64)
        self.squares = torch.zeros(shape, dtype=torch.float64)  # sum of squared distances from the mean

    def update(self, latents: Tensor) -> None:
        """Take in (B, C, h, w).

        Raises:
            FloatingPointError: they are not finite.
        """
        var, mean = torch.var_mean(latents.float(), 0, correction=0)
        mean, squares = mean.cpu().double(), var.cpu().double() * len(latents)
        if not (mean.isfinite().all() and squares.isfinite().all()):
            raise FloatingPointError("the encoder gives latents that are not finite; its weights are damaged: get them again")
        total = self.count + len(latents)
        difference = mean - self.mean
        self.squares += squares + difference**2 * (self.count * len(latents) / total)
        self.mean += difference * (len(latents) / total)
        self.count = total

    def reduce(self, device: torch.device) -> None:
        """Add up what all processes have taken in; every process has the sum then."""
        if not torch.distributed.is_initialized():
            return
        total, mean = self.count.to(device), (self.count * self.mean).to(device)
        torch.distributed.all_reduce(total)
        torch.distributed.all_reduce(mean)
        mean /= total
        squares = self.squares.to(device) + self.count.to(device) * (self.mean.to(device) - mean) ** 2
        torch.distributed.all_reduce(squares)
        self.count, self.mean, self.squares = total.cpu(), mean.cpu(), squares.cpu()

    def save(self, path: str | Path) -> None:
        """Write the file that `load_statistics` reads, with "mean" and "var"."""
        with whole_file(Path(path)) as temporary:
            save_file({"mean": self.mean.float(), "var": (self.squares / self.count).float()}, temporary)


def load_statistics(path: Path) -> tuple[Tensor | None, Tensor | None]:
    """Mean and standard deviation of the latents from a file with "mean" and "var", of which one may be missing.

    Raises:
        ValueError: it holds neither, or negative variances.
    """
    tensors = read_tensors(path)
    mean, var = tensors.get("mean"), tensors.get("var")
    if mean is None and var is None:
        raise ValueError(f"{path} holds {sorted(tensors)[:4]} instead of mean and var; it is no file of latents' statistics")
    if var is not None and not (var >= 0).all():
        raise ValueError(f"{path} has variances that are negative or not finite; the file is damaged")
    return mean, None if var is None else (var.float() + EPS).sqrt()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a PyTorch file, of which nothing else is loaded; of the averaged weights if it
    has several.

    Raises:
        ValueError: it is damaged, or holds other things.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
        for name in ("ema", "model", "state_dict"):
            if isinstance(content, dict) and isinstance(content.get(name), dict):
                content = content[name]
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); get it again") from error
    except Exception as error:  # unpickling raises many kinds
        raise ValueError(f"{path} is not a PyTorch file of tensors alone, which is all that is loaded ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__} instead of named tensors")
    return {name: t for name, t in content.items() if isinstance(t, Tensor)}


def is_rae(source: str | Path) -> bool:
    """Whether `source` names an RAE: one of `PRESETS`, or a folder that holds one."""
    folder = Path(source)
    return str(source) in PRESETS or (folder / PARTS).exists() or _diffusers_config(folder) is not None


def load_rae(source: str | Path, device: str | torch.device = "cpu") -> RAE:
    """Read an RAE.

    Args:
        source: one of `PRESETS`; a folder with rae.json or an AutoencoderRAE; or the hub's name of an AutoencoderRAE.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        FileNotFoundError: a part is missing, or the hub cannot be reached; the message says what to do.
        ValueError: the files are not an RAE's, or do not fit each other.
    """
    folder = Path(source)
    if str(source) not in PRESETS and not folder.is_dir():
        folder = download(str(source))
    config = _diffusers_config(folder)
    if config is not None:
        return _load_diffusers(folder, config).to(device)
    parts = PRESETS[str(source)] if str(source) in PRESETS else read_parts(folder)
    encoder = load_encoder(_place(parts.encoder, folder), parts.input_size)
    decoder, mean, std = None, None, None
    if parts.decoder is not None:
        path = find_file(parts.decoder, folder)
        try:
            decoder = Decoder.from_tensors(read_tensors(path), encoder.grid, parts.decoder_heads)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    if parts.statistics is not None:
        mean, std = load_statistics(find_file(parts.statistics, folder))
    return RAE(encoder, decoder, mean, std).to(device)


def read_parts(folder: Path) -> Parts:
    """What rae.json says.

    Raises:
        FileNotFoundError, ValueError: there is none, or it says something else.
    """
    path = folder / PARTS
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no RAE: neither {PARTS} nor the {CONFIG} of an AutoencoderRAE")
    try:
        return Parts(**json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        known = ", ".join(field.name for field in dataclasses.fields(Parts))
        raise ValueError(f"{path} is not an object with some of {known} ({error})") from error


def _place(name: str, folder: Path) -> str:
    """A path inside `folder` if there is one of that name, else the name."""
    return str(folder / name) if (folder / name).exists() else name


def find_file(name: str, folder: Path) -> Path:
    """The file of that name in `folder`, or OWNER/NAME/PATH from the hub.

    Raises:
        FileNotFoundError: it is in neither.
    """
    if (folder / name).is_file():
        return folder / name
    owner, _, rest = name.partition("/")
    repository, _, inside = rest.partition("/")
    if not (owner and repository and inside):
        raise FileNotFoundError(f"there is no file {folder / name}, which {folder / PARTS} names; put it there")
    from huggingface_hub import hf_hub_download

    with hub_errors(f"{owner}/{repository}", inside):
        return Path(hf_hub_download(f"{owner}/{repository}", inside))


def load_encoder(source: str, input_size: int | None = None) -> Encoder:
    """Read a frozen encoder; transformers fetches what is not on the disk.

    Args:
        source: folder or hub id of DINOv2 with registers, SigLIP or SigLIP 2 of one picture size, or ViT-MAE.
        input_size: side of the pictures that it is given; that of its kind if None.

    Raises:
        ModuleNotFoundError, FileNotFoundError, ValueError: as `load_rae`.
    """
    transformers = _transformers()
    if Path(source).is_dir() and not (Path(source) / CONFIG).exists():
        raise FileNotFoundError(f"{source} holds no encoder: there is no {CONFIG}; give a folder in transformers' layout")
    try:
        config = transformers.AutoConfig.from_pretrained(source)
        config = getattr(config, "vision_config", config)
        if config.model_type not in FAMILIES:
            raise ValueError(f"it is a {config.model_type}; encoders are {', '.join(FAMILIES)}")
        return Encoder(_network(source, config), input_size)
    except OSError as error:
        raise FileNotFoundError(
            f"there is no whole encoder {source}: neither a folder with {CONFIG} and model.safetensors, nor to be had from the "
            f"hub ({error}). Download it elsewhere (hf download NAME --local-dir FOLDER) and give the folder"
        ) from error
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"the encoder {source} cannot be used: {error}") from error


def _network(source: str | None, config, tensors: dict[str, Tensor] | None = None) -> nn.Module:
    """A model of transformers from its place, or of these tensors; a last norm without affine part may be missing.

    Raises:
        ValueError: other tensors are missing.
    """
    transformers, family = _transformers(), FAMILIES[config.model_type]
    if config.model_type == "vit_mae":
        config.mask_ratio = 0.0
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it reports the text encoders that are left out
    try:
        network, report = getattr(transformers, family.model).from_pretrained(
            source, config=config, state_dict=tensors, output_loading_info=True
        )
    finally:
        transformers.logging.set_verbosity(verbosity)
    allowed = (f"{family.norm}.weight", f"{family.norm}.bias") if tensors is not None else ()
    missing = sorted(name for name in report["missing_keys"] if not name.endswith(allowed))
    if missing:
        raise ValueError(f"{len(missing)} tensors of the {family.model} are missing, first {missing[0]}")
    return network


def _transformers():
    try:
        import transformers
    except ImportError as error:
        raise ModuleNotFoundError(f"an RAE needs transformers ({error}): pip install -e '.[train]'") from error
    return transformers


def _diffusers_config(folder: Path) -> dict | None:
    """The config of an AutoencoderRAE in diffusers' layout, if that is what the folder holds."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        return config if config.get("_class_name") == "AutoencoderRAE" else None
    return None


def _load_diffusers(folder: Path, config: dict) -> RAE:
    """An RAE in the layout of diffusers' AutoencoderRAE, whose `_latents_std` is sqrt(var + EPS) of the original statistics."""
    path = folder / f"{WEIGHTS}.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"{folder} has a {CONFIG} but no {path.name}; copy the weights there too")
    tensors = read_tensors(path)
    transformers = _transformers()
    try:
        kind, table = DIFFUSERS[config["encoder_type"]]
        encoder_config = getattr(transformers, FAMILIES[kind].config)(
            hidden_size=config["encoder_hidden_size"],
            num_hidden_layers=config["encoder_num_hidden_layers"],
            num_attention_heads=config["encoder_hidden_size"] // 64,
            patch_size=config["encoder_patch_size"],
            image_size=table,
        )
        weights = {name.removeprefix("encoder."): t for name, t in tensors.items() if name.startswith("encoder.")}
        encoder = Encoder(_network(None, encoder_config, weights), config["encoder_input_size"])
        decoder = Decoder.from_tensors(tensors, encoder.grid, config["decoder_num_attention_heads"])
        return RAE(encoder, decoder, tensors.get("_latents_mean"), tensors.get("_latents_std"))
    except KeyError as error:
        raise ValueError(f"{folder / CONFIG} lacks {error}, or has a value of it that this version does not know") from error
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def statistics(
    data: Path,
    out: Path,
    vae: str = "rae-dinov2-b",
    flip: bool = True,
    batch_size: int = 32,
    workers: int = 4,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Measure mean and variance of an RAE's latents, at every position.

    Args:
        data: Folder of images, as training.prepare takes it.
        out: File to write, .safetensors.
        vae: The RAE; statistics that it has are not applied.
        flip: Mirror every other image, by chance.
        batch_size: Images at a time, on each process.
        workers: Processes that decode images, for each GPU.
        seed: Seed of the flips.
        device: auto (what accelerate finds) or cpu.
    """
    from accelerate import PartialState
    from torch.utils.data import DataLoader
    from tqdm import tqdm

    from training.devices import on_cpu
    from training.latents import to_model
    from training.prepare import ImageCrops, collate, list_images

    state = PartialState(cpu=on_cpu(device))
    images = list_images(data)
    with state.local_main_process_first():
        rae = load_rae(vae, state.device)
    side = rae.encoder.grid * rae.factor
    crops = ImageCrops(images, side, flip, seed, None)
    mine = range(state.process_index, len(crops), state.num_processes)
    batches = [list(mine[i : i + batch_size]) for i in range(0, len(mine), batch_size)]
    loader = DataLoader(crops, batch_sampler=batches, num_workers=workers, collate_fn=collate)
    running = RunningStatistics(rae.latent_shape(side, side))
    for batch in tqdm(loader, disable=not state.is_main_process, dynamic_ncols=True):
        for item in batch.failed:
            if item.fatal:
                raise OSError(item.reason)
        if batch.indices:
            running.update(rae.encoder.latents(rae.encoder(to_model(batch.pixels.to(state.device)))))
    running.reduce(state.device)
    if running.count < 2:
        raise ValueError(f"{data} has {int(running.count)} images that can be read; statistics need at least 2")
    if state.is_main_process:
        running.save(out)
        print(f'{out}: mean and variance of {int(running.count):,} latents; name the file in rae.json as "statistics"')


def convert(source: Path, out: Path, null_class: bool = True) -> None:
    """Write a published DiT^DH network as a checkpoint of GMFlow, in float32.

    Args:
        source: Its state dict, .pt or .safetensors; of the averaged weights if the file has several.
        out: File to write, .safetensors.
        null_class: Whether the last row of its label embedding stands for no label, as after training with label dropout.
    """
    from gmflow_core.checkpoint import save_checkpoint
    from gmflow_core.models.ddt import DiTDH

    if not source.exists():
        raise FileNotFoundError(f"there is no {source}; download it first (hf download {_COLLECTION} --local-dir FOLDER)")
    network = DiTDH.from_published(read_tensors(source), null_class)
    save_checkpoint(network, out, data={"space": RAE.space})
    print(f"{out}: {network.config}")


def main(arguments: list[str] | None = None) -> None:
    import tyro

    try:
        tyro.extras.subcommand_cli_from_dict(
            {"statistics": statistics, "convert": convert}, prog="python -m training.rae", description=__doc__, args=arguments
        )
    except (ValueError, OSError, FloatingPointError, ModuleNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
