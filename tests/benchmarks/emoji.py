"""Measure models of the emoji, by the code that measures the digits.

    python -m tests.benchmarks.emoji --models outputs --work outputs/emoji_figures
    python -m tests.benchmarks.emoji --only steps likelihood      # or stock, guidance, neighbours

MODELS holds emoji_NAME_seedN/weights.safetensors, of training.imagenet --preset emoji (the NAMEs
k1, k2, ...) or emoji_flow_matching (fm); large_k8 is the shipped model, and large_fm and large_k1
are trained like it. WORK gets the pictures (or link data/emoji_train and data/emoji_test there as
emoji_train and emoji_test), the classifier of the features (1,200 iterations; training.evaluate
trains the same one on a GPU), and the figures of every model: a second start goes on where the
first one stopped. docs/results/emoji_PART.csv is written after every model, with the means over
seeds; the picture of neighbours stays in WORK, as it holds emoji, which are not part of this
repository.

- steps: solvers of gmflow_core at 1 to 8 network calls, by training.evaluate.
- stock: ComfyUI's samplers (stock.py says which not) with four schedulers on the shipped model and
  those trained like it, of which only the mean is then known; screened on few samples, the best
  measured on all; beside them ours, with one Gaussian and with the model's own mixture, which has
  the sigmas of the scheduler beta, too, and what is best on the shipped model. On the small models
  uni_pc alone.
- guidance: CFG, ComfyUI's APG and probabilistic guidance of the shipped model and of large_fm, in
  4 calls of GM-ODE and of UniPC inside ComfyUI.
- likelihood: time-averaged, of held-out pictures, by training.likelihood.
- neighbours: the training pictures nearest to samples of the shipped model at its best setting of
  `steps`.

There are as many samples as held-out pictures, and classes are drawn as often as the training
pictures have them, so Fréchet distances compare with those of held-out pictures.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from gmflow_core.files.checkpoint import read_metadata
from gmflow_core.files.json_files import read_json
from gmflow_core.files.locks import locked
from training.data.shards import LatentDataset
from training.evaluation.config import Config
from training.evaluation.evaluation import Evaluation
from training.evaluation.inputs import Inputs
from training.evaluation.metrics import measure, pairwise_distances
from training.evaluation.models import Model, Space
from training.evaluation.report import METRICS, sheet
from training.experiments import image_likelihood
from training.experiments.image_likelihood import mean_and_error
from training.experiments.likelihood import Config as LikelihoodConfig

from .any_flow import ours
from .picture_sets import Emoji, PictureSet
from .stock import LEFT_OUT, screened
from .tables import RESULTS, Row, kept, means_of, write

FOLDER = re.compile(r"emoji_((?:large_)?(?:fm|k\d+))_seed(\d+)")
SOLVERS = ("euler", "dpmpp-2m", "uni-pc", "gm-ode", "gm-sde")
WHITE = "gm-sde, white"  # without the spectrum network
STEPS = (1, 2, 4, 8)
LARGE, SHIPPED = "large_", "large_k8"  # how the names of large models begin; the shipped one
STOCK_CALLS = (2, 3, 4)  # the best of four calls are measured at 8, too
SCREENED = 100  # samples
USUAL = {"sampler": "uni_pc", "scheduler": "simple"}  # on all models, as a KSampler runs it
BEST = {"sampler": "uni_pc_bh2", "scheduler": "beta"}  # of the shipped model, in 2 to 4 calls
GM_ODE, SPREAD = {"sampler": "gm_ode"}, 0.5  # ours, and the spread of one Gaussian
GUIDED = {  # kinds of guidance, and their scales or weights
    "": (1.0, 1.5, 3.0),
    "APG": (0.5, 2.0),  # as strong as CFG 1.5 and 3: ComfyUI adds its guidance to a scale of 1
    "APG, eta 0": (0.5, 2.0),
    "probabilistic": (0.1, 0.3),
}
GUIDED_MODELS = ("large_fm", SHIPPED)
GUIDED_SAMPLERS = {"gm_ode": "gm", "uni_pc": "simple"}  # and their schedulers
ROUNDS = 24  # times and noises for each held-out picture
SHOWN, COLUMNS, ENLARGED = 16, 8, 3  # samples of the picture, in a row, and pixels per pixel


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained model: name (fm, k1, large_k8, ...), seed of the training, and checkpoint."""

    name: str
    seed: int
    model: Model

    @property
    def about(self) -> Row:
        """Name and seed, for a row."""
        return {"model": self.name, "seed": self.seed}

    @property
    def budget(self) -> tuple[bool, int]:
        """What models have in common that were trained alike but for K: their size, and a seed."""
        return self.name.startswith(LARGE), self.seed

    @property
    def path(self) -> Path:
        """File of the weights."""
        return Path(self.model.checkpoint)

    def file(self, work: Path, part: str) -> Path:
        """Return the file of the figures of a part."""
        return work / f"{part}_{self.name}_seed{self.seed}.json"


