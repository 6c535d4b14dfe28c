"""The command `gmflow sample`: points of a 2-D model, or pictures of classes."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .files.atomic import atomic_write, check_target, remove_leftovers
from .files.checkpoint import load_checkpoint, read_metadata
from .files.errors import FileError, printable
from .files.hub import tidy_source
from .files.safetensors_files import is_finite, write_safetensors
from .files.targets import check_no_input, check_replaces
from .flow.checks import whole_number
from .models.mlp import GMFlowMLP
from .models.precision import chosen_precision, set_precision
from .pictures import image_grid, to_image
from .pipeline import MOST_DECODED, ImagePipeline
from .sample_arguments import add_sample_arguments
from .sampling.few_steps import choose_sampling
from .sampling.guidance import Guidance
from .sampling.seeds import same_noise
from .sampling.solvers import SOLVERS
from .toys.density_picture import density_picture
from .toys.points import sample_points

MOST_NUMBERS = 2**31  # of all samples together that are kept in memory, 8 GiB
ENDINGS = (".png", ".safetensors", "")  # of --out; the last is a folder's
CONTENTS = ({"points"}, {"samples", "labels"})  # tensors of a .safetensors file of samples
OF_SOLVERS = ("order", "substeps")  # options that not every solver takes
FIRST_LABELS = 10  # that are sampled if none are given
SMALLEST_SHOWN = 64  # pixels on a side of an image on a sheet, to which small ones are enlarged


def add_sample_command(
    commands: argparse._SubParsersAction, common: argparse.ArgumentParser
) -> None:
    """Add the command to the parser of all commands."""
    about = "sample a checkpoint: points, or images of classes"
    p = commands.add_parser("sample", parents=[common], help=about)
    add_sample_arguments(p)
    p.set_defaults(run=sample)


def sample(args: argparse.Namespace) -> None:
    """Sample a checkpoint and write a picture, single pictures, or the numbers."""
    for name in ("steps", "substeps"):
        if getattr(args, name) is not None:
            whole_number(f"--{name}", getattr(args, name))
    args.checkpoint = tidy_source(args.checkpoint)
    _check_out(args)
    metadata = read_metadata(args.checkpoint)
    _check_effects(args, metadata)
    if metadata["model_class"] == GMFlowMLP.__name__:
        _sample_points(args, metadata["data"])
    else:
        _sample_images(args)
    print(printable(str(args.target.resolve())))


def _check_effects(args: argparse.Namespace, metadata: dict[str, Any]) -> None:
    """Check that the settings that are given for the solver have an effect.

    Args:
        metadata: the checkpoint's, which may choose the solver.

    Raises:
        ValueError: one has none.
    """
    solver = choose_sampling(metadata["data"], solver=args.solver).solver
    if args.no_spectrum:
        if "spectrum" not in SOLVERS[solver].settings:
            raise ValueError(f"--no-spectrum has no effect with --solver {solver}; leave it out")
        if not metadata["config"].get("spectrum_layers"):
            raise ValueError(
                "--no-spectrum has no effect on a model without a spectrum network; leave it out"
            )
    for name in OF_SOLVERS:
        value = getattr(args, name)
        if value is not None and name not in SOLVERS[solver].settings:
            raise ValueError(f"--{name} {value} has no effect with --solver {solver}; leave it out")


def _solver_settings(args: argparse.Namespace) -> dict[str, int | None]:
    """Return the settings that are given for the solver."""
    given = {name: getattr(args, name) for name in OF_SOLVERS if getattr(args, name) is not None}
    return {**given, "spectrum": None} if args.no_spectrum else given


def _check_out(args: argparse.Namespace) -> None:
    """Check that --out can be written, and remove what killed processes left there.

    Raises:
        ValueError: it has another ending, is a file without one, or the model, its source or VAE.
        FileExistsError: it is a file of numbers that are no samples.
        WriteError: it cannot be written.
    """
    out = args.target
    if out.suffix not in ENDINGS:
        raise ValueError(
            f"--out {out} must end in .png (a picture) or .safetensors (the numbers), or have no "
            "ending (a folder of single pictures)"
        )
    if not out.suffix and os.path.exists(out) and not out.is_dir():
        raise ValueError(f"--out {out} is a file; give a folder, or a name that ends in .png")
    folder = out if not out.suffix else out.parent
    check_target(folder / "picture.png" if not out.suffix else out)
    inputs = {"the checkpoint": args.checkpoint, "--source": args.source, "--vae": args.vae}
    check_no_input(out, inputs)
    if out.suffix == ".safetensors":
        check_replaces(out, CONTENTS)
    remove_leftovers(folder)


def _sample_points(args: argparse.Namespace, data: dict[str, Any]) -> None:
    """Sample points of a 2-D model, and write them or a picture of their density."""
    given = {"labels": args.labels, "unlabelled": args.unlabelled, "guidance": args.guidance}
    if any(given.values()):
        raise ValueError(
            f"{args.checkpoint} is a 2-D model without classes; leave out --labels, --unlabelled "
            "and --guidance"
        )
    if data.get("source"):
        raise ValueError(
            f"{args.checkpoint} was trained with a mixture source, which this command does not "
            "draw for 2-D models; sample it as training.source_toys does, from draws of its source"
        )
    for name in ("source", "vae", "seeds"):
        if getattr(args, name) is not None:
            raise ValueError(
                f"{args.checkpoint} is a 2-D model, which has no use for --{name}; leave it out"
            )
    if not args.target.suffix:
        raise ValueError(f"--out {args.target} must end in .png or .safetensors for a 2-D model")
    if args.outline and args.target.suffix != ".png":
        raise ValueError(f"--outline is drawn over a picture, not over --out {args.target}")
    own = choose_sampling(data, solver=args.solver, steps=args.steps, shift=args.shift)
    network, _ = load_checkpoint(args.checkpoint, device=args.device)
    if args.precision != "auto":  # small networks gain nothing
        set_precision(network, chosen_precision(args.precision, torch.device(args.device)))
    points = sample_points(
        network,
        checked_count(args.count, 100_000, network.channels),
        solver=own.solver,
        steps=own.steps,
        **_solver_settings(args),
        shift=own.shift,
        seed=args.seed,
        sigmas=own.sigmas(),
        temperature=own.temperature,
        progress=show_progress,
    )
    if not is_finite(points):
        raise FileError(
            args.checkpoint,
            "makes samples that are not finite",
            "its weights are damaged or too large; with --precision bf16, try fp32",
        )
    if args.target.suffix == ".png":
        save_png(to_image(density_picture(points, outline=args.outline)), args.target)
    else:
        write_safetensors({"points": points.contiguous()}, args.target, {})


def _sample_images(args: argparse.Namespace) -> None:
    """Sample images, and write a sheet with a row for each label, single ones, or the numbers."""
    _check_for_images(args)
    guidance = _guidance(args)
    pipeline = ImagePipeline.load(
        args.checkpoint,
        vae=args.vae,
        source=args.source,
        device=args.device,
        precision=args.precision,
    )
    classes = _labels(args, pipeline)
    as_numbers = args.target.suffix == ".safetensors"
    factor = 1
    if not as_numbers and not pipeline.makes_pixels:
        factor = pipeline.require_vae().factor  # before the long work
    config = pipeline.network.config
    wanted = len(args.seeds) if args.seeds is not None else args.count
    numbers = config.channels * config.latent_size**2
    pixels = 0 if as_numbers else 3 * (config.latent_size * factor) ** 2
    each = max(numbers, pixels) * (1 if classes is None else len(classes))
    if not args.target.suffix:
        each = 1  # pictures are written as they are made
    elif each > MOST_NUMBERS:
        raise ValueError(
            f"one image of each of {len(classes)} labels is too much for a sheet or file; give "
            f"--labels, at most {len(classes) * MOST_NUMBERS // each} of them, or a folder as --out"
        )
    columns = checked_count(wanted, 8 if pipeline.makes_pixels else 4, each)
    labels = None if classes is None else [label for label in classes for _ in range(columns)]
    count = columns if labels is None else len(labels)
    seeds = _seeds(args, columns, count)
    parts = pipeline.sample_in_parts(
        labels,
        seeds=seeds,
        solver=args.solver,
        steps=args.steps,
        shift=args.shift,
        guidance=guidance,
        **_solver_settings(args),
        progress=show_progress,
    )
    ids = [config.num_classes] * count if labels is None else labels
    if not args.target.suffix:
        pairs = zip(ids, seeds, strict=True)
        names = [f"{_file_name(pipeline, label)}_seed{seed}.png" for label, seed in pairs]
        return _write_single_pictures(pipeline, parts, args.target, names)
    x = torch.cat(list(parts))
    if as_numbers:
        return write_safetensors({"samples": x, "labels": torch.tensor(ids)}, args.target, {})
    images = pipeline.decode(x)
    scale = max(1, SMALLEST_SHOWN // images.shape[-1])
    save_png(to_image(image_grid(images, columns, scale)), args.target)


def _guidance(args: argparse.Namespace) -> Guidance | None:
    """Return the guidance that --guidance asks for; None for 0.

    Raises:
        ValueError: it is no weight.
    """
    try:
        return Guidance(args.guidance) if args.guidance else None
    except ValueError as error:
        raise ValueError(f"--guidance: {error}") from error


def _check_for_images(args: argparse.Namespace) -> None:
    """Check that options go together for a model of images.

    Raises:
        ValueError: they do not, or two of --seeds would give the same pictures.
    """
    if args.outline:
        raise ValueError(
            f"{args.checkpoint} is a model of images, which has no use for --outline; leave it out"
        )
    if args.seeds is None:
        return
    if args.count is not None:
        raise ValueError("--count does not go with --seeds, of which each is one image")
    if args.seed:
        raise ValueError(f"--seed {args.seed} does not go with --seeds; leave one of them out")
    if (same := same_noise(args.seeds)) is not None:
        why = "is there twice" if same[0] == same[1] else f"and {same[1]} are equal modulo 2**32"
        raise ValueError(
            f"--seeds {same[0]} {why}, which makes the same picture; give seeds that differ"
        )


def _write_single_pictures(
    pipeline: ImagePipeline, parts: Iterable[Tensor], folder: Path, names: Sequence[str]
) -> None:
    """Write pictures as soon as they are sampled, and say how many there are if that is stopped.

    Args:
        parts: the samples of all pictures in order, (b, C, h, w) each.
        names: of the files.
    """
    written = 0
    try:
        for few in (few for part in parts for few in part.split(MOST_DECODED)):
            for image in pipeline.decode(few):
                save_png(to_image(image.permute(1, 2, 0)), folder / names[written])
                written += 1
    except BaseException as error:
        if written or isinstance(error, KeyboardInterrupt):
            text = f"\n{written} of {len(names)} pictures are written in {folder}"
            with suppress(OSError):
                print(printable(text), file=sys.stderr, flush=True)
        raise


def _seeds(args: argparse.Namespace, columns: int, count: int) -> list[int]:
    """Return the seed of each of `count` images, of which a sheet's row has `columns`.

    Raises:
        ValueError: those that follow --seed go beyond the largest one.
    """
    if args.seeds is not None:
        return args.seeds * (count // columns)
    return seeds_from(args.seed, count)


def seeds_from(seed: int, count: int) -> list[int]:
    """Return the seeds of `count` images that follow --seed.

    Raises:
        ValueError: they go beyond the largest one.
    """
    if seed + count > 2**63:
        raise ValueError(
            f"--seed {seed} is too large for {count} images, whose seeds follow it; the largest is "
            "2**63 - 1"
        )
    return list(range(seed, seed + count))


def _labels(args: argparse.Namespace, pipeline: ImagePipeline) -> list[int] | None:
    """Return the labels as they are given; None for images of no class.

    Raises:
        ValueError: a label is unknown, or there twice with the same seeds, or --unlabelled does not
            go with the rest.
    """
    if not args.unlabelled and (args.labels or not pipeline.data.get("unlabelled")):
        wanted = args.labels or range(min(FIRST_LABELS, pipeline.num_classes))
        found = pipeline.label_ids(list(wanted))
        twice = next((label for label in found if found.count(label) > 1), None)
        if twice is not None and args.seeds is not None:
            raise ValueError(
                f"--labels names class {twice} more than once, and --seeds would make the same "
                "pictures of it; name it once, or give --count in the place of --seeds"
            )
        return found
    if args.labels:
        raise ValueError(f"--unlabelled does not go with --labels {' '.join(args.labels)}")
    if pipeline.knows_modes:
        raise ValueError(
            f"--unlabelled does not go with {args.checkpoint}, whose labels are modes of its source"
        )
    return None


def _file_name(pipeline: ImagePipeline, label: int) -> str:
    """Return the number and the first name of a class, as a part of a file's name."""
    if label == pipeline.num_classes:
        return "unlabelled"
    name = pipeline.labels[label].split(",")[0] if label < len(pipeline.labels) else ""
    plain = re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_")[:40]
    return f"{label:04}_{plain}" if plain not in ("", str(label)) else f"{label:04}"


def checked_count(count: int | None, default: int, numbers: int) -> int:
    """Return --count, or the default, after a check of its size.

    Args:
        count: as the user gave it.
        numbers: that are kept in memory for each 1 of --count.

    Raises:
        ValueError: it is below 1, or more than MOST_NUMBERS would be sampled.
    """
    count = max(1, min(default, MOST_NUMBERS // numbers)) if count is None else count
    if not 1 <= count <= MOST_NUMBERS // numbers:
        raise ValueError(
            f"--count is {count}; it must be from 1 to {MOST_NUMBERS // numbers} for this model "
            "and its labels"
        )
    return count


def save_png(picture: Image.Image, path: Path) -> None:
    """Write a picture as PNG, atomically.

    Raises:
        WriteError: it cannot be written.
    """
    with atomic_write(path) as temporary:
        picture.save(temporary, format="PNG")


def show_progress(done: int, total: int) -> None:
    """Print how far the sampling is, on one line."""
    print(
        f"\rnetwork call {done}/{total}",
        end="\n" if done == total else "",
        file=sys.stderr,
        flush=True,
    )
