"""Refuse options of training.evaluate that would have no effect."""

from __future__ import annotations

from collections.abc import Sequence

from gmflow_core.sampling.solvers import SOLVERS
from training.common.settings import require_unused
from training.evaluation.config import PRESETS, Config, Setting

SAMPLING = (
    *("solver", "steps", "guidance", "cfg", "guidance_interval", "substeps", "order", "spectrum"),
    *("shift", "class_shares", "source", "unlabelled", "guide", "guide_scale", "end", "seed"),
    *("precision", "discard_samples"),
)


def check_effects(config: Config, settings: Sequence[Setting], pixels: bool) -> None:
    """Check that all options that are not the preset's have an effect.

    Args:
        config: settings of the command.
        settings: points of the sweep.
        pixels: samples are pixels, not latents.

    Raises:
        ValueError: one has none.
    """
    preset = PRESETS[config.preset]
    if pixels:
        require_unused(config, preset, ("vae",), "for samples of pixels, which need no decoder")
    name = "feature_iterations" if config.features == "inception" else "inception_weights"
    require_unused(config, preset, (name,), f"with --features {config.features}")
    if config.samples:
        require_unused(config, preset, SAMPLING, "on --samples, which are there already")
        return
    if config.guide is None:
        require_unused(config, preset, ("guide_scale",), "without a --guide")
    if all(setting.guidance == "none" for setting in settings):
        names = ("guidance_interval",)
        require_unused(config, preset, names, "without a --guidance above 0 or --cfg above 1")
    solvers = sorted({setting.solver for setting in settings})
    for name in ("substeps", "order", "spectrum"):
        if not any(name in SOLVERS[solver].settings for solver in solvers):
            require_unused(config, preset, (name,), f"with --solver {' '.join(solvers)}")
