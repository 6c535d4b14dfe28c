"""The command `gmflow fetch`: published models from the Hugging Face hub, whole and checked."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .files.errors import printable
from .files.fetching import (
    RemoteFile,
    cache_place,
    check_room,
    fetch_into,
    fetch_into_cache,
    remote_files,
    unmatched,
)
from .files.published import COLLECTIONS, ENCODERS, NOTES, Part, all_parts, parts_of
from .files.targets import path_argument

UNKNOWN = "unknown here; the hub says it when the files are fetched"


def add_fetch_command(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser of all commands."""
    about = "published models from the Hugging Face hub, into its cache or a folder"
    p = commands.add_parser("fetch", help=about, description=about)
    p.add_argument("collection", choices=COLLECTIONS, help="whose models")
    about = "these parts of it; --list names them (default: those that are used most)"
    p.add_argument("--only", nargs="+", default=[], dest="parts", metavar="PART", help=about)
    about = "encoder of MM-FM's models (default dinov2-b)"
    p.add_argument("--encoder", choices=ENCODERS, help=about)
    places = p.add_mutually_exclusive_group()
    about = "folder for the files, each repository in a folder of its name"
    places.add_argument("--to", type=path_argument, metavar="FOLDER", help=about)
    about = "folder of ComfyUI: into the folders of its models/"
    places.add_argument("--comfyui", type=path_argument, metavar="FOLDER", help=about)
    about = "only list parts, files and what is known of their sizes; asks nobody"
    p.add_argument("--list", action="store_true", dest="only_list", help=about)
    about = "replace files that are there with another content, with --to or --comfyui"
    p.add_argument("--force", action="store_true", help=about)
    p.set_defaults(run=fetch)


def fetch(args: argparse.Namespace) -> None:
    """Fetch parts of a collection and check them, or list them.

    Raises:
        ValueError: a part is unknown, or an option does not go with it; or the hub lacks some of
            the files, after the others are fetched.
        OSError: the hub cannot be reached, or a file cannot be written.
    """
    if args.encoder and args.collection != "mm-fm":
        raise ValueError(f"--encoder is for mm-fm; leave it out with {args.collection}")
    if args.force and args.to is None and args.comfyui is None:
        raise ValueError("--force goes with --to or --comfyui: the hub's cache keeps every version")
    encoder = args.encoder or next(iter(ENCODERS))
    if args.only_list:
        print(printable(listing(args.collection, encoder, args.parts)))
        return
    parts = parts_of(args.collection, encoder, args.parts)
    if args.comfyui is not None:
        check_comfyui(args.comfyui, parts)
    places: list[tuple[RemoteFile, Path]] = []
    missing: list[str] = []
    for part in parts:
        files = remote_files(part.repository, part.files)
        missing += [f"{part.repository}/{name}" for name in unmatched(files, part.files)]
        places += [(file, _place(part, file, args)) for file in files]
    in_all = sum(file.size or 0 for file, _ in places)
    print(f"{len(places)} files, {in_all / 1e9:.2f} GB in all", file=sys.stderr, flush=True)
    check_room(places)
    for number, (file, path) in enumerate(places, 1):
        _say(number, len(places), file)
        if args.to is None and args.comfyui is None:
            print(printable(str(fetch_into_cache(file))))
            continue
        is_new = fetch_into(file, path, args.force)
        how = "size and digest" if file.is_checked else "size"
        print(printable(f"{path.resolve()}: {'fetched' if is_new else 'there'}, {how} right"))
    if missing:
        raise ValueError(
            f"the hub does not have {', '.join(missing)}; it was published otherwise: look at its "
            "page there"
        )


def listing(collection: str, encoder: str, names: Sequence[str]) -> str:
    """Return a text about the parts of a collection, from what this version knows of them."""
    every = all_parts(collection, encoder)
    shown = parts_of(collection, encoder, names or [part.name for part in every])
    lines = [f"{collection}{f', encoder {encoder}' if collection == 'mm-fm' else ''}"]
    for part in shown:
        mark = "" if part.usual else "  (only with --only)"
        lines += [
            f"\n{part.name}{mark}: {part.what}",
            f"  repository  https://huggingface.co/{part.repository}",
            f"  size        {part.size or UNKNOWN}",
            f"  ComfyUI     {f'models/{part.comfyui}' if part.comfyui else 'not as it is'}",
            *(f"  file        {file}" for file in part.files),
        ]
    lines += ["", NOTES[collection]] if NOTES[collection] else []
    lines.append(
        "\nChecksums are not known here: the hub gives them, and every file is compared with them."
    )
    return "\n".join(lines)


def check_comfyui(folder: Path, parts: Sequence[Part]) -> None:
    """Check that a folder is ComfyUI's, and that it can use the parts.

    Raises:
        ValueError: it is not, or it cannot.
    """
    if not (folder / "models").is_dir():
        raise ValueError(f"--comfyui {folder} holds no models/; give the folder of ComfyUI")
    unfit = [part.name for part in parts if part.comfyui is None]
    if unfit:
        raise ValueError(
            f"ComfyUI cannot use {', '.join(unfit)} as they are: leave them out, or fetch them "
            "--to a folder (docs/mixture_sources.md has the commands that convert MM-FM's)"
        )


def _place(part: Part, file: RemoteFile, args: argparse.Namespace) -> Path:
    """Return where a file belongs."""
    if args.to is not None:
        return args.to / part.repository.split("/")[1] / file.path
    if args.comfyui is None:
        return cache_place(file)
    return args.comfyui / "models" / part.comfyui / file.path


def _say(number: int, count: int, file: RemoteFile) -> None:
    """Print which file comes next, and its size."""
    size = "size unknown" if file.size is None else f"{file.size:,} bytes"
    text = f"[{number}/{count}] {file.repository}: {file.path}, {size}"
    print(printable(text), file=sys.stderr, flush=True)