def trained_models(folder: Path, space: Space) -> list[Trained]:
    """Return the models of a folder: small ones first, flow matching before K, and by seed.

    Raises:
        SystemExit: there is none.
        ValueError: one is no model of these pictures.
    """
    found = []
    for path in folder.glob("emoji_*/weights.safetensors"):
        if name := FOLDER.fullmatch(path.parent.name):
            found.append(Trained(name[1], int(name[2]), Model(str(path), space)))
    if not found:
        raise SystemExit(f"{folder} has no emoji_NAME_seedN/weights.safetensors; see --help")
    return sorted(found, key=lambda each: (each.budget[0], len(each.name), each.name, each.seed))


def key_of(data: PictureSet, each: Trained, **more: object) -> Row:
    """Return what figures of a model depend on."""
    model, features = each.model.fingerprint, data.extractor.fingerprint
    about = {"model": model, "features": features, "count": data.count, "uneven": data.uneven}
    return {**about, **more}


def publish(data: PictureSet, rows: list[Row], kind: tuple[str, ...], path: Path) -> None:
    """Write rows of models, after one of held-out pictures, and their means over seeds."""
    floor = {"model": "held-out pictures", "count": data.count, **data.floor()}
    more = [name for name in (*METRICS, "out_of_range") if name != "frechet_distance"]
    write([floor, *rows, *means_of(rows, kind, "frechet_distance", *more)], path)


def steps(data: PictureSet, models: list[Trained], work: Path, results: Path) -> None:
    """Compare the solvers of gmflow_core on all models: emoji_steps.csv.

    A model with a spectrum network is sampled by GM-SDE without it, too: the rows of WHITE.
    """
    rows = []
    for each in models:
        config = evaluation_of(data, each, work)
        key = key_of(data, each, solver=list(config.solver), steps=list(config.steps))
        rows += kept(each.file(work, "steps"), key, partial(evaluated, each, config))
        if read_metadata(each.path)["config"].get("spectrum_layers"):
            out = work / "evaluation_white"
            white = dataclasses.replace(config, solver=("gm-sde",), spectrum=False, out=out)
            key = key_of(data, each, spectrum=None, steps=list(config.steps))
            found = kept(each.file(work, "white"), key, partial(evaluated, each, white))
            rows += [{**row, "solver": WHITE} for row in found]
        publish(data, rows, ("model", "solver", "steps"), results / "emoji_steps.csv")


def evaluation_of(data: PictureSet, each: Trained, work: Path) -> Config:
    """Return the settings of training.evaluate for a model."""
    return Config(
        checkpoint=(each.model.checkpoint,),
        data=data.prepared("train"),
        test_data=data.prepared("test"),
        features=str(data.features),
        count=data.count,
        class_shares="data" if data.uneven else "equal",
        solver=SOLVERS,
        steps=STEPS,
        precision="fp32",
        device="cpu",
        out=work / "evaluation",
    )


