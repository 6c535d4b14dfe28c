"""Command line of `gmflow`: demo, sample, inspect, convert, adapter, fetch."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from .adapter_command import add_adapter_command
from .demo_command import add_demo_command
from .fetch_command import add_fetch_command
from .files.atomic import check_target, remove_leftovers
from .files.checkpoint import load_checkpoint, read_metadata, save_checkpoint
from .files.errors import MOST_SAID, is_out_of_memory, printable, reason
from .files.targets import check_is_new, path_argument
from .models.devices import usable_device
from .sample_arguments import SOURCE_HELP
from .sample_command import add_sample_command
from .terminal import at_terminal

DTYPES = {"keep": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MOST_SHOWN = 20_000  # characters of one entry of a checkpoint


def inspect(args: argparse.Namespace) -> None:
    """Print config, parameters, data and training facts of a checkpoint."""
    metadata = read_metadata(args.checkpoint)
    network, _ = load_checkpoint(args.checkpoint, dtype=None)
    print(f"{printable(args.checkpoint)}: {metadata['model_class']}")
    print(f"parameters: {describe_parameters(network)}")
    print(f"config: {printable(json.dumps(metadata['config'], indent=2), MOST_SHOWN)}")
    print(f"data: {describe_data(metadata['data'])}")
    print(f"training: {printable(json.dumps(metadata['training'], indent=2), MOST_SHOWN)}")


def convert(args: argparse.Namespace) -> None:
    """Write any checkpoint that can be loaded as one file, without the trainer's state."""
    if args.out.suffix != ".safetensors":
        raise ValueError(f"{args.out} must end in .safetensors")
    if not args.force:
        check_is_new(args.out, "give another name, or --force to overwrite it")
    metadata = read_metadata(args.source)
    network, _ = load_checkpoint(args.source, dtype=DTYPES[args.dtype])
    save_checkpoint(network, args.out, facts=metadata["training"], data=metadata["data"])
    print(
        f"{printable(str(args.out.resolve()))}: {metadata['model_class']}, "
        f"parameters: {describe_parameters(network)}, {size_of(args.out)}"
    )


def describe_parameters(network: torch.nn.Module) -> str:
    """Describe the number of parameters and their types."""
    parameters = list(network.parameters())
    types = ", ".join(sorted({str(p.dtype) for p in parameters}))
    return f"{sum(p.numel() for p in parameters):,} in {types}"


def describe_data(data: dict[str, Any]) -> str:
    """Describe a checkpoint's `data` on one line that can be printed."""
    entries = [
        f"{name} {json.dumps(value, ensure_ascii=False)}"
        for name, value in data.items()
        if name != "labels"
    ]
    if labels := data.get("labels"):
        first = ", ".join(json.dumps(label, ensure_ascii=False) for label in labels[:3])
        entries.insert(0, f"{len(labels):,} labels ({first}{', ...' if len(labels) > 3 else ''})")
    return printable(", ".join(entries).replace("\n", " "), MOST_SHOWN) or "nothing recorded"


def size_of(path: Path) -> str:
    """Describe the size of a file, in MB or GB."""
    size = path.stat().st_size
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"


def main(arguments: list[str] | None = None) -> None:
    """Run the command with these arguments, by default those of the process.

    Raises:
        SystemExit: an argument or a file is wrong, or the memory is too small; the message is one
            line. Or the user stopped the command (status 130).
    """
    try:
        with at_terminal():
            args = _parser().parse_args(arguments)
            _check(args)
            if hasattr(args, "out"):
                check_target(args.out)
                remove_leftovers(args.out.parent)
            args.run(args)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(_line(str(error))) from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise SystemExit(
            _line(f"there is too little memory ({reason(error)}); give a smaller --count or model")
        ) from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _check(args: argparse.Namespace) -> None:
    """Check the arguments that several commands have.

    Raises:
        ValueError: one is out of range.
    """
    for name in ("seed", "seeds"):
        given = getattr(args, name, None) or 0
        for seed in given if isinstance(given, list) else [given]:
            if not 0 <= seed < 2**63:
                raise ValueError(f"--{name} {seed} must be between 0 and 2**63 - 1")
    if hasattr(args, "device"):
        usable_device(args.device, "--device")


def _line(message: str) -> str:
    """Return an error's message as one line that every terminal can print."""
    return printable(f"gmflow: error: {' '.join(message.splitlines())}", MOST_SAID)


def _parser() -> argparse.ArgumentParser:
    """Build the parser of all commands; each sets `run` to its function."""
    parser = argparse.ArgumentParser(prog="gmflow", description="Gaussian-mixture flow matching")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    about = "seed of all noise, from 0 to 2**63 - 1; equal modulo 2**32, equal noise (default 0)"
    common.add_argument("--seed", type=int, default=0, help=about)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    common.add_argument("--device", default=device, help="torch device")

    add_demo_command(commands, common)
    add_sample_command(commands, common)

    about = "config, parameters, data and training facts of a checkpoint"
    p = commands.add_parser("inspect", help=about)
    p.add_argument("checkpoint", help=SOURCE_HELP)
    p.set_defaults(run=inspect)

    about = "write a published model as one file, for ComfyUI's models/gmflow"
    p = commands.add_parser("convert", help=about)
    p.add_argument("source", help=SOURCE_HELP)
    p.add_argument("out", type=path_argument, help="file to write, .safetensors")
    about = "type of the weights (default keep: as they are)"
    p.add_argument("--dtype", choices=DTYPES, default="keep", help=about)
    p.add_argument("--force", action="store_true", help="overwrite OUT")
    p.set_defaults(run=convert)
    add_adapter_command(commands)
    add_fetch_command(commands)
    return parser


if __name__ == "__main__":
    main()
