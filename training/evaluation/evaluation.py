"""Sample a sweep of settings, measure it, and write the report."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from tqdm import tqdm

from gmflow_core.files.atomic import atomic_write
from gmflow_core.flow.path import flow_sigmas
from gmflow_core.sampling.guidance import Guidance
from gmflow_core.sampling.images import sample_images
from gmflow_core.source.files import load_source
from training.common.devices import on_cpu
from training.data.shards import INDEX
from training.encoders.load import load_vae
from training.evaluation.chunks import Chunks, key_digest
from training.evaluation.classifier import ClassifierFeatures, train_classifier
from training.evaluation.config import Config, Setting, settings_of
from training.evaluation.extractors import Extractor
from training.evaluation.inception import InceptionFeatures
from training.evaluation.metrics import Measures, Reference, Statistics, measure, score, statistics
from training.evaluation.models import Model, Space, image_labels, image_modes, image_seeds
from training.evaluation.real_images import (
    ArrayImages,
    FolderImages,
    PreparedImages,
    RealImages,
    read_npz,
    to_images,
)
from training.evaluation.report import METRICS, sheet, write_csv, write_plots
from training.evaluation.saturation import saturation_distance

FORMAT = "gmflow-evaluation-1"


class Evaluation:
    """One command: its models, its reference, and the results so far."""

    def __init__(self, config: Config):
        if not config.checkpoint or (config.data is None and config.reference is None):
            raise ValueError(
                "give at least one --checkpoint, and --data, the prepared data that it was trained on, or a --reference to "
                "compare with"
            )
        if (
            config.data is None
            and config.features != "inception"
            and not Path(config.features).exists()
        ):
            raise ValueError(f"there is no {config.features}; give --data, to train it on")
        self.config = config
        self.state = PartialState(cpu=on_cpu(config.device), timeout=timedelta(days=7))
        self.device, self.main = self.state.device, self.state.is_main_process
        data = (
            Space.of_checkpoints(config.checkpoint)
            if config.data is None
            else Space.of_data(config.data)
        )
        self.space, self.settings = data, settings_of(config)
        self.models = [Model(checkpoint, data) for checkpoint in config.checkpoint]
        self.guide = None if config.guide is None else Model(config.guide, data)
        self.source = None if config.source is None else load_source(config.source, self.device)
        for model in [*self.models, *([self.guide] if self.guide else [])]:
            if self.source is not None:
                self.source.require_record(model.record, model.checkpoint)
            elif model.record is not None:
                raise ValueError(
                    f"{model.checkpoint} was trained with a mixture source; give --source"
                )
            if config.unlabelled and model.conditioning == "mode":
                raise ValueError(
                    f"--unlabelled does not go with {model.checkpoint}, whose labels are the modes of its source"
                )
            if self.guide and (self.guide.conditioning, self.guide.classes) != (
                model.conditioning,
                model.classes,
            ):
                raise ValueError(
                    f"{config.guide} and {model.checkpoint} have other labels; a guide is told what the model is told"
                )
        if self.main:
            self.clean()
        self.state.wait_for_everyone()
        self.vae = None
        if data.kind == "latents":
            self.vae_name = config.vae or data.vae
            if not self.vae_name:
                raise ValueError(
                    f"{data.name} has latents, but does not say of which VAE; give --vae a folder or a hub name"
                )
            with self.state.local_main_process_first():
                self.vae = load_vae(self.vae_name, self.device)
        elif data.shape[0] != 3:
            raise ValueError(
                f"{data.name} has pixels of shape {data.shape}; images of 3 channels are needed"
            )
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
                *train,
                data.classes,
                test=test,
                iterations=config.feature_iterations,
                device=self.device,
                name=path.stem,
            )
            features.save(path)
            print(
                f"{path}: a classifier to take features from, right for {features.training['accuracy']:.2%} of the test images"
            )
        self.state.wait_for_everyone()
        features = ClassifierFeatures.load(path, self.device)
        shape = features.network.config
        if data.classes not in (None, features.classes) or (shape.height, shape.width) != (
            self.size,
            self.size,
        ):
            raise ValueError(
                f"{path} is a classifier of {of_classes(features.classes)}images of {shape.width} x {shape.height}, but "
                f"{data.name} has {of_classes(data.classes)}images of {self.size} x {self.size}; give --features another file "
                "name to train one"
            )
        return features

    def all_images(self, folder: Path) -> tuple[Tensor, Tensor]:
        images = self.prepared(folder, 200_000)
        return images.get(range(len(images)))

    def prepared(self, folder: Path, count: int) -> PreparedImages:
        """
        Raises:
            ValueError: the folder is of another kind or shape than the samples.
        """
        images = PreparedImages(folder, count, self.vae, self.device, self.config.batch_size)
        data, found = self.space, images.data
        as_many = data.classes is None or len(found.classes) == len(data.classes)
        same_names = self.config.data is None or tuple(found.classes) == data.classes
        if (found.kind, found.shape) != (data.kind, data.shape) or not (as_many and same_names):
            known = "" if data.classes is None else f" of {len(data.classes)}"
            raise ValueError(
                f"{folder} has {found.kind} {found.shape} of {len(found.classes)} classes, but {data.name} {data.kind} "
                f"{data.shape}{known}; prepare both with the same command"
            )
        return images

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
            print(
                f"going on: {len(done)} of {len(self.settings)} settings in {self.results} are finished"
            )
        network, loaded = None, None
        calls = sum(
            s.steps * sum(map(len, map(self.samples(s).images, self.my_chunks(self.samples(s)))))
            for s in todo
        )
        quiet = not self.main or not todo
        with tqdm(
            total=calls, disable=quiet, unit="call", unit_scale=True, dynamic_ncols=True
        ) as bar:
            for number, setting in enumerate(todo):
                bar.set_description(f"{number + 1}/{len(todo)} {setting.name}")
                if loaded != setting.model:
                    network = None  # the old one goes before the new one comes
                    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
                    network, loaded = (
                        self.models[setting.model].load(self.device, dtype),
                        setting.model,
                    )
                    self.guide_network = (
                        None if self.guide is None else self.guide.load(self.device, dtype)
                    )
                row = self.evaluate(setting, network, reference, bar)
                if self.main:
                    rows[setting.name] = row
                    self.save({**report, "results": list(rows.values())})
        if self.main:
            order = {s.name: i for i, s in enumerate(self.settings)}
            report["results"] = sorted(
                rows.values(), key=lambda row: order.get(row["name"], len(order))
            )
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

    def earlier(
        self, report: dict[str, Any]
    ) -> tuple[dict[str, dict[str, Any]], dict[str, Any] | None]:
        """The rows of OUT/results.json, by name, and its floor; none if they were made in another way."""
        if not self.results.exists():
            return {}, None
        try:
            old = json.loads(self.results.read_text(encoding="utf-8"))
            rows = {row["name"]: row for row in old["results"]}
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.results} is damaged ({error!r}); delete it: samples are kept"
            ) from error
        differ = [key for key in report if old.get(key) != report[key]]
        if differ:
            print(
                f"{self.results} was made with another {', '.join(differ)}; its figures are computed anew from the samples"
            )
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
        if self.unlabelled(setting):
            key["labels"] = "none"
        if self.source is not None:
            key["source"] = self.source.digest
        if self.guide is not None:
            key["guide"] = [self.guide.fingerprint, config.guide_scale]
        return Chunks(config.out / "samples" / setting.name, key, config.count, config.chunk_size)

    def my_chunks(self, chunks: Chunks) -> range:
        return range(self.state.process_index, len(chunks), self.state.num_processes)

    def evaluate(
        self, setting: Setting, network: nn.Module, reference: Reference, bar: tqdm
    ) -> dict[str, Any] | None:
        """Sample, measure and score one setting; its row, in the main process.

        Raises:
            ValueError: there are samples of something else in its folder, or some are not finite.
        """
        samples = self.samples(setting)
        key = {"of": samples.key, "features": self.extractor.fingerprint}
        measures = Chunks(
            self.config.out / "measures" / setting.name, key, samples.count, samples.size
        )
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
                measures.write(
                    number,
                    as_tensors(measure(tensors["images"], self.extractor, tensors["labels"])),
                    facts,
                )
            bar.update(setting.steps * len(samples.images(number)))
        self.state.wait_for_everyone()
        if not self.main:
            return None
        parts, facts = zip(
            *(read_measures(measures, number) for number in range(len(measures))), strict=True
        )
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
            "out_of_range": None
            if self.vae
            else sum(f["out_of_range"] for f in facts) / sum(f["values"] for f in facts),
            "seconds": round(sum(f["seconds"] for f in facts), 2),
            "key": key_digest(samples.key),
        }
        if samples.state(0) == "whole":
            images, labels = (samples.read(0)[0][name] for name in ("images", "labels"))
            self.config.out.joinpath("sheets").mkdir(exist_ok=True)
            sheet(images, labels, self.models[setting.model].classes).save(
                self.config.out / "sheets" / f"{setting.name}.png"
            )
        if self.config.discard_samples:
            shutil.rmtree(samples.folder, ignore_errors=True)
        return row

    def sample(
        self, setting: Setting, network: nn.Module, images: range
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
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
            seeds = image_seeds(
                config.seed, range(start, min(start + config.batch_size, images.stop))
            )
            modes = None if self.source is None else image_modes(seeds, self.source)
            known = self.models[setting.model].conditioning == "mode"
            labels = (
                modes.cpu() if known else image_labels(seeds, max(1, network.config.num_classes))
            )
            if self.unlabelled(setting):
                labels = torch.full_like(labels, network.config.num_classes)
            x = sample_images(
                network,
                None if known else labels,
                solver=setting.solver,
                steps=setting.steps,
                order=config.order,
                substeps=setting.substeps(config),
                sigmas=flow_sigmas(setting.steps, config.shift, end=config.end)
                if setting.steps
                else None,
                guidance=guidance,
                seeds=seeds,
                source=self.source,
                modes=modes,
                guide=self.guide_network,
                guide_scale=config.guide_scale,
            )
            if not x.isfinite().all():
                bad = next(
                    seed for seed, image in zip(seeds, x, strict=True) if not image.isfinite().all()
                )
                raise ValueError(
                    f"{setting.name}: the sample of seed {bad} is not finite; the checkpoint may have diverged, or try "
                    "--precision fp32"
                )
            outside, values = outside + int((x.abs() > 1).sum()), values + x.numel()
            parts.append(to_images(x, self.vae, self.device))
            all_labels.append(labels)
        facts = {
            "seconds": time.perf_counter() - started,
            "out_of_range": outside,
            "values": values,
        }
        return {"images": torch.cat(parts), "labels": torch.cat(all_labels)}, facts

    def unlabelled(self, setting: Setting) -> bool:
        """Whether the samples are of no class."""
        return self.config.unlabelled or self.models[setting.model].unlabelled

    def labelled(self, setting: Setting) -> bool:
        """Whether the samples' labels are classes."""
        return not self.unlabelled(setting) and self.models[setting.model].conditioning != "mode"

    def score(
        self, measures: Measures, reference: Reference, labelled: bool = True
    ) -> dict[str, Any]:
        """The figures; `labelled`: whether the labels are classes."""
        known = saturation_distance if self.config.saturation == "digits" else None
        figures = score(
            measures, reference, classes=self.extractor.classes if labelled else None, known=known
        )
        return {name: figures[name] for name in METRICS}

    def measure_images(self, images: RealImages, name: str) -> Measures:
        """What is measured on real images, in all processes; kept in OUT/measures/NAME."""
        key = {"of": images.key, "features": self.extractor.fingerprint, "vae": self.vae_name}
        chunks = Chunks(
            self.config.out / "measures" / name, key, len(images), self.config.chunk_size
        )
        missing = [number for number in self.my_chunks(chunks) if chunks.state(number) != "whole"]
        for number in tqdm(
            missing,
            desc=name.strip("_"),
            unit="chunk",
            disable=not self.main or not missing,
            dynamic_ncols=True,
        ):
            pixels, labels = images.get(chunks.images(number))
            chunks.write(number, as_tensors(measure(pixels, self.extractor, labels)), {})
        self.state.wait_for_everyone()
        return Measures.cat(read_measures(chunks, number)[0] for number in range(len(chunks)))

    def floor(self, reference: Reference) -> dict[str, Any]:
        """The figures of real images that no model was trained on, as many as samples if there are so many."""
        images = self.prepared(self.config.test_data, self.config.count)
        if self.main and len(images) < self.config.count:
            print(
                f"note: {self.config.test_data} has {len(images)} images, fewer than --count {self.config.count}; their "
                "Fréchet distance is a little larger for that",
                file=sys.stderr,
            )
        measures, labelled = self.measure_images(images, "_floor"), self.space.classes is not None
        return {
            "name": "real images",
            "count": len(images),
            **self.score(measures, reference, labelled),
        }

    def reference(self) -> Reference:
        """What the samples are compared with.

        Raises:
            FileNotFoundError, ValueError: it is not there, or does not fit the features.
        """
        config = self.config
        path = config.reference or config.data
        facts: dict[str, Any] = {"name": path.name}
        given: Statistics | None = None
        images: RealImages | None = None
        if path.suffix == ".npz":
            pixels, given = read_npz(path)
            if pixels is not None:
                stat = path.stat()
                images = ArrayImages(
                    pixels,
                    config.reference_count,
                    {"npz": path.name, "bytes": stat.st_size, "time": stat.st_mtime_ns},
                )
            wanted = self.extractor.facts["dimensions"]
            if given is not None and len(given.mean) != wanted:
                raise ValueError(
                    f"{path}: mu has {len(given.mean)} features, but {self.extractor.name} has {wanted}; use --features "
                    "inception with such a file, or give a reference of images"
                )
        elif (path / INDEX).exists():
            images = self.prepared(path, config.reference_count)
        elif path.is_dir():
            images = FolderImages(path, config.reference_count, self.size)
        else:
            raise FileNotFoundError(
                f"there is no reference {path}; give --reference an .npz file or a folder of images"
            )
        measures = None if images is None else self.measure_images(images, "_reference")
        facts["images"] = 0 if measures is None else len(measures)
        facts["images_for_precision_and_recall"] = min(facts["images"], config.count)
        facts["statistics"] = "of the file" if given is not None else "of the images"
        content = hashlib.sha256(json.dumps(None if images is None else images.key).encode())
        if given is not None:
            content.update(given.mean.tobytes() + given.covariance.tobytes())
        facts["fingerprint"] = content.hexdigest()[:16]
        self.reference_facts = facts
        return Reference(given or statistics(measures.features), measures, config.count)

    def save(self, report: dict[str, Any]) -> None:
        """Write OUT/results.json, atomically."""
        with atomic_write(self.results) as temporary:
            temporary.write_text(
                json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
            )


def of_classes(classes: tuple[str, ...] | None) -> str:
    """The classes that images are of, for a message."""
    return "" if classes is None else f"{len(classes)} classes ({', '.join(classes[:3])} ...) in "


def as_tensors(measures: Measures) -> dict[str, Tensor]:
    tensors = {field.name: getattr(measures, field.name) for field in dataclasses.fields(measures)}
    return {name: t for name, t in tensors.items() if t is not None}


def read_measures(chunks: Chunks, number: int) -> tuple[Measures, dict[str, Any]]:
    tensors, facts = chunks.read(number)
    return Measures(**tensors), facts