def evaluated(each: Trained, config: Config) -> list[Row]:
    """Run training.evaluate on a model, and return its rows."""
    evaluation = Evaluation(config)
    names = {setting.name for setting in evaluation.inputs.settings}
    columns = ("num_components", "solver", "steps", "substeps", "count", *METRICS, "out_of_range")
    found = [row for row in evaluation.run()["results"] if row["name"] in names]
    return [{**each.about, **{name: row[name] for name in columns}} for row in found]


def stock(data: PictureSet, models: list[Trained], work: Path, results: Path) -> None:
    """Compare ComfyUI's samplers, and ours on large models: emoji_stock.csv.

    The best are those of a model's first seed: no choice favours what they have on the others.
    """
    rows, kind = [], ("model", "sampler", "scheduler", "calls", "spread", "mixture")
    best: dict[str, list[Row]] = {}
    for each in models:
        settings = at_each_call(data, USUAL)
        if each.name.startswith(LARGE):
            if each.name not in best:
                best[each.name] = best_stock(data, each, work)
            settings += [*best[each.name], *ours(data.count, (SPREAD,), SPREAD)]
            settings += at_each_call(data, {**GM_ODE, "scheduler": "beta", "mixture": True})
            settings += at_each_call(data, BEST)
        rows += compared(data, each, settings, each.file(work, "stock"))
        publish(data, rows, kind, results / "emoji_stock.csv")


def at_each_call(data: PictureSet, kind: Row) -> list[Row]:
    """Return the settings of a kind at each number of calls, on all samples."""
    return [{**kind, "calls": calls, "count": data.count} for calls in (*STOCK_CALLS, 8)]


def named(models: list[Trained], *names: str) -> list[Trained]:
    """Return the models of some names.

    Raises:
        SystemExit: there is none.
    """
    found = [each for each in models if each.name in names]
    if not found:
        folders = " and ".join(f"emoji_{name}_seed0" for name in names)
        raise SystemExit(f"this part is of {folders}, which MODELS lacks; see --help")
    return found


def best_stock(data: PictureSet, each: Trained, work: Path) -> list[Row]:
    """Return the best settings of stock samplers for a model, by few samples."""
    few, best = min(SCREENED, data.count), []
    compare = partial(data.compare, checkpoint=each.path)
    for calls in STOCK_CALLS:
        search = partial(screened, compare, few, "frechet_distance", calls=(calls,))
        key = key_of(data, each, screened=few, left_out=list(LEFT_OUT))
        best += kept(each.file(work, f"screened_{calls}"), key, search)
    at_8 = [{**row, "calls": 8} for row in best if row["calls"] == max(STOCK_CALLS)]
    return [{**row, "count": data.count} for row in (*best, *at_8)]


def compared(data: PictureSet, each: Trained, settings: list[Row], path: Path) -> list[Row]:
    """Return the figures of settings of a model inside ComfyUI, kept in a file.

    Settings that take the same steps, as more do not fit into the calls, have one row.
    """

    def make() -> list[Row]:
        rows = [{**each.about, **row} for row in data.compare(settings, each.path)]
        return [row for number, row in enumerate(rows) if row not in rows[:number]]

    return kept(path, key_of(data, each, settings=settings), make)


def guidance(data: PictureSet, models: list[Trained], work: Path, results: Path) -> None:
    """Compare kinds of guidance on GUIDED_MODELS, in 4 calls: emoji_guidance.csv."""
    common, rows = {"calls": 4, "mixture": True, "count": data.count}, []
    settings = [
        {"sampler": sampler, "scheduler": scheduler, "remedy": kind, "cfg": scale, **common}
        for sampler, scheduler in GUIDED_SAMPLERS.items()
        for kind, scales in GUIDED.items()
        for scale in scales
    ]
    for each in named(models, *GUIDED_MODELS):
        rows += compared(data, each, settings, each.file(work, "guidance"))
        kind = ("model", "sampler", "remedy", "cfg")
        publish(data, rows, kind, results / "emoji_guidance.csv")


