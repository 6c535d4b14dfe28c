"""The command `gmflow adapter`: show what an adapter was made for, or write it into its file."""

from __future__ import annotations

import argparse
from pathlib import Path

from .files.adapter_metadata import EXPECTED, AdapterFacts, read_adapter_facts, set_adapter_facts
from .files.atomic import check_target, remove_leftovers
from .files.errors import printable
from .files.targets import check_is_new, is_same, path_argument

OPTIONS = {  # of the facts: type, name of the value, help
    "base": (str, "NAME", "base model, such as FLUX.1, FLUX.2 or Qwen-Image"),
    "steps": (int, "N", "fewest network calls it was made for"),
    "shift": (float, "S", "time shift of its sigmas"),
    "final_step_size": (float, "F", "size of the last step relative to the others, in (0, 1]"),
    "guidance": (float, "G", "distilled guidance of the base model (FluxGuidance)"),
    "temperature": (float, "T", "of the mixture at all steps but the last, in (0, 1]"),
}


def add_adapter_command(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser of all commands."""
    about = "what an adapter was made for; with options, write it into the file's metadata"
    p = commands.add_parser("adapter", help=about, description=about)
    p.add_argument("file", type=Path, help="a GM adapter, .safetensors")
    for name, (kind, value, text) in OPTIONS.items():
        p.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=value, help=text)
    text = f"what the file is to state no longer: {', '.join(EXPECTED)}"
    names = {"nargs": "+", "default": [], "choices": list(EXPECTED), "metavar": "NAME"}
    p.add_argument("--remove", **names, help=text)
    text = "new file to write (default: FILE itself, whose tensors stay as they are)"
    p.add_argument("--out", type=path_argument, dest="target", metavar="FILE", help=text)
    p.set_defaults(run=adapter)


def adapter(args: argparse.Namespace) -> None:
    """Show the facts in an adapter's metadata, after writing and removing those that were named.

    Raises:
        ValueError: one is out of range, or both written and removed; or the file is no adapter.
        OSError: the file cannot be written, or --out is another file that is there already.
    """
    facts = AdapterFacts(**{name: getattr(args, name) for name in OPTIONS})
    path = args.file
    if facts.stated() or args.remove:
        path = args.target or path
        check_target(path)
        if not is_same(path, args.file):
            check_is_new(path, "give another --out, or delete it")
        remove_leftovers(path.parent)
        set_adapter_facts(args.file, facts, path, args.remove)
    elif args.target is not None:
        raise ValueError(f"--out {args.target} has nothing to write; give --steps or the like")
    print("\n".join([printable(str(path.resolve())), *read_adapter_facts(path).lines()]))
