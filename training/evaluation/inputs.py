"""Check the inputs of an evaluation, and load what all its settings share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from gmflow_core.models.precision import chosen_precision
from gmflow_core.sampling.solvers import SOLVERS
from gmflow_core.source.files import load_source
from training.common.devices import on_cpu
from training.common.processes import PATIENCE
from training.data.shards import LatentDataset
from training.encoders.fingerprints import MARK, fingerprint
from training.encoders.load import load_vae
from training.evaluation.chunks import Chunks
from training.evaluation.config import Config, Setting, settings_of, short_names
from training.evaluation.effects import check_effects
from training.evaluation.given_samples import open_samples
from training.evaluation.models import Model, Space, class_shares


class Inputs:
    """Settings, models, autoencoder and processes of one evaluation.

    Attributes:
        state: accelerate's processes.
        device: of this process.
        main: this is the main process.
        precision: of the networks, "bf16" or "fp32".
        space: of the samples.
        settings: all points of the sweep.
        models: one for each --checkpoint.
        given: samples by name, one for each of --samples.
        guide: the weaker model of autoguidance, or None.
        source: mixture source of the noise, on the device, or None.
        shares: how often each class is sampled, (classes,); None: all alike.
        vae, vae_name: decoder of latents and its name; None for pixels.
        size: width and height of the images in pixels.

    Raises:
        FileNotFoundError, ValueError: an input is missing, or the inputs do not fit each other.
    """

    def __init__(self, config: Config):
        check_inputs(config)
        self.config = config
        self.state = PartialState(cpu=on_cpu(config.device), timeout=PATIENCE)
        self.device, self.main = self.state.device, self.state.is_main_process
        self.precision = chosen_precision(config.precision, self.device)
        names = short_names([str(path) for path in config.samples], "--samples")
        opened = [open_samples(path, config.count) for path in config.samples]
        self.given = dict(zip(names, opened, strict=True))
        if config.data is not None:
            self.space = Space.of_data(config.data)
        elif config.checkpoint:
            self.space = Space.of_checkpoints(config.checkpoint)
        else:
            shape = (3, opened[0].size, opened[0].size)
            self.space = Space(str(config.samples[0]), "pixels", shape, None, None)
        self.models = [Model(checkpoint, self.space) for checkpoint in config.checkpoint]
        self.settings = settings_of(config, [model.data for model in self.models])
        check_effects(config, self.settings, self.space.kind == "pixels")
        self.guide = None if config.guide is None else Model(config.guide, self.space)
        self.source = None if config.source is None else load_source(config.source, self.device)
        for model in [*self.models, *([self.guide] if self.guide else [])]:
            self.check_model(model)
        self.shares = None
        if config.class_shares == "data":
            data = LatentDataset(config.data, in_memory=False)
            self.shares = class_shares(data.labels, len(data.classes))
        self.vae_name, self.vae = None, None
        self.vae_key: dict[str, str | None] = {"vae": None}  # of what is made with it
        if self.space.kind == "latents":
            self.vae_name = config.vae or self.space.vae
            if not self.vae_name:
                raise ValueError(
                    f"{self.space.name} has latents, but does not say of which VAE; "
                    "give --vae a folder or a hub name"
                )
            with self.state.local_main_process_first():
                self.vae = load_vae(self.vae_name, self.device)
            self.vae_key = {"vae": self.vae_name, MARK: fingerprint(self.vae, decoding=True)}
        elif self.space.shape[0] != 3:
            raise ValueError(
                f"{self.space.name} has pixels of shape {self.space.shape}; "
                "images of 3 channels are needed"
            )
        self.size = self.space.shape[1] * (self.vae.factor if self.vae else 1)
        for samples in self.given.values():
            if samples.size != self.size:
                raise ValueError(
                    f"{samples.path} has images of {samples.size} x {samples.size} pixels, but "
                    f"{self.space.name} some of {self.size} x {self.size}; they must be alike"
                )

    def check_model(self, model: Model) -> None:
        """Check that a model fits the mixture source, the guide, --unlabelled and --class-shares.

        Raises:
            ValueError: it does not.
        """
        config, guide = self.config, self.guide
        if self.source is not None:
            self.source.require_record(model.record, model.checkpoint)
        elif model.record is not None:
            raise ValueError(f"{model.checkpoint} was trained with a mixture source; give --source")
        if config.unlabelled and model.conditioning == "mode":
            raise ValueError(
                f"--unlabelled does not go with {model.checkpoint}, "
                "whose labels are the modes of its source"
            )
        unlabelled = config.unlabelled or model.unlabelled
        if unlabelled and (max((0, *config.guidance)) > 0 or max((1, *config.cfg)) > 1):
            raise ValueError(
                f"--guidance and --cfg steer away from samples of no class, which those of "
                f"{model.checkpoint} are; leave them out"
            )
        by_class = model.conditioning != "mode" and not unlabelled
        if config.class_shares == "data" and not by_class:
            raise ValueError(
                f"--class-shares data does not go with {model.checkpoint}, whose samples have no "
                "classes here"
            )
        labels = (model.conditioning, model.classes)
        if guide and (guide.conditioning, guide.classes) != labels:
            raise ValueError(
                f"{config.guide} and {model.checkpoint} have other labels; "
                "a guide is told what the model is told"
            )

    def is_unlabelled(self, setting: Setting) -> bool:
        """Return whether the samples of a setting belong to no class."""
        return self.config.unlabelled or self.models[setting.model].unlabelled

    def is_labelled(self, setting: Setting) -> bool:
        """Return whether the labels of a setting are classes."""
        by_mode = self.models[setting.model].conditioning == "mode"
        return not self.is_unlabelled(setting) and not by_mode

    def samples(self, setting: Setting) -> Chunks:
        """Return the files of a setting's samples; their key holds all that decides the images."""
        config, model = self.config, self.models[setting.model]
        key = {
            "checkpoint": model.fingerprint,
            "solver": setting.solver,
            "steps": setting.steps,
            "substeps": setting.substeps(config),
            "order": config.order if setting.solver.startswith("gm-") else None,
            "shift": setting.choice.shift,
            "guidance": setting.guidance,
            "scale": setting.scale,
            "interval": config.guidance_interval if setting.guidance != "none" else None,
            "seed": config.seed,
            # older versions called bfloat16 weights bf16
            "precision": "fp32" if self.precision == "fp32" else "bf16 autocast",
            **self.vae_key,
        }
        if config.end:
            key["end"] = config.end
        if not config.spectrum and "spectrum" in SOLVERS[setting.solver].settings:
            key["spectrum"] = "none"
        if setting.choice.final_step_size is not None:
            key["distilled"] = [setting.choice.final_step_size, setting.choice.temperature]
        if setting.choice.shift != 1 and setting.substeps(config) is not None:
            key["substeps in"] = "shifted time"  # older versions had them of equal size in sigma
        if self.is_unlabelled(setting):
            key["labels"] = "none"
        elif self.shares is not None:
            key["class shares"] = self.shares.tolist()
        if self.source is not None:
            key["source"] = self.source.digest
        if self.guide is not None:
            key["guide"] = [self.guide.fingerprint, config.guide_scale]
        folders = [config.out / part / setting.name for part in ("samples", "measures")]
        return Chunks(folders[0], key, config.count, config.chunk_size, made=folders[1])

    def my_chunks(self, chunks: Chunks) -> range:
        """Return the numbers of the chunks that this process is responsible for."""
        return range(self.state.process_index, len(chunks), self.state.num_processes)

    def broadcast(self, value: Any) -> Any:
        """Return the main process's value in all processes."""
        if self.state.num_processes == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, 0)
        return box[0]


def check_inputs(config: Config) -> None:
    """Check that there are models, and something to compare them with.

    Raises:
        ValueError: something is missing.
    """
    if bool(config.checkpoint) == bool(config.samples):
        raise ValueError(
            "give either at least one --checkpoint, or --samples that are to be scored"
        )
    if config.export and config.samples:
        raise ValueError(
            "--export writes the samples of a --checkpoint; leave it out with --samples"
        )
    if config.data is None and config.reference is None:
        raise ValueError(
            "give --data, the prepared data that the model was trained on, or a --reference to "
            "compare with"
        )
    own_features = config.features != "inception"
    if config.data is None and own_features and not Path(config.features).exists():
        raise ValueError(f"there is no {config.features}; give --data, to train it on")