def likelihood(data: PictureSet, models: list[Trained], work: Path, results: Path) -> None:
    """Measure the likelihood of held-out pictures, in bits per dimension: emoji_likelihood.csv.

    Standard errors are those over pictures, each at ROUNDS times. `difference` is that to flow
    matching of the same size and seed, if there is one, with the same times and noises, and
    `difference_to_fewer` that to the model of the next smaller K there, named by `fewer`.
    """
    folder, rows, first, fewer = data.prepared("test"), [], {}, {}
    pictures = LatentDataset(folder)
    config = LikelihoodConfig(data=folder, count=ROUNDS * len(pictures), device="cpu")
    for each in models:
        make = partial(bits_of_pictures, each, pictures, config)
        [found] = kept(each.file(work, "likelihood"), key_of(data, each, draws=config.count), make)
        bits = torch.tensor(found["nll"], dtype=torch.float64)
        row = {**each.about, "pictures": len(bits), "draws": config.count}
        for name, values in found.items():
            row |= mean_and_error(name, torch.tensor(values).double(), len(bits))
        base = first.setdefault(each.budget, bits)
        row |= mean_and_error("difference", bits - base, len(bits))
        row["fewer"], before = fewer.get(each.budget, (each.name, bits))
        rows.append({**row, **mean_and_error("difference_to_fewer", bits - before, len(bits))})
        fewer[each.budget] = each.name, bits
        means = means_of(rows, ("model",), "nll", "spectral_nll", "difference")
        write([*rows, *means], results / "emoji_likelihood.csv")


def bits_of_pictures(each: Trained, pictures: LatentDataset, config: LikelihoodConfig) -> list[Row]:
    """Return the mean bits per dimension of each picture, in one row."""
    network = image_likelihood.checked(each.model).load(torch.device("cpu"))
    title = f"{each.name}, seed {each.seed}"
    bits = image_likelihood.bits_of_images(network, each.model.unlabelled, pictures, config, title)
    names = ("nll", "spectral_nll")  # a draw's picture is its number modulo the pictures
    return [
        {
            name: values.view(-1, len(pictures)).mean(0).tolist()
            for name, values in zip(names, bits, strict=True)
            if values is not None
        }
    ]


def neighbours(data: PictureSet, models: list[Trained], work: Path, results: Path) -> None:
    """Find the training pictures nearest to samples: emoji_neighbours.csv, and .png in WORK.

    Samples are as near as held-out pictures are, unless the model remembers training pictures;
    `share_below_1` and `share_below_10` are shares nearer than these percentiles of held-out
    pictures. `nearer_to_training` is the share that is nearer to a training picture than to any
    held-out one: without memory the training pictures' share of both. SPOILED training pictures, as
    many as there are held-out ones, say which copies these shares would betray. Mirror images
    count as pictures, as training flips them. The .png has three rows for eight samples: these, the
    nearest pictures by pixels, and by features.
    """
    each = named(models, SHIPPED)[0]
    best = best_setting(each, work)
    samples = samples_of(evaluation_of(data, each, work), best)
    seen, others = (torch.cat([x, x.flip(3)]) for x in (data.train[0], data.test[0]))
    some = torch.randperm(len(data.train[0]), generator=torch.Generator().manual_seed(0))
    copied = data.train[0][some[: data.count]]
    sets = {"held-out pictures": data.test[0], "samples": samples}
    sets |= {f"copies, {name}": spoil(copied) for name, spoil in SPOILED.items()}
    rows, shown = [], [samples[:SHOWN]]
    for space, of in (("pixels", pixels), ("features", partial(features, data))):
        real, unseen = of(seen), of(others)
        found = {name: nearest(of(images), real) for name, images in sets.items()}
        held_out = found["held-out pictures"][0]
        shown.append(seen[found["samples"][1][:SHOWN]])
        for name, (distances, _) in found.items():
            figures = {"median": distances.median().item(), "lowest": distances.min().item()}
            for percent in (1, 10):
                nearer = distances < held_out.quantile(percent / 100)
                figures[f"share_below_{percent}"] = nearer.double().mean().item()
            if name != "held-out pictures":
                away = nearest(of(sets[name]), unseen)[0]
                figures["nearer_to_training"] = (distances < away).double().mean().item()
            about = {"pictures": name, "distance": space, "count": len(distances)}
            rows.append({**each.about, **best, **about, **figures})
    write(rows, results / "emoji_neighbours.csv")
    draw(shown, work / "emoji_neighbours.png")


