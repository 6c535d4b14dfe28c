"""Sample a student while it is trained, and compare it with its teacher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gmflow_core.flow.path import flow_sigmas
from gmflow_core.models.mlp import GMFlowMLP
from gmflow_core.sampling.guidance import Guidance
from gmflow_core.sampling.images import sample_images
from gmflow_core.source.source import GaussianMixtureSource
from gmflow_core.toys.checkerboard import total_variation
from gmflow_core.toys.density_picture import density_picture
from gmflow_core.toys.points import sample_points
from training.evaluation.models import image_labels, image_modes, image_seeds
from training.loop.distill_presets import DistillConfig

TEACHER_STEPS = 32  # Euler steps of the teacher that the student is compared with
POINTS, PICTURES = 20_000, 40  # samples


class StudentSamples:
    """Samples of a student at fixed seeds, and figures of them.

    Args:
        config: of the run.
        teacher: its network.
        labels: number of the labels to choose from; 0 if there are none.
        source: of the teacher's noise, if it knows the modes.
    """

    def __init__(
        self,
        config: DistillConfig,
        teacher: nn.Module,
        labels: int,
        source: GaussianMixtureSource | None,
    ):
        self.config, self.teacher, self.labels, self.source = config, teacher, labels, source
        self.of_points = isinstance(teacher, GMFlowMLP)
        self.target: Tensor | None = None  # the teacher's samples

    def draw(self, network: nn.Module, images: range, **settings: Any) -> Tensor:
        """Return samples of a network, the same noise and labels for each.

        Args:
            images: their numbers; each has a seed of its own, but for points.
            settings: `solver`, `sigmas`, `guidance` and the like, see `sample_images`.
        """
        if self.of_points:
            settings.pop("guidance", None)
            return sample_points(network, len(images), **settings)
        seeds, modes, count = image_seeds(0, images), None, len(images)
        labels = image_labels(seeds, max(1, self.labels))
        if not self.labels:
            labels = torch.full((count,), network.config.num_classes)
        if self.source is not None:
            labels, modes = None, image_modes(seeds, self.source)
        parts = [
            sample_images(
                network,
                None if labels is None else labels[start : start + 100],
                seeds=seeds[start : start + 100],
                source=self.source,
                modes=None if modes is None else modes[start : start + 100],
                **settings,
            )
            for start in range(0, count, 100)
        ]
        return torch.cat(parts)

    def of_student(self, student: nn.Module, images: range) -> Tensor:
        """Return samples of the student with the calls that it is made for."""
        config = self.config
        sigmas = flow_sigmas(
            config.steps, config.time_shift, final_step_size=config.final_step_size
        )
        settings = {"substeps": config.substeps, "shift": config.time_shift, "temperature": 1.0}
        return self.draw(student, images, solver="gm-policy", sigmas=sigmas, **settings)

    def of_teacher(self, images: range, guidance: Guidance | None) -> Tensor:
        """Return samples of the teacher, by many Euler steps."""
        sigmas = flow_sigmas(TEACHER_STEPS, self.config.time_shift)
        guided = {} if guidance is None else {"guidance": guidance}
        return self.draw(self.teacher, images, solver="euler", sigmas=sigmas, **guided)

    def report(self, student: nn.Module) -> tuple[Tensor, dict[str, float]]:
        """Return samples to show, and figures of the student.

        "teacher_distance": the root mean square difference to the teacher's samples from the same
        noise, relative to these; "total_variation" of points to the checkerboard.
        """
        shown = range(POINTS if self.of_points else PICTURES)
        if self.target is None:
            self.target = self.of_teacher(shown, self.config.teacher_guidance())
        samples = self.of_student(student, shown)
        difference = (samples - self.target).square().mean() / self.target.square().mean()
        figures = {"teacher_distance": float(difference.sqrt())}
        if self.of_points:
            figures["total_variation"] = total_variation(samples)
            return density_picture(samples, bins=64), figures
        return samples, figures
