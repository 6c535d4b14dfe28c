"""Set up and finish matplotlib figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training.common.files import whole_file


def figure(rows: int, columns: int, width: float, height: float, **shared: Any):
    """A matplotlib figure of panels of width x height inches, drawn without a screen, and its axes (rows, columns)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(
        (2.4 + columns * width, max(2.6, 0.4 + rows * height)), dpi=120, layout="constrained"
    )
    FigureCanvasAgg(drawing)
    axes = drawing.subplots(rows, columns, squeeze=False, **shared)
    for ax in axes.flat:
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    return drawing, axes


def finish(drawing, axes, path: Path) -> Path:
    """Put one legend beside the panels, and save."""
    entries = {
        label: handle
        for ax in axes.flat
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    drawing.legend(
        entries.values(), entries.keys(), loc="outside right upper", fontsize=8, frameon=False
    )
    with whole_file(path) as temporary:
        drawing.savefig(temporary, format="png")
    return path
