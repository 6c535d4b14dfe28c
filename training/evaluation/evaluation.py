"""Sample a sweep of settings, measure the samples, and write the report."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gmflow_core.files.atomic import atomic_write
from gmflow_core.files.errors import FileError, quoted
from gmflow_core.files.json_files import read_json, write_json
from training.common.processes import together
from training.evaluation.chunks import Chunks, key_digest, remove_chunks
from training.evaluation.config import NEIGHBOURS, Config, Setting
from training.evaluation.earlier_results import FORMAT, RESULTS, check_given, clean
from training.evaluation.export import EXPORTS, export_path
from training.evaluation.features import load_extractor
from training.evaluation.inputs import Inputs
from training.evaluation.metrics import Measures, Reference, measure, score
from training.evaluation.reference import (
    feature_key,
    few_images,
    load_reference,
    measure_images,
    prepared_images,
)
from training.evaluation.report import COLUMNS, is_row, sheet, write_csv, write_plots
from training.evaluation.sampling import Sampler
from training.evaluation.saturation import saturation_distance

KEPT = "delete it: samples are kept"
Row = dict[str, Any]  # figures of one setting, as OUT/results.json holds them


class Evaluation:
    """One evaluation command: its inputs and its results so far.

    Raises:
        FileNotFoundError, ValueError: see `Inputs`, `check_given` and `load_extractor`.
    """

    def __init__(self, config: Config):
        self.config, self.inputs = config, Inputs(config)
        self.main = self.inputs.main
        check_given(config, self.inputs.settings)
        self.inputs.state.wait_for_everyone()
        with together(self.inputs.state):
            if self.main:
                clean(config)
        self.extractor = load_extractor(self.inputs)
        self.results = config.out / RESULTS

    def run(self) -> dict[str, Any]:
        """Run all settings that are not finished yet.

        Returns:
            The content of OUT/results.json in the main process; its header in the others.
        """
        config, settings = self.config, self.inputs.settings
        reference, facts = load_reference(self.inputs, self.extractor)
        report = self.header(reference, facts)
        rows, report["floor"] = self.earlier(report) if self.main else ({}, None)
        done = [s.name for s in settings if self.is_done(rows.get(s.name), s)]
        done = self.inputs.broadcast(done)
        self.score_given(rows, reference)
        if config.test_data is not None:
            report["floor"] = self.floor(reference)
        todo = [s for s in settings if s.name not in done]
        if self.main and done:
            print(
                f"continuing: {len(done)} of {len(settings)} settings in {self.results} "
                "are finished"
            )
        sampler = Sampler(self.inputs)
        with tqdm(
            total=sum(map(self.my_calls, todo)),
            disable=not self.main or not todo,
            unit="call",
            unit_scale=True,
            dynamic_ncols=True,
        ) as bar:
            for number, setting in enumerate(todo):
                bar.set_description(f"{number + 1}/{len(todo)} {setting.name}")
                samples, measures = self.sample(setting, sampler, bar)
                if self.main:
                    rows[setting.name] = self.row(setting, samples, measures, reference)
                    self.save({**report, "results": list(rows.values())})
        if self.main:
            order = {s.name: i for i, s in enumerate(settings)}
            report["results"] = sorted(
                rows.values(), key=lambda row: order.get(row["name"], len(order))
            )
            self.finish(report)
        return report

    def header(self, reference: Reference, facts: dict[str, Any]) -> dict[str, Any]:
        """Return the part of the report that all results share."""
        config = self.config
        digits = config.saturation == "digits"
        known = "the known distribution of training.digits"
        report = {
            "format": FORMAT,
            "count": config.count,
            "seed": config.seed,
            "precision": self.inputs.precision,
            "features": self.extractor.facts,
            "reference": facts,
            "saturation": {"compared_with": known if digits else "the reference images"},
        }
        if reference.measures is not None:
            report["saturation"]["reference"] = reference.measures.saturation.double().mean().item()
        return report

    def earlier(self, report: dict[str, Any]) -> tuple[dict[str, Row], Row | None]:
        """Read the rows of OUT/results.json by name, and its floor.

        Returns:
            No rows and no floor if there is no file, or if its header differs from this one's.

        Raises:
            ValueError: the file is damaged.
        """
        if not self.results.exists():
            return {}, None
        old, rows = read_results(self.results)
        old = {"precision": "fp32", **old}  # older versions knew no other for their figures
        differ = [key for key in report if old.get(key) != report[key]]
        if differ:
            print(
                f"{self.results} was made with another {', '.join(differ)}; "
                "its figures are computed again from the samples"
            )
            return {}, None
        return rows, old.get("floor")

    def is_done(self, row: Row | None, setting: Setting) -> bool:
        """Return whether a row was made from the samples that the setting has now, and exported."""
        if not all(export_path(self.config.out, k, setting.name).exists() for k in self.exports):
            return False
        return row is not None and row.get("key") == key_digest(self.inputs.samples(setting).key)

    @property
    def exports(self) -> tuple[str, ...]:
        """Kinds of files that samples are written to, beside their own."""
        return tuple(dict.fromkeys(self.config.export))

    def my_calls(self, setting: Setting) -> int:
        """Return the network calls of this process for a setting, counted per image."""
        chunks = self.inputs.samples(setting)
        return setting.steps * sum(len(chunks.images(n)) for n in self.inputs.my_chunks(chunks))

    def sample(self, setting: Setting, sampler: Sampler, bar: tqdm) -> tuple[Chunks, Chunks]:
        """Sample and measure the chunks of a setting that are missing, in all processes.

        Returns:
            The samples and their measures.

        Raises:
            ValueError: the folder holds samples of something else, or some are not finite.
        """
        samples = self.inputs.samples(setting)
        key = {"of": samples.key, **feature_key(self.extractor)}
        folder = self.config.out / "measures" / setting.name
        measures = Chunks(folder, key, samples.count, samples.size)
        for number in self.inputs.my_chunks(samples):
            state, measured = samples.state(number), measures.state(number) == "whole"
            if state == "foreign":
                raise ValueError(
                    f"{samples.path(number)} was sampled with another "
                    f"{' and '.join(samples.differences(number))} than {setting.name} now; give "
                    "another --out, or --restart to throw away all samples there"
                )
            if state == "damaged":
                print(f"{samples.path(number)} is not whole; it is sampled again", file=sys.stderr)
            needed = not (measured and self.config.discard_samples) or self.exports
            if state != "whole" and needed:
                samples.write(number, *sampler.sample(setting, samples.images(number)))
            if not measured:
                tensors, facts = samples.read(number)
                found = measure(tensors["images"], self.extractor, tensors["labels"])
                measures.write(number, found.tensors(), facts)
            bar.update(setting.steps * len(samples.images(number)))
        self.inputs.state.wait_for_everyone()
        return samples, measures

    def row(self, setting: Setting, samples: Chunks, measures: Chunks, reference: Reference) -> Row:
        """Score a setting, draw its sheet, and discard its samples if asked for."""
        model = self.inputs.models[setting.model]
        parts, facts = zip(*map(measures.read, range(len(measures))), strict=True)
        found = Measures.cat(Measures(**tensors) for tensors in parts)
        clamped, values = (sum(f[name] for f in facts) for name in ("out_of_range", "values"))
        row = {
            "name": setting.name,
            "checkpoint": setting.checkpoint,
            "fingerprint": model.fingerprint[:16],
            "num_components": model.num_components,
            "solver": setting.solver,
            "steps": setting.steps,
            "substeps": setting.substeps(self.config),
            "guidance": setting.guidance,
            "scale": setting.scale,
            "network_calls": setting.steps,
            "count": self.config.count,
            **self.score(found, reference, self.inputs.is_labelled(setting)),
            "out_of_range": None if self.inputs.vae else clamped / values,
            "seconds": round(sum(f["seconds"] for f in facts), 2),
            "key": key_digest(samples.key),
        }
        for kind in self.exports:
            parts = (samples.read(number)[0] for number in range(len(samples)))
            EXPORTS[kind](
                ((part["images"], part["labels"]) for part in parts),
                samples.count,
                self.inputs.size,
                self.inputs.is_labelled(setting),
                export_path(self.config.out, kind, setting.name),
            )
        if samples.state(0) == "whole":
            images, labels = (samples.read(0)[0][name] for name in ("images", "labels"))
            with atomic_write(self.config.out / "sheets" / f"{setting.name}.png") as temporary:
                sheet(images, labels, model.classes).save(temporary, format="png")
        if self.config.discard_samples:
            remove_chunks(samples.folder)
        return row

    def score_given(self, rows: dict[str, Row], reference: Reference) -> None:
        """Score --samples that have no row yet, in all processes; add rows in the main one."""
        out = self.config.out
        for name, samples in self.inputs.given.items():
            if self.extractor.classes is not None:
                samples.check_labels(len(self.extractor.classes))
            key = key_digest(json.dumps(samples.key, sort_keys=True))
            if self.inputs.broadcast(name in rows and rows[name].get("key") == key):
                continue
            if self.main and len(samples) < self.config.count:
                self.note_few(samples.path, len(samples))
            measures = measure_images(self.inputs, self.extractor, samples, name)
            if not self.main:
                continue
            figures = self.score(measures, reference, samples.labels is not None)
            given = {"name": name, "checkpoint": name, "count": len(samples), **figures, "key": key}
            rows[name] = {**dict.fromkeys(COLUMNS), **given}
            images, labels = samples.get(range(min(len(samples), 200)))
            classes = 0 if labels is None else int(labels.max()) + 1
            with atomic_write(out / "sheets" / f"{name}.png") as temporary:
                sheet(images, labels, classes).save(temporary, format="png")

    def note_few(self, what: Path, count: int) -> None:
        """Say that there are fewer images than --count."""
        print(
            f"note: {what} has {count} images, fewer than --count {self.config.count}; their "
            "Fréchet distance is a little larger for that",
            file=sys.stderr,
        )

    def floor(self, reference: Reference) -> Row:
        """Score real images that no model was trained on, as many as samples if there are enough.

        No model can be expected to do better.

        Raises:
            ValueError: there are too few for precision and recall.
        """
        config = self.config
        images = prepared_images(self.inputs, config.test_data, config.count)
        if len(images) <= NEIGHBOURS and reference.measures is not None:
            raise few_images(config.test_data, len(images))
        if self.main and len(images) < config.count:
            self.note_few(config.test_data, len(images))
        measures = measure_images(self.inputs, self.extractor, images, "_floor")
        figures = self.score(measures, reference, self.inputs.space.classes is not None)
        return {"name": "real images", "count": len(images), **figures}

    def score(self, measures: Measures, reference: Reference, labelled: bool) -> dict[str, Any]:
        """Return the figures of images; `labelled`: their labels are classes.

        Precision and recall compare with as many real images as there are, see `Reference.limit`.
        """
        classes, count = self.extractor.classes if labelled else None, len(measures.features)
        if reference.limit is None or count < reference.limit:
            reference = dataclasses.replace(reference, limit=count)
        known = saturation_distance if self.config.saturation == "digits" else None
        return score(measures, reference, classes=classes, known=known)

    def save(self, report: dict[str, Any]) -> None:
        """Write OUT/results.json, atomically."""
        write_json(self.results, report)

    def finish(self, report: dict[str, Any]) -> None:
        """Write the results as JSON, as a table and as plots."""
        out = self.config.out
        self.save(report)
        write_csv(report, out / "results.csv")
        plots = write_plots(report, out)
        names = [str(self.results), "results.csv", *(plot.name for plot in plots)]
        print(f"results: {', '.join(names)}, and sheets of samples in sheets/")


def read_results(path: Path) -> tuple[dict[str, Any], dict[str, Row]]:
    """Read OUT/results.json.

    Returns:
        All of it, and its rows by name.

    Raises:
        FileError: it is damaged, or a row is not what `Evaluation.row` returns.
    """
    old = read_json(path, KEPT)
    found = old.get("results") if isinstance(old, dict) else old
    if not isinstance(old, dict) or not isinstance(found, list):
        raise FileError(path, f"holds {quoted(found)} instead of results", KEPT)
    for row in found:
        if not is_row(row):
            raise FileError(path, f"holds the result {quoted(row)}", KEPT)
    if old.get("floor") is not None and not is_row(old["floor"], real_images=True):
        raise FileError(path, f"holds the floor {quoted(old['floor'])}", KEPT)
    return old, {row["name"]: row for row in found}
