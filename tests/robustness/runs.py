"""Arguments and dispatch of the parts that run commands: kills, disks, double starts, a server."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of these parts to a parser."""
    add = parser.add_argument
    add("--kills", type=int, metavar="N", help="kill commands and savers N times")
    add("--disk-full", action="store_true", help="run them on disks that are too small")
    add("--read-only", action="store_true", help="run them on read-only disks")
    add("--two-starts", action="store_true", help="start each command twice at once")
    add("--soak", type=float, metavar="SECONDS", help="run mixed prompts on a ComfyUI server")
    add("--prompts", type=int, metavar="N", help="send N hostile prompts to a ComfyUI server")
    add("--comfyui", action="store_true", help="in a real ComfyUI (always so for --soak)")
    add("--jobs", nargs="+", metavar="JOB", help="only these commands")
    add("--no-mount", action="store_true", help="limit file sizes instead of mounting disks")


def run(arguments: argparse.Namespace) -> int:
    """Run the parts that were asked for, and return the exit status."""
    from . import full_disk, kills, two_starts

    status = 0
    if arguments.kills:
        status |= kills.run(arguments)
    if arguments.disk_full or arguments.read_only:
        status |= full_disk.run(arguments)
    if arguments.two_starts:
        status |= two_starts.run(arguments)
    if arguments.soak:
        from . import soak

        status |= soak.run(arguments)
    if arguments.prompts:
        from . import prompts

        status |= prompts.run(arguments)
    return status
