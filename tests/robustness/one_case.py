"""Run one case again, and print how it ends."""

from __future__ import annotations

import argparse
import traceback

from .cases import Cases
from .doors.door import Door


def one_case(door: Door, chosen: argparse.Namespace, number: int) -> int:
    """Run one case of a door, print how it ends with the traceback of an error, return 1 if bad."""

    def use(*given):
        try:
            return door.use(*given)
        except BaseException:
            traceback.print_exc()
            raise

    with Cases([door._replace(use=use)], chosen.seed) as work:
        folder = work.place / "sound0"
        folder.mkdir()
        door.make(folder)
        case = work.run(door.name, number, chosen.keep, show=True)
    print(f"{case.change}\n{case.outcome.verdict}: {case.outcome.message}")
    print(f"{case.outcome.seconds:.1f} s, {case.outcome.megabytes:.0f} MB")
    return int(not case.good)
