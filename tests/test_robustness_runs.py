"""A seeded part of `python -m tests.robustness`: kills, two starts, files that cannot grow."""

import json
import os

import pytest

from tests import forked

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")

LINES = (
    "--kills 3 --jobs checkerboard",
    "--two-starts --disk-full --no-mount --jobs prepare",
)
RUN = "import sys; from tests.robustness.__main__ import main; sys.exit(max(map(main, {lines})))"


def test_nothing_is_lost(tmp_path):
    lines = [[*line.split(), "--out", str(tmp_path)] for line in LINES]
    done = forked.run("-c", RUN.format(lines=lines), imports=forked.LIBRARY)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    kills, starts, disks = (
        json.loads((tmp_path / f"robustness_{part}.json").read_text())["rows"][0]
        for part in ("kills", "two_starts", "disk_full")
    )
    assert kills["kills"] == 3
    assert kills["left after the next start"] == kills["broken final files"] == 0
    assert starts["refused"] + starts["one after the other"] == starts["trials"]
    assert starts["same result"] == starts["trials"]
    assert disks["clear"] >= 3
    assert disks["another result"] == disks["unclear"] == 0
