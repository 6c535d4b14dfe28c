"""Sample class-conditional models and say how good the samples are, at one setting or over a sweep:

    python -m training.evaluate --checkpoint A.safetensors --data data/imagenet_256 --preset paper        # one GPU, or the CPU
    torchrun --nproc-per-node 8 -m training.evaluate --checkpoint A.safetensors --data data/imagenet_256  # eight GPUs
    python -m training.evaluate --checkpoint Lakonik/gmflow_imagenet_k8_ema --reference VIRTUAL_imagenet256_labeled.npz
    python -m training.evaluate --checkpoint k8.safetensors k1.safetensors --data data/digits_train \\
        --test-data data/digits_test --features outputs/digits_features.safetensors --saturation digits --count 2000 \\
        --solver euler dpmpp-2m gm-ode gm-sde --steps 2 4 8 32 --guidance 0 .1 .2 --cfg 1.5 2 3 --device cpu

Every checkpoint is sampled with every solver, number of steps, and guidance: weights of probabilistic guidance and scales of
classifier-free guidance. Image i gets a label and its noise from its own seed, so that neither the batch size nor the number
of processes matters, and all settings see the same labels and noise.

OUT/results.json and .csv hold, for each setting: Fréchet distance, inception score, precision, recall, class accuracy, colour
saturation, network calls, and seconds; beside them the same figures of real images (--test-data), which no model can be
expected to beat. Plots and a sheet of samples of each setting lie there too. Stopped in any way and started again, it keeps
the settings that are finished and the samples that it has.

Features are Inception's, through torch-fidelity; or those of a small classifier (--features FILE.safetensors), which is
trained on --data first if the file does not exist.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import shutil
import sys
import time
import zlib
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import torch
import tyro
from accelerate import PartialState
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from gmflow_core.checkpoint import load_checkpoint, read_metadata
from gmflow_core.guidance import Guidance
from gmflow_core.images import sample_images
from gmflow_core.path import flow_sigmas
from gmflow_core.published import is_published, published_weights
from gmflow_core.solvers import SOLVERS, SUBSTEPS
from gmflow_core.source import GaussianMixtureSource, load_source
from training.devices import on_cpu
from training.digits import saturation_distance
from training.evaluate_report import METRICS, sheet, write_csv, write_plots
from training.features import ClassifierFeatures, Extractor, InceptionFeatures, read_tensors, train_classifier
from training.latents import INDEX, LatentDataset, to_pixels, whole_file
from training.metrics import Measures, Reference, Statistics, measure, read_npz, score, statistics
from training.prepare import centre_crop
from training.vae import SD_VAE, VAE, load_vae

FORMAT = "gmflow-evaluation-1"
SWEEP = (0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.11, 0.13, 0.16, 0.19, 0.23, 0.27, 0.33, 0.39, 0.47, 0.55, 0.65, 0.75)
IMAGE_FILES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".JPEG")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Evaluation. The defaults shown are those of the chosen preset."""

    preset: Literal["default", "paper"] = "default"
    """Where the other defaults come from; paper: GM-ODE 2 and GM-SDE 2 at 8 and 32 steps, 20 guidance weights."""
    checkpoint: tuple[str, ...] = ()
    """Models: files, folders in diffusers' layout, or the hub's names of them."""
    data: Path | None = None
    """Prepared training data (training.prepare): the reference, and what --features is trained on. Not needed for a model that
    says what its samples are, with --reference and Inception or a classifier that exists."""
    test_data: Path | None = None
    """Prepared data of images that were not trained on: the floor of all figures, and the test of --features."""
    reference: Path | None = None
    """Compare with this instead of --data: an .npz (ADM's, or mu and sigma), a folder of images, or a prepared folder."""
    reference_count: int = 50_000
    """So many images of the reference at most, chosen by chance; precision and recall use as many as --count."""
    features: str = "inception"
    """inception, or a .safetensors file of a small classifier (up to 64 x 64 pixels), trained first if it does not exist."""
    feature_iterations: int = 1200
    """Iterations that a small classifier is trained for."""
    inception_weights: Path | None = None
    """torch-fidelity's weight file; downloaded if not given."""
    saturation: Literal["reference", "digits"] = "reference"
    """Compare saturations with the reference images', or with the known distribution of training.digits."""
    count: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 50_000
    """Samples of each setting."""
    solver: tuple[Literal["gm-ode", "gm-sde", "euler", "dpmpp-2m"], ...] = ("gm-ode",)
    """Solvers; euler and dpmpp-2m follow the mixture's mean."""
    steps: tuple[int, ...] = (8,)
    """Numbers of steps, each of one network call."""
    guidance: tuple[float, ...] = ()
    """Weights of probabilistic guidance, in [0, 1); 0 is none."""
    cfg: tuple[float, ...] = ()
    """Scales of classifier-free guidance, 1 or more; 1 is none."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """The sigmas between which guidance acts."""
    substeps: int | None = None
    """GM-ODE's substeps in a step, by default 128 in all, and 4 at least; the GM policy's in all."""
    order: Literal[1, 2] = 2
    """Order of GM-ODE and GM-SDE."""
    shift: float = 1.0
    """Shift of the time grid."""
    source: str | None = None
    """The mixture source that the models were trained with: file, folder or hub id; modes by weight."""
    unlabelled: bool = False
    """Sample with the label for none; models of a source that hides its modes, which classes do not know of, are sampled so."""
    guide: str | None = None
    """A weaker model for autoguidance, with the same labels or modes."""
    guide_scale: float = 1.5
    """Of autoguidance; 1 is none."""
    end: float = 0.0
    """Last time of the grid, before the shift; MM-FM takes 0.001, with 49 steps."""
    vae: str | None = None
    """For latents: the VAE's folder or its name on the hub; by default what the data was prepared with."""
    seed: int = 0
    """Image i of seed 0 has the seed i; other seeds have other images."""
    batch_size: int = 100
    """Images that a process samples at a time."""
    chunk_size: int = 500
    """Images in a file; what a stop can lose."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """The network's weights in float32 or bfloat16; the mixtures are float32 either way."""
    device: str = "auto"
    """auto (what accelerate finds) or cpu."""
    out: Path = Path("outputs/evaluation")
    """Folder for samples, results and plots; what is whole there is kept. Several machines need to share it."""
    discard_samples: bool = False
    """Delete the samples of a setting once its figures are known; at 256 x 256, 50,000 take 10 GB."""
    restart: bool = False
    """Throw away the samples and results found in OUT."""

    def __post_init__(self):
        for name in ("batch_size", "chunk_size", "feature_iterations", "substeps"):
            if (getattr(self, name) if getattr(self, name) is not None else 1) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        for name in ("count", "reference_count"):
            if getattr(self, name) < 2:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; statistics need at least 2 images")
        for name in ("solver", "steps"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is empty; give at least one")
        for solver in self.solver:
            if solver not in SOLVERS:
                raise ValueError(f"--solver {solver} is unknown; choose of {', '.join(SOLVERS)}")
        if min(self.steps) < 1:
            raise ValueError(f"--steps has {min(self.steps)}; each must be at least 1")
        for weight in self.guidance:
            if not 0 <= weight < 1:
                raise ValueError(
                    f"--guidance has {weight}; weights of probabilistic guidance are in [0, 1) (is it a --cfg scale?)"
                )
        for scale in self.cfg:
            if not 1 <= scale < math.inf:
                raise ValueError(
                    f"--cfg has {scale}; scales of classifier-free guidance are 1 or more (is it a --guidance weight?)"
                )
        Guidance(0.0, interval=self.guidance_interval)
        if self.seed < 0:
            raise ValueError(f"--seed is {self.seed}; it must be 0 or more")
        if not self.shift > 0:
            raise ValueError(f"--shift is {self.shift}; it must be positive")
        if self.features != "inception" and not self.features.endswith(".safetensors"):
            raise ValueError(
                f"--features is {self.features!r}; give inception, or for the small classifier a file name that ends in "
                ".safetensors"
            )
        if self.device not in ("auto", "cpu"):
            raise ValueError(f"--device is {self.device!r}; give auto or cpu (choose a GPU with CUDA_VISIBLE_DEVICES)")


PRESETS = {"default": Config(), "paper": Config(preset="paper", solver=("gm-ode", "gm-sde"), steps=(8, 32), guidance=SWEEP)}


def parse(arguments: list[str]) -> Config:
    """The preset, then whatever the command line changes of it."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--preset", default="default")
    preset = PRESETS.get(finder.parse_known_args(arguments)[0].preset, Config())
    return tyro.cli(Config, default=preset, args=arguments, prog="python -m training.evaluate", description=__doc__)


@dataclasses.dataclass(frozen=True)
class Setting:
    """One point of a sweep.

    Args:
        model: position in the list of checkpoints.
        checkpoint: its short name.
        guidance: "none", "probabilistic" or "cfg".
        scale: the guidance's; 0 for none.
    """

    model: int
    checkpoint: str
    solver: str
    steps: int
    guidance: str = "none"
    scale: float = 0.0

    @property
    def name(self) -> str:
        """Its folder, and its name in the results."""
        guidance = {"none": "", "probabilistic": f"_w{self.scale:g}", "cfg": f"_cfg{self.scale:g}"}[self.guidance]
        return f"{self.checkpoint}_{self.solver}_{self.steps}{guidance}"

    def substeps(self, config: Config) -> int | None:
        """GM-ODE's substeps in a step, the GM policy's in all; None for other solvers."""
        if self.solver not in SUBSTEPS:
            return None
        if self.solver == "gm-policy":
            return config.substeps or SUBSTEPS["gm-policy"]
        return config.substeps if config.substeps is not None else max(4, 128 // self.steps)


def settings_of(config: Config) -> list[Setting]:
    """All that the command asks for, without guidance first; without guidance is one setting, however it is spelt."""
    kinds = [("probabilistic", w) for w in config.guidance] + [("cfg", s) for s in config.cfg]
    kinds = [("none", 0.0) if Guidance(scale, kind).idle else (kind, scale) for kind, scale in kinds] or [("none", 0.0)]
    kinds = sorted(dict.fromkeys(kinds), key=lambda k: (k[0] != "none", k[0] == "cfg"))
    return [
        Setting(model, name, solver, steps, *kind)
        for model, name in enumerate(short_names(config.checkpoint))
        for solver in dict.fromkeys(config.solver)
        for steps in dict.fromkeys(config.steps)
        for kind in kinds
    ]


def short_names(checkpoints: Sequence[str]) -> list[str]:
    """The last part of each checkpoint's name, or as many more as tell it from the others; of OUT/model.safetensors and
    OUT/weights.safetensors, which every run writes, the folder's.

    Raises:
        ValueError: one is given twice.
    """
    parts = [Path(c).with_suffix("").parts if c.endswith(".safetensors") else Path(c).parts for c in checkpoints]
    parts = [tuple(part.strip("/\\") or "root" for part in p if part not in (".", "..")) for p in parts]
    if len(set(parts)) < len(parts):
        raise ValueError(f"--checkpoint names the same model twice: {' '.join(checkpoints)}")
    short = [p[:-1] if len(p) > 1 and p[-1] in ("model", "weights") else p for p in parts]
    parts = short if len(set(short)) == len(short) else parts
    names = []
    for p in parts:
        length = next(n for n in range(1, len(p) + 1) if sum(q[-n:] == p[-n:] for q in parts) == 1)
        names.append("-".join(p[-length:]))
    return names


def image_seeds(seed: int, images: Sequence[int]) -> list[int]:
    """The seeds of images: the images' numbers for seed 0."""
    return [seed * 1_000_000_000 + i for i in images]


def image_labels(seeds: Sequence[int], classes: int) -> Tensor:
    """The label (n,) of each image, uniform over the classes, from its own seed."""
    draws = [torch.randint(classes, (1,), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.cat(draws)


@dataclasses.dataclass(frozen=True)
class Space:
    """What the samples are.

    Args:
        name: of the folder or the checkpoint that says so, for messages.
        kind: "pixels" or "latents".
        shape: (C, h, w).
        classes: their names.
        vae: folder or hub name of the latents' VAE, if it is known.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    classes: tuple[str, ...]
    vae: str | None

    @classmethod
    def of_data(cls, folder: Path) -> Space:
        """That of prepared data."""
        data = LatentDataset(folder, in_memory=False)
        return cls(str(folder), data.kind, data.shape, tuple(data.classes), data.index.get("vae"))

    @classmethod
    def of_checkpoint(cls, source: str) -> Space:
        """That of a checkpoint's samples.

        Raises:
            ValueError: it does not say what they are.
        """
        metadata = read_metadata(source)
        config, data = metadata["config"], metadata["data"]
        kind = {"pixels": "pixels", "sd-vae": "latents", "rae": "latents"}.get(data.get("space"))
        if kind is None or "num_classes" not in config:
            raise ValueError(f"{source} does not say what its samples are; give --data, the prepared data of its training")
        classes = data.get("labels") or [str(label) for label in range(config["num_classes"])]
        shape = (config["channels"], config["latent_size"], config["latent_size"])
        return cls(source, kind, shape, tuple(classes), SD_VAE if data["space"] == "sd-vae" else None)


class Model:
    """A checkpoint of the command: checked against the data, read when it is needed."""

    def __init__(self, source: str, data: Space):
        path = data.name
        metadata = read_metadata(source)
        if metadata["model_class"] not in ("GMDiT", "DiTDH"):
            raise ValueError(f"{source} holds a {metadata['model_class']}; this command samples image models (GMDiT, DiTDH)")
        config = metadata["config"]
        self.source, self.classes = source, config["num_classes"]
        self.record = metadata["data"].get("source")  # of the mixture source it was trained with
        self.conditioning = (self.record or {}).get("conditioning")  # by modes, or they are hidden, or None
        self.num_components, self.shape = config["num_components"], (config["channels"], *[config["latent_size"]] * 2)
        if self.classes != len(data.classes) and self.conditioning != "mode":
            raise ValueError(
                f"{source} knows {self.classes} classes, but {path} has {len(data.classes)}; give --data what it was trained on"
            )
        if self.shape != data.shape:
            raise ValueError(
                f"{source} makes samples of shape {self.shape}, but {path} has {data.kind} of shape {data.shape}; give --data "
                "what it was trained on"
            )
        space = metadata["data"].get("space")
        if space is not None and (space == "pixels") != (data.kind == "pixels"):
            raise ValueError(
                f"{source} makes samples of {space}, but {path} has {data.kind}; give --data what it was trained on"
            )
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        files = [file for _, file in published_weights(source)] if is_published(source) else [Path(source)]
        for file in files:
            with open(file, "rb") as stream:
                while block := stream.read(2**24):
                    digest.update(block)
        self.fingerprint = digest.hexdigest()

    def load(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        return load_checkpoint(self.source, device, dtype)[0]


def image_modes(seeds: Sequence[int], source: GaussianMixtureSource) -> Tensor:
    """The mode (n,) of each image, by weight, from its own seed, but of other random numbers than its noise."""
    return source.draw_modes(len(seeds), [torch.Generator().manual_seed(zlib.crc32(b"mode %d" % seed)) for seed in seeds])


class Chunks:
    """Tensors of `count` images in files of `size` images each, every one with a key that says what it was made from.

    Args:
        folder: where the files are.
        key: JSON-able; a file with another key is not one of these.
    """

    def __init__(self, folder: Path, key: dict[str, Any], count: int, size: int):
        self.folder, self.key, self.count, self.size = folder, json.dumps(key, sort_keys=True), count, size

    def __len__(self) -> int:
        return -(-self.count // self.size)

    def path(self, number: int) -> Path:
        return self.folder / f"chunk-{number:05d}.safetensors"

    def images(self, number: int) -> range:
        """The images of a chunk."""
        return range(number * self.size, min((number + 1) * self.size, self.count))

    def state(self, number: int) -> str:
        """What there is of a chunk: "whole", "missing", "damaged", "foreign" (another key), or "short" (of other images, as the
        count or the size of the files has changed)."""
        if not self.path(number).exists():
            return "missing"
        try:
            with safe_open(self.path(number), framework="pt") as file:
                metadata, names = file.metadata() or {}, list(file.keys())
                lengths = {file.get_slice(name).get_shape()[0] for name in names}
        except (SafetensorError, OSError):
            return "damaged"
        if metadata.get("key") != self.key:
            return "foreign"
        here = self.images(number)
        return "whole" if lengths == {len(here)} and metadata.get("first") == str(here.start) else "short"

    def differences(self, number: int) -> list[str]:
        """The parts of the key in which a foreign chunk's differs."""
        with safe_open(self.path(number), framework="pt") as file:
            old = json.loads((file.metadata() or {}).get("key", "{}"))
        return [name for name, value in json.loads(self.key).items() if old.get(name) != value]

    def read(self, number: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """A whole chunk's tensors, and the facts that were saved with them."""
        tensors, metadata = read_tensors(self.path(number))
        return tensors, json.loads(metadata["facts"])

    def write(self, number: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Save a chunk, atomically."""
        with whole_file(self.path(number)) as temporary:
            tensors = {name: t.contiguous() for name, t in tensors.items()}
            first = str(self.images(number).start)
            save_file(tensors, temporary, {"key": self.key, "first": first, "facts": json.dumps(facts)})


class ImageSource(Protocol):
    """Real images: `len()`, a `key` that says which they are, and `get`."""

    key: dict[str, Any]

    def __len__(self) -> int: ...

    def get(self, images: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """uint8 (n, 3, H, W), and labels (n,) if they are known."""


class PreparedImages:
    """Images of a prepared folder, in an order of chance; latents are decoded."""

    def __init__(self, folder: Path, count: int, vae: VAE | None, device: torch.device, batch: int):
        self.data, self.vae, self.device, self.batch = LatentDataset(folder), vae, device, batch
        if self.data.kind == "pixels" and self.data.shape[0] != 3:
            raise ValueError(f"{folder} has pixels of shape {self.data.shape}; images of 3 channels are needed")
        self.order = torch.randperm(len(self.data), generator=torch.Generator().manual_seed(0))[:count].tolist()
        content = hashlib.sha256((folder / INDEX).read_bytes())
        for shard in self.data.index["shards"]:
            stat = (folder / shard["file"]).stat()
            content.update(f"{stat.st_size} {stat.st_mtime_ns}".encode())
        self.key = {"prepared": content.hexdigest(), "count": len(self.order)}

    def __len__(self) -> int:
        return len(self.order)

    def get(self, images: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        parts = []
        for start in range(0, len(images), self.batch):
            x, labels = self.data.__getitems__([self.order[i] for i in images[start : start + self.batch]])
            parts.append((to_images(x, self.vae, self.device), labels))
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


class FolderImages:
    """Image files anywhere in a folder, in an order of chance; the centre of each, scaled to `size` as for training."""

    def __init__(self, folder: Path, count: int, size: int):
        files = sorted(p for p in folder.rglob("*") if p.suffix in IMAGE_FILES or p.suffix.lower() in IMAGE_FILES)
        if len(files) < 2:
            raise ValueError(
                f"{folder} has {len(files)} images ({', '.join(IMAGE_FILES[:-1])}) and no {INDEX}; give --reference a folder "
                "of images, a prepared folder, or an .npz file"
            )
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0))[:count].tolist()
        self.files, self.size = [files[i] for i in order], size
        listing = json.dumps([(str(p.relative_to(folder)), p.stat().st_size) for p in self.files])
        self.key = {"folder": hashlib.sha256(listing.encode()).hexdigest(), "size": size}

    def __len__(self) -> int:
        return len(self.files)

    def get(self, images: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        found = []
        for i in images:
            try:
                image = centre_crop(Image.open(self.files[i]).convert("RGB"), self.size)
            except OSError as error:
                raise ValueError(f"{self.files[i]} cannot be read as an image ({error}); mend or remove it") from error
            found.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
        return torch.stack(found), None


class ArrayImages:
    """Images (N, 3, H, W) in memory."""

    def __init__(self, images: Tensor, count: int, key: dict[str, Any]):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]
        self.images, self.order, self.key = images, order, {**key, "count": len(order)}

    def __len__(self) -> int:
        return len(self.order)

    def get(self, images: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        return self.images[self.order[torch.as_tensor(images)]].contiguous(), None


def to_images(x: Tensor, vae: VAE | None, device: torch.device) -> Tensor:
    """Samples of the model's space, (n, C, h, w), as uint8 (n, 3, H, W) on the CPU."""
    return to_pixels(x if vae is None else vae.decode(x.to(device))).cpu()


class Evaluation:
    """One command: its models, its reference, and the results so far."""

    def __init__(self, config: Config):
        if not config.checkpoint or (config.data is None and config.reference is None):
            raise ValueError(
                "give at least one --checkpoint, and --data, the prepared data that it was trained on, or a --reference to "
                "compare with"
            )
        if config.data is None and config.features != "inception" and not Path(config.features).exists():
            raise ValueError(f"there is no {config.features}; give --data, to train it on")
        self.config = config
        self.state = PartialState(cpu=on_cpu(config.device), timeout=timedelta(days=7))
        self.device, self.main = self.state.device, self.state.is_main_process
        data = Space.of_checkpoint(config.checkpoint[0]) if config.data is None else Space.of_data(config.data)
        self.space, self.settings = data, settings_of(config)
        self.models = [Model(source, data) for source in config.checkpoint]
        self.guide = None if config.guide is None else Model(config.guide, data)
        self.source = None if config.source is None else load_source(config.source, self.device)
        for model in [*self.models, *([self.guide] if self.guide else [])]:
            if self.source is not None:
                self.source.require_record(model.record, model.source)
            elif model.record is not None:
                raise ValueError(f"{model.source} was trained with a mixture source; give --source")
            if self.guide and (self.guide.conditioning, self.guide.classes) != (model.conditioning, model.classes):
                raise ValueError(f"{config.guide} and {model.source} have other labels; a guide is told what the model is told")
        if self.main:
            self.clean()
        self.state.wait_for_everyone()
        self.vae = None
        if data.kind == "latents":
            self.vae_name = config.vae or data.vae
            if not self.vae_name:
                raise ValueError(f"{data.name} has latents, but does not say of which VAE; give --vae a folder or a hub name")
            with self.state.local_main_process_first():
                self.vae = load_vae(self.vae_name, self.device)
        elif data.shape[0] != 3:
            raise ValueError(f"{data.name} has pixels of shape {data.shape}; images of 3 channels are needed")
        else:
            self.vae_name = None
        self.size = data.shape[1] * (self.vae.factor if self.vae else 1)
        self.extractor = self.get_extractor(data)
        self.results = config.out / "results.json"

    def clean(self) -> None:
        """Remove what a killed process left half-written, and with --restart everything that this command makes."""
        out = self.config.out
        for leftover in [*out.glob(".*.tmp"), *out.glob("*/*/.*.tmp")]:
            leftover.unlink()
        if self.config.restart:
            for folder in ("samples", "measures", "sheets"):
                shutil.rmtree(out / folder, ignore_errors=True)
            (out / "results.json").unlink(missing_ok=True)

    def get_extractor(self, data: Space) -> Extractor:
        """Inception, or the small classifier; the main process downloads or trains it.

        Raises:
            ValueError: it cannot be had, or does not fit the data.
        """
        config = self.config
        if config.features == "inception":
            with self.state.main_process_first():
                return InceptionFeatures(config.inception_weights, self.device)
        path = Path(config.features)
        if self.main and not path.exists():
            train = self.all_images(config.data)
            test = None if config.test_data is None else self.all_images(config.test_data)
            features = train_classifier(
                *train, data.classes, test=test, iterations=config.feature_iterations, device=self.device, name=path.stem
            )
            features.save(path)
            print(
                f"{path}: a classifier to take features from, right for {features.training['accuracy']:.2%} of the test images"
            )
        self.state.wait_for_everyone()
        features = ClassifierFeatures.load(path, self.device)
        shape = features.network.config
        if features.classes != data.classes or (shape.height, shape.width) != (self.size, self.size):
            raise ValueError(
                f"{path} is a classifier of {len(features.classes)} classes ({', '.join(features.classes[:3])} ...) in images "
                f"of {shape.width} x {shape.height}, but {data.name} has {len(data.classes)} classes "
                f"({', '.join(data.classes[:3])} ...) in images of {self.size} x {self.size}; "
                "give --features another file name to train one"
            )
        return features

    def all_images(self, folder: Path) -> tuple[Tensor, Tensor]:
        source = self.prepared(folder, 200_000)
        return source.get(range(len(source)))

    def prepared(self, folder: Path, count: int) -> PreparedImages:
        """
        Raises:
            ValueError: the folder is of another kind or shape than the samples.
        """
        source = PreparedImages(folder, count, self.vae, self.device, self.config.batch_size)
        data, found = self.space, source.data
        same_names = self.config.data is None or tuple(found.classes) == data.classes
        if (found.kind, found.shape, len(found.classes)) != (data.kind, data.shape, len(data.classes)) or not same_names:
            raise ValueError(
                f"{folder} has {found.kind} {found.shape} of {len(found.classes)} classes, but "
                f"{data.name} {data.kind} {data.shape} of {len(data.classes)}; prepare both with the same command"
            )
        return source

    def run(self) -> dict[str, Any]:
        """Everything; returns what OUT/results.json holds, in the main process."""
        config = self.config
        reference = self.reference()
        report = self.header(reference)
        rows, report["floor"] = self.earlier(report) if self.main else ({}, None)
        done = self.share([s.name for s in self.settings if self.is_done(rows.get(s.name), s)])
        if config.test_data is not None:
            report["floor"] = self.floor(reference)
        todo = [s for s in self.settings if s.name not in done]
        if self.main and done:
            print(f"going on: {len(done)} of {len(self.settings)} settings in {self.results} are finished")
        network, loaded = None, None
        calls = sum(s.steps * sum(map(len, map(self.samples(s).images, self.my_chunks(self.samples(s))))) for s in todo)
        quiet = not self.main or not todo
        with tqdm(total=calls, disable=quiet, unit="call", unit_scale=True, dynamic_ncols=True) as bar:
            for number, setting in enumerate(todo):
                bar.set_description(f"{number + 1}/{len(todo)} {setting.name}")
                if loaded != setting.model:
                    network = None  # the old one goes before the new one comes
                    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
                    network, loaded = self.models[setting.model].load(self.device, dtype), setting.model
                    self.guide_network = None if self.guide is None else self.guide.load(self.device, dtype)
                row = self.evaluate(setting, network, reference, bar)
                if self.main:
                    rows[setting.name] = row
                    self.save({**report, "results": list(rows.values())})
        if self.main:
            order = {s.name: i for i, s in enumerate(self.settings)}
            report["results"] = sorted(rows.values(), key=lambda row: order.get(row["name"], len(order)))
            self.save(report)
            write_csv(report, config.out / "results.csv")
            plots = write_plots(report, config.out)
            names = [str(self.results), "results.csv", *(plot.name for plot in plots)]
            print(f"results: {', '.join(names)}, and sheets of samples in sheets/")
        return report

    def share(self, value: Any) -> Any:
        """The main process's value, in all of them."""
        if self.state.num_processes == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, 0)
        return box[0]

    def header(self, reference: Reference) -> dict[str, Any]:
        """What all results of one file have in common."""
        config = self.config
        report = {
            "format": FORMAT,
            "count": config.count,
            "seed": config.seed,
            "features": self.extractor.facts,
            "reference": self.reference_facts,
            "saturation": {"compared_with": "the known distribution of training.digits"}
            if config.saturation == "digits"
            else {"compared_with": "the reference images"},
        }
        if reference.measures is not None:
            report["saturation"]["reference"] = reference.measures.saturation.double().mean().item()
        return report

    def earlier(self, report: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, Any] | None]:
        """The rows of OUT/results.json, by name, and its floor; none if they were made in another way."""
        if not self.results.exists():
            return {}, None
        try:
            old = json.loads(self.results.read_text(encoding="utf-8"))
            rows = {row["name"]: row for row in old["results"]}
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{self.results} is damaged ({error!r}); delete it: samples are kept") from error
        differ = [key for key in report if old.get(key) != report[key]]
        if differ:
            print(f"{self.results} was made with another {', '.join(differ)}; its figures are computed anew from the samples")
            return {}, None
        return rows, old.get("floor")

    def is_done(self, row: dict[str, Any] | None, setting: Setting) -> bool:
        return row is not None and row.get("key") == key_digest(self.samples(setting).key)

    def samples(self, setting: Setting) -> Chunks:
        """The samples of a setting."""
        config, model = self.config, self.models[setting.model]
        key = {
            "checkpoint": model.fingerprint,
            "solver": setting.solver,
            "steps": setting.steps,
            "substeps": setting.substeps(config),
            "order": config.order if setting.solver.startswith("gm-") else None,
            "shift": config.shift,
            "guidance": setting.guidance,
            "scale": setting.scale,
            "interval": config.guidance_interval if setting.guidance != "none" else None,
            "seed": config.seed,
            "precision": config.precision,
            "vae": self.vae_name,
        }
        if config.end:
            key["end"] = config.end
        if config.unlabelled:
            key["labels"] = "none"
        if self.source is not None:
            key["source"] = self.source.digest
        if self.guide is not None:
            key["guide"] = [self.guide.fingerprint, config.guide_scale]
        return Chunks(config.out / "samples" / setting.name, key, config.count, config.chunk_size)

    def my_chunks(self, chunks: Chunks) -> range:
        return range(self.state.process_index, len(chunks), self.state.num_processes)

    def evaluate(self, setting: Setting, network: nn.Module, reference: Reference, bar: tqdm) -> dict[str, Any] | None:
        """Sample, measure and score one setting; its row, in the main process.

        Raises:
            ValueError: there are samples of something else in its folder, or some are not finite.
        """
        samples = self.samples(setting)
        key = {"of": samples.key, "features": self.extractor.fingerprint}
        measures = Chunks(self.config.out / "measures" / setting.name, key, samples.count, samples.size)
        for number in self.my_chunks(samples):
            state, measured = samples.state(number), measures.state(number) == "whole"
            if state == "foreign":
                raise ValueError(
                    f"{samples.path(number)} was sampled with another {' and '.join(samples.differences(number))} than "
                    f"{setting.name} now; give another --out, or --restart to throw away all samples there"
                )
            if state == "damaged":
                print(f"{samples.path(number)} is not whole; it is sampled again", file=sys.stderr)
            if state != "whole" and not (measured and self.config.discard_samples):
                tensors, facts = self.sample(setting, network, samples.images(number))
                samples.write(number, tensors, facts)
            if not measured:
                tensors, facts = samples.read(number)
                measures.write(number, as_tensors(measure(tensors["images"], self.extractor, tensors["labels"])), facts)
            bar.update(setting.steps * len(samples.images(number)))
        self.state.wait_for_everyone()
        if not self.main:
            return None
        parts, facts = zip(*(read_measures(measures, number) for number in range(len(measures))), strict=True)
        row = {
            "name": setting.name,
            "checkpoint": setting.checkpoint,
            "fingerprint": self.models[setting.model].fingerprint[:16],
            "num_components": self.models[setting.model].num_components,
            "solver": setting.solver,
            "steps": setting.steps,
            "substeps": setting.substeps(self.config),
            "guidance": setting.guidance,
            "scale": setting.scale,
            "network_calls": setting.steps,
            "count": self.config.count,
            **self.score(Measures.cat(parts), reference, labelled=self.labelled(setting)),
            "out_of_range": None if self.vae else sum(f["out_of_range"] for f in facts) / sum(f["values"] for f in facts),
            "seconds": round(sum(f["seconds"] for f in facts), 2),
            "key": key_digest(samples.key),
        }
        if samples.state(0) == "whole":
            images, labels = (samples.read(0)[0][name] for name in ("images", "labels"))
            self.config.out.joinpath("sheets").mkdir(exist_ok=True)
            sheet(images, labels, self.models[setting.model].classes).save(self.config.out / "sheets" / f"{setting.name}.png")
        if self.config.discard_samples:
            shutil.rmtree(samples.folder, ignore_errors=True)
        return row

    def sample(self, setting: Setting, network: nn.Module, images: range) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The samples of one chunk: `images` uint8 and `labels`; and how long it took, and how much was clamped.

        Raises:
            ValueError: some are not finite.
        """
        config, started = self.config, time.perf_counter()
        guidance = None
        if setting.guidance != "none":
            guidance = Guidance(setting.scale, setting.guidance, interval=config.guidance_interval)
        parts, all_labels, outside, values = [], [], 0, 0
        for start in range(images.start, images.stop, config.batch_size):
            seeds = image_seeds(config.seed, range(start, min(start + config.batch_size, images.stop)))
            modes = None if self.source is None else image_modes(seeds, self.source)
            known = self.models[setting.model].conditioning == "mode"
            labels = modes.cpu() if known else image_labels(seeds, max(1, network.config.num_classes))
            if config.unlabelled and not known:
                labels = torch.full_like(labels, network.config.num_classes)
            x = sample_images(
                network,
                None if known else labels,
                solver=setting.solver,
                steps=setting.steps,
                order=config.order,
                substeps=setting.substeps(config),
                sigmas=flow_sigmas(setting.steps, config.shift, end=config.end),
                guidance=guidance,
                seeds=seeds,
                source=self.source,
                modes=modes,
                guide=self.guide_network,
                guide_scale=config.guide_scale,
            )
            if not x.isfinite().all():
                bad = next(seed for seed, image in zip(seeds, x, strict=True) if not image.isfinite().all())
                raise ValueError(
                    f"{setting.name}: the sample of seed {bad} is not finite; the checkpoint may have diverged, or try "
                    "--precision fp32"
                )
            outside, values = outside + int((x.abs() > 1).sum()), values + x.numel()
            parts.append(to_images(x, self.vae, self.device))
            all_labels.append(labels)
        facts = {"seconds": time.perf_counter() - started, "out_of_range": outside, "values": values}
        return {"images": torch.cat(parts), "labels": torch.cat(all_labels)}, facts

    def labelled(self, setting: Setting) -> bool:
        """Whether the samples' labels are classes."""
        return not self.config.unlabelled and self.models[setting.model].conditioning != "mode"

    def score(self, measures: Measures, reference: Reference, labelled: bool = True) -> dict[str, Any]:
        """The figures; `labelled`: whether the labels are classes."""
        known = saturation_distance if self.config.saturation == "digits" else None
        figures = score(measures, reference, classes=self.extractor.classes if labelled else None, known=known)
        return {name: figures[name] for name in METRICS}

    def measure_source(self, source: ImageSource, name: str) -> Measures:
        """What is measured on real images, in all processes; kept in OUT/measures/NAME."""
        key = {"of": source.key, "features": self.extractor.fingerprint, "vae": self.vae_name}
        chunks = Chunks(self.config.out / "measures" / name, key, len(source), self.config.chunk_size)
        missing = [number for number in self.my_chunks(chunks) if chunks.state(number) != "whole"]
        for number in tqdm(
            missing, desc=name.strip("_"), unit="chunk", disable=not self.main or not missing, dynamic_ncols=True
        ):
            images, labels = source.get(chunks.images(number))
            chunks.write(number, as_tensors(measure(images, self.extractor, labels)), {})
        self.state.wait_for_everyone()
        return Measures.cat(read_measures(chunks, number)[0] for number in range(len(chunks)))

    def floor(self, reference: Reference) -> dict[str, Any]:
        """The figures of real images that no model was trained on, as many as samples if there are so many."""
        source = self.prepared(self.config.test_data, self.config.count)
        if self.main and len(source) < self.config.count:
            print(
                f"note: {self.config.test_data} has {len(source)} images, fewer than --count {self.config.count}; their "
                "Fréchet distance is a little larger for that",
                file=sys.stderr,
            )
        measures = self.measure_source(source, "_floor")
        return {"name": "real images", "count": len(source), **self.score(measures, reference)}

    def reference(self) -> Reference:
        """What the samples are compared with.

        Raises:
            FileNotFoundError, ValueError: it is not there, or does not fit the features.
        """
        config = self.config
        path = config.reference or config.data
        facts: dict[str, Any] = {"name": path.name}
        given: Statistics | None = None
        source: ImageSource | None = None
        if path.suffix == ".npz":
            images, given = read_npz(path)
            if images is not None:
                stat = path.stat()
                source = ArrayImages(
                    images, config.reference_count, {"npz": path.name, "bytes": stat.st_size, "time": stat.st_mtime_ns}
                )
            wanted = self.extractor.facts["dimensions"]
            if given is not None and len(given.mean) != wanted:
                raise ValueError(
                    f"{path}: mu has {len(given.mean)} features, but {self.extractor.name} has {wanted}; use --features "
                    "inception with such a file, or give a reference of images"
                )
        elif (path / INDEX).exists():
            source = self.prepared(path, config.reference_count)
        elif path.is_dir():
            source = FolderImages(path, config.reference_count, self.size)
        else:
            raise FileNotFoundError(f"there is no reference {path}; give --reference an .npz file or a folder of images")
        measures = None if source is None else self.measure_source(source, "_reference")
        facts["images"] = 0 if measures is None else len(measures)
        facts["images_for_precision_and_recall"] = min(facts["images"], config.count)
        facts["statistics"] = "of the file" if given is not None else "of the images"
        content = hashlib.sha256(json.dumps(source.key if source is not None else None).encode())
        if given is not None:
            content.update(given.mean.tobytes() + given.covariance.tobytes())
        facts["fingerprint"] = content.hexdigest()[:16]
        self.reference_facts = facts
        return Reference(given or statistics(measures.features), measures, config.count)

    def save(self, report: dict[str, Any]) -> None:
        """Write OUT/results.json, atomically."""
        with whole_file(self.results) as temporary:
            temporary.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def as_tensors(measures: Measures) -> dict[str, Tensor]:
    tensors = {field.name: getattr(measures, field.name) for field in dataclasses.fields(measures)}
    return {name: t for name, t in tensors.items() if t is not None}


def read_measures(chunks: Chunks, number: int) -> tuple[Measures, dict[str, Any]]:
    tensors, facts = chunks.read(number)
    return Measures(**tensors), facts


def key_digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def main(arguments: list[str] | None = None) -> None:
    try:
        Evaluation(parse(sys.argv[1:] if arguments is None else arguments)).run()
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        print("\nstopped; run the same command again to go on", file=sys.stderr)
        raise SystemExit(130) from None
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