def at_side(side: int, images: Tensor) -> Tensor:
    """Return images (N, 3, H, W), uint8, of which `side` x `side` pixels are left, as large."""
    small = functional.interpolate(images.float(), (side, side), mode="area")
    large = functional.interpolate(small, images.shape[2:], mode="bilinear")
    return large.round().to(torch.uint8)


def with_noise(images: Tensor) -> Tensor:
    """Return images, uint8, with Gaussian noise of a tenth of the range."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + 25.5 * noise).clamp(0, 255).round().to(torch.uint8)


SPOILED = {  # copies of training pictures, as a model that remembers them might draw them
    "half the resolution": partial(at_side, 16),
    "a quarter of it": partial(at_side, 8),
    "noise of 0.1": with_noise,
    "moved by 2 pixels": partial(torch.roll, shifts=(2, 2), dims=(2, 3)),
}


def samples_of(config: Config, wanted: Row) -> Tensor:
    """Return the samples (n, 3, H, W) of a setting that training.evaluate has kept."""
    inputs = Inputs(config)
    [setting] = [s for s in inputs.settings if (s.solver, s.steps) == tuple(wanted.values())]
    chunks = inputs.samples(setting)
    return torch.cat([chunks.read(number)[0]["images"] for number in range(len(chunks))])


def best_setting(each: Trained, work: Path) -> Row:
    """Return solver and steps of the least Fréchet distance of a model.

    Raises:
        SystemExit: nothing is measured yet.
    """
    file = each.file(work, "steps")
    if not file.is_file():
        raise SystemExit(f"{work} has no figures of steps yet; run --only steps first")
    best = min(read_json(file)["rows"], key=lambda row: row["frechet_distance"])
    return {name: best[name] for name in ("solver", "steps")}


def pixels(images: Tensor) -> Tensor:
    """Return values (N, D) of images, of which a distance is the root mean square in [0, 1]."""
    values = images.flatten(1).float() / 255
    return values / math.sqrt(values.shape[1])


def features(data: PictureSet, images: Tensor) -> Tensor:
    """Return the features (N, 64) of images uint8 (N, 3, H, W)."""
    return measure(images, data.extractor).features


def nearest(points: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distance (N,) of points (N, D) to the nearest of (M, D), and its number (N,)."""
    parts = [block.min(1) for block in pairwise_distances(points, real)]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


def draw(columns: list[Tensor], path: Path) -> None:
    """Draw images of equal number (n, 3, H, W) below each other, COLUMNS in a row."""
    parts = zip(*(images.split(COLUMNS) for images in columns), strict=True)
    rows = [row for part in parts for row in part]
    picture = sheet(torch.cat(rows), None, 0, len(rows), COLUMNS)
    size = (picture.width * ENLARGED, picture.height * ENLARGED)
    picture.resize(size, Image.Resampling.NEAREST).save(path)
    print(path)


PARTS = {
    "steps": steps,
    "stock": stock,
    "guidance": guidance,
    "likelihood": likelihood,
    "neighbours": neighbours,
}


def main() -> None:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, default=Path("outputs"))
    parser.add_argument("--work", type=Path, default=Path("outputs/emoji_figures"))
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the tables")
    arguments = parser.parse_args()
    with locked(arguments.work):
        data = Emoji(arguments.work)
        models = trained_models(arguments.models, Space.of_data(data.prepared("train")))
        print(f"models: {', '.join(f'{each.name} (seed {each.seed})' for each in models)}")
        for part in arguments.only:
            PARTS[part](data, models, arguments.work, arguments.results)


if __name__ == "__main__":
    main()
