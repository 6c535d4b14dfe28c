"""Set up and finish matplotlib figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gmflow_core.files.atomic import atomic_write


def figure(rows: int, columns: int, width: float, height: float, **shared: Any):
    """Create a matplotlib figure that needs no screen.

    Args:
        width, height: of each panel, in inches.
        shared: further arguments of `Figure.subplots`.

    Returns:
        The figure, and its axes as an array (rows, columns).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = (2.4 + columns * width, max(2.6, 0.4 + rows * height))
    drawing = Figure(size, dpi=120, layout="constrained")
    FigureCanvasAgg(drawing)
    axes = drawing.subplots(rows, columns, squeeze=False, **shared)
    for ax in axes.flat:
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    return drawing, axes


def finish(drawing, axes, path: Path) -> Path:
    """Put one legend beside the panels, save the figure as PNG, and return its path."""
    entries = {
        label: handle
        for ax in axes.flat
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    drawing.legend(
        entries.values(), entries.keys(), loc="outside right upper", fontsize=8, frameon=False
    )
    with atomic_write(path) as temporary:
        drawing.savefig(temporary, format="png")
    return path
