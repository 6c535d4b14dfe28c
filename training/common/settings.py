"""Check the settings of commands, and parse them over a preset."""

from __future__ import annotations

import argparse
from typing import Any

import tyro

SMALLEST_SIGMA = 1e-4  # training and its evaluation draw sigma from [SMALLEST_SIGMA, 1]


def require(condition: bool, name: str, value: object, expected: str) -> None:
    """Check one setting of a command.

    Args:
        condition: whether the value is valid.
        name: field of the settings, such as batch_size.
        value: the value found.
        expected: end of the sentence "it must be ...".

    Raises:
        ValueError: the condition is false.
    """
    if not condition:
        raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be {expected}")


def require_device(device: str) -> None:
    """Check the --device of a command: auto (the device that accelerate finds) or cpu.

    Raises:
        ValueError: it is something else.
    """
    known = device in ("auto", "cpu")
    require(known, "device", device, "auto or cpu (choose a GPU with CUDA_VISIBLE_DEVICES)")


def parse_preset(
    presets: dict[str, Any], module: str, description: str, arguments: list[str]
) -> Any:
    """Parse arguments into settings whose defaults are those of the preset that they name.

    Args:
        presets: settings by name; without --preset the first one is taken.
        module: as in python -m MODULE.
        description: start of the help text.

    Raises:
        SystemExit: an argument is unknown or invalid, or asks for the help text.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--preset")
    first = next(iter(presets.values()))
    preset = presets.get(finder.parse_known_args(arguments)[0].preset, first)
    return tyro.cli(
        type(first),
        default=preset,
        args=arguments,
        prog=f"python -m {module}",
        description=description,
    )
