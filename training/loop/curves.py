"""Write TensorBoard's logs, and wandb's where asked for: curves and pictures of a run."""

from __future__ import annotations

import math
import os
import socket
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard import summary
from tqdm import tqdm

from gmflow_core.files.errors import printable, reason
from training.loop.wandb_run import WandbRun

MEDIAN = "median_loss"  # among the means of losses


class Curves:
    """Log of one start of a run.

    PyTorch's SummaryWriter writes in a thread, whose errors reach nobody but the screen. Here they
    are told in a line, once, and the run goes on without the log: what matters is its checkpoint.

    Args:
        folder: where the log is written, a new file for each start.
        step: first iteration of this start; TensorBoard drops what earlier ones logged from there.
        run: gets all that is logged too; None for no other.
    """

    def __init__(self, folder: Path, step: int, run: WandbRun | None = None):
        self.folder, self.run, self._records = folder, run, None
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._records = RecordWriter(open(folder / name, "ab"))  # noqa: SIM115 closed in close
        except OSError as error:
            self._stop(error)
        self._write(Event(step=step, file_version="brain.Event:2"))
        self._write(Event(step=step, session_log=SessionLog(status=SessionLog.START)))

    def numbers(self, values: dict[str, float], step: int) -> None:
        """Add a point to each curve."""
        for name, value in values.items():
            self._write(Event(step=step, summary=summary.scalar(name, value)))
        self.flush()
        if self.run is not None:
            self.run.numbers(values, step)

    def picture(self, name: str, picture: Tensor, step: int) -> None:
        """Add a picture (H, W, 3) in [0, 1]."""
        self._write(Event(step=step, summary=summary.image(name, picture, dataformats="HWC")))
        self.flush()
        if self.run is not None:
            self.run.picture(name, picture, step)

    def flush(self) -> None:
        """Hand what was added to the system."""
        try:
            if self._records is not None:
                self._records.flush()
        except OSError as error:
            self._stop(error)

    def close(self) -> None:
        """Close the file, and the run."""
        if self.run is not None:
            self.run.close()
        records, self._records = self._records, None
        try:
            if records is not None:
                records.close()
        except OSError as error:
            self._stop(error)

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        try:
            if self._records is not None:
                self._records.write(event.SerializeToString())
        except OSError as error:
            self._stop(error)

    def _stop(self, error: OSError) -> None:
        """Say that the log ends here; nothing is written from now on."""
        self._records = None
        tqdm.write(
            f"note: the curves in {printable(str(self.folder))} end here ({reason(error)}); "
            "training goes on without them",
            file=sys.stderr,
        )


def mean_losses(accelerator: Accelerator, losses: list[dict[str, Tensor]]) -> dict[str, float]:
    """Average each loss over iterations and processes; MEDIAN is the first one's median.

    Iterations with a loss that is not finite are left out; if none is left, the mean is NaN.
    """
    table = torch.stack(
        [torch.stack([v.detach().float() for v in entry.values()]) for entry in losses]
    )
    table = accelerator.reduce(table, "mean")
    table = table[table.isfinite().all(1)]
    means = dict(zip(losses[0], table.mean(0).tolist(), strict=True))
    return {**means, MEDIAN: table[:, 0].quantile(0.5).item() if len(table) else math.nan}
