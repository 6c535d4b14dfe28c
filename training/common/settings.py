"""Check the settings of commands, and parse them over a preset."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import tyro

from gmflow_core.files.errors import quoted
from gmflow_core.models.settings import MOST

SMALLEST_SIGMA = 1e-4  # training and its evaluation draw sigma from [SMALLEST_SIGMA, 1]
# largest whole numbers of settings; of all others MOST
LARGEST = {
    "seed": 2**63 - 1,
    "workers": 1024,
    "copies": 10**6,
    "steps": 10**6,
    "substeps": 10**6,
    "size": 2**14,
    "image_size": 2**14,
    "encoder_size": 2**14,
}
ENDLESS = ("clip",)  # settings that may be infinite, for none


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


def require_ranges(config: Any) -> None:
    """Check that the numbers in a dataclass of settings are finite, and not larger than any use.

    Raises:
        ValueError: one is not.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int):
                most = LARGEST.get(field.name, MOST)
                require(abs(number) <= most, field.name, quoted(number, 60), f"at most {most:,}")
            elif isinstance(number, float) and field.name not in ENDLESS:
                require(math.isfinite(number), field.name, number, "finite")


def require_unused(config: Any, defaults: Any, names: Iterable[str], when: str) -> None:
    """Check that settings without an effect are left at their defaults.

    Args:
        config: the settings.
        defaults: those of the preset.
        names: fields that have no effect.
        when: in which case, such as "with --data".

    Raises:
        ValueError: one of them was given another value.
    """
    for name in names:
        default = getattr(defaults, name)
        if getattr(config, name) != default:
            option = f"--{'no-' if default is True else ''}{name.replace('_', '-')}"
            raise ValueError(f"{option} has no effect {when}; leave it out")


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
