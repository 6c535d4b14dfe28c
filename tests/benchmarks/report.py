"""Present results as text, as a markdown table, and as plots."""

from __future__ import annotations

from pathlib import Path

from .measure import quartiles

OURS = "ours"


def duration(seconds: float) -> str:
    """Format seconds with three digits, as s, ms or µs."""
    size, unit = next(
        (each for each in ((1, "s"), (1e-3, "ms")) if seconds >= each[0]), (1e-6, "µs")
    )
    return f"{seconds / size:#.3g}".rstrip(".") + f" {unit}"


def ratio(about: dict, name: str) -> str:
    """Format a ratio as "median (lower quartile to upper quartile)"; empty if there is none."""
    if name not in about:
        return ""
    low, middle, high = (f"{value:.3g}" for value in about[name])
    return f"{middle} ({low} to {high})"


def memory(about: dict, unit: str) -> str:
    """Format the extra memory; empty if it was not measured."""
    return f"{about['memory']:.2f} {unit}" if "memory" in about else ""


def error(about: dict) -> str:
    """Format the error with one digit; empty if it was not measured."""
    return f"{about['error']:.0e}" if "error" in about else ""


def grid(rows: list[list[str]]) -> list[str]:
    """Align the columns of rows of text."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def lines_of(results: dict) -> list[dict]:
    """Return all lines of the results but the curves."""
    return [line for line in results["rows"] if "axis" not in line]


def title(line: dict) -> str:
    """Return a line's row, case and device in words."""
    return f"{line['row']}: {line['case']}" + (" [GPU]" if line["device"] == "cuda" else "")


def text(line: dict) -> str:
    """Format one line of the results as text, a row for every form.

    Columns: time; ratio to the reference, to ours and to the floor; extra memory; error.
    """
    least = line.get("floor")
    heading = title(line)
    if least and least["seconds"]:
        heading += f"; floor {duration(least['seconds'])} ({least['bound']})"
    against = line.get("reference", "naive")
    rows = [
        [
            "form",
            "time",
            f"{against} / it",
            "it / ours",
            "it / floor",
            "extra memory",
            "float32 error",
        ]
    ]
    notes = []
    for name, about in line["forms"].items():
        if "not_run" in about:
            notes.append(f"  {name}: {about['not_run']}")
            continue
        of_floor = f"{about['median'] / least['seconds']:.3g}" if least and least["seconds"] else ""
        compared = [
            ratio(about, "ratio"),
            "" if name == OURS else ratio(about, "over_ours"),
            of_floor,
        ]
        rows.append(
            [
                name,
                duration(about["median"]),
                *compared,
                memory(about, line.get("unit", "")),
                error(about),
            ]
        )
    return "\n".join([heading, *(f"  {row}" for row in grid(rows) if len(rows) > 1), *notes])


def markdown(results: dict) -> str:
    """Format a compact table to quote, below the machine and the date.

    It compares ours with the reference, and lists the times of the other forms.
    """
    rows = [
        [
            "",
            "naive",
            "ours",
            "naive / ours",
            "floor",
            "extra memory",
            "float32 error",
            "others: time (it / ours)",
        ]
    ]
    for line in lines_of(results):
        forms, least = line["forms"], line.get("floor")
        ours, straight = forms[OURS], forms.get(line.get("reference", ""), {})
        if "not_run" in ours:
            rows.append([title(line), "", ours["not_run"], "", "", "", "", ""])
            continue
        others = [
            f"{name.removeprefix('ours, ')} {duration(about['median'])} "
            f"({about['over_ours'][1]:.2g})"
            for name, about in forms.items()
            if name not in (OURS, line["reference"]) and "median" in about
        ]
        held = [f"{about['memory']:.2f}" for about in (straight, ours) if "memory" in about]
        before = duration(straight["median"]) + (
            f" ({line['reference']})" if line["reference"] != "naive" else ""
        )
        rows.append(
            [
                title(line),
                before,
                duration(ours["median"]),
                ratio(ours, "ratio"),
                duration(least["seconds"]) if least and least["seconds"] else "",
                f"{' → '.join(held)} {line['unit']}" if held else "",
                " → ".join(filter(None, (error(straight), error(ours)))),
                ", ".join(others),
            ]
        )
    rows.insert(1, ["---"] * len(rows[0]))
    return f"{caption(results)}\n\n" + "\n".join("| " + " | ".join(row) + " |" for row in rows)


# Plots


def plots(results: dict, folder: Path) -> list[Path]:
    """Draw benchmarks.png if there are lines and benchmarks_growth.png if there are curves.

    Returns:
        The files that were written.
    """
    import matplotlib

    matplotlib.use("Agg")
    written = []
    if any("median" in line["forms"][OURS] for line in lines_of(results)):
        written.append(plot_rows(results, folder / "benchmarks.png"))
    if any("axis" in line for line in results["rows"]):
        written.append(plot_growth(results, folder / "benchmarks_growth.png"))
    return written


SIGNS = {  # a form's marker and colour; other forms take one of FURTHER
    "naive": ("s", "tab:red"),
    OURS: ("o", "tab:blue"),
    "floor": ("|", "black"),
    "ours, plain": ("v", "tab:cyan"),
    "ours, tiled": ("^", "tab:green"),
    "ours, compiled": ("<", "tab:purple"),
    "ours, triton": (">", "tab:olive"),
}
FURTHER = tuple(
    zip(
        "DPXd*hp8",
        ("tab:orange", "tab:brown", "tab:pink", "tab:gray", "gold", "navy", "darkgreen", "orchid"),
        strict=True,
    )
)


def caption(results: dict) -> str:
    """Return the machines in words."""
    return "; ".join(
        f"{about['device']}, threads: {about['threads']}, torch {about['torch']}, {about['date']}"
        for about in results["machines"].values()
    )


def plot_rows(results: dict, path: Path) -> Path:
    """Draw every form's time, and the ratio of the naive form to ours."""
    import matplotlib.pyplot as plt

    lines = [line for line in lines_of(results) if "median" in line["forms"][OURS]]
    figure, (left, right) = plt.subplots(
        1,
        2,
        figsize=(14, 1.8 + 0.4 * len(lines)),
        sharey=True,
        layout="constrained",
        width_ratios=(3, 2),
    )
    signs, shown = dict(SIGNS), set()
    for y, line in enumerate(lines):
        values = {
            name: about["median"] for name, about in line["forms"].items() if "median" in about
        }
        if line.get("floor", {}).get("seconds"):
            values["floor"] = line["floor"]["seconds"]
        for name, value in values.items():
            marker, colour = signs.setdefault(
                name, FURTHER[(len(signs) - len(SIGNS)) % len(FURTHER)]
            )
            style = (
                {"markersize": 9, "markeredgewidth": 2}
                if name == "floor"
                else {"markersize": 8 if name == OURS else 6}
            )
            label = None if name in shown else name
            left.plot(
                1e3 * value,
                y,
                marker,
                color=colour,
                label=label,
                zorder=3 if name == OURS else 2,
                **style,
            )
            shown.add(name)
        low, middle, high = line["forms"][OURS]["ratio"]
        right.barh(y, middle, color="tab:blue", height=0.55)
        right.errorbar(middle, y, xerr=[[middle - low], [high - middle]], color="black", capsize=3)
        right.annotate(
            f"{middle:.3g}",
            (high, y),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    left.set_yticks(range(len(lines)), [title(line) for line in lines], fontsize=8)
    left.set_ylim(len(lines) - 0.4, -0.6)
    left.set_xscale("log")
    left.set_xlabel("milliseconds")
    left.grid(axis="x", alpha=0.3)
    right.axvline(1, color="black", linewidth=0.8)
    right.set_xscale("log")
    right.margins(x=0.15)
    right.set_xlabel("naive (or what stands for it) / ours; median and quartiles", fontsize=9)
    right.xaxis.set_major_formatter("{x:g}")
    about = {"title": caption(results), "title_fontsize": 8, "fontsize": 8}
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=8, **about)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def plot_growth(results: dict, path: Path) -> Path:
    """Draw a rollout's time against K, pixels, substeps and batch, a row of panels a device."""
    import matplotlib.pyplot as plt

    curves = [line for line in results["rows"] if "axis" in line]
    devices, axes = (
        list(dict.fromkeys(curve[key] for curve in curves)) for key in ("device", "axis")
    )
    figure, panels = plt.subplots(
        len(devices),
        len(axes),
        figsize=(3.6 * len(axes), 3.8 * len(devices) + 0.4),
        squeeze=False,
        layout="constrained",
    )
    labels = {"components": "K", "channels": "C"}
    for curve in curves:
        panel = panels[devices.index(curve["device"])][axes.index(curve["axis"])]
        points = curve["points"]
        values = [point["value"] for point in points]
        for name in sorted(points[0]["seconds"], key=lambda name: name == OURS):
            low, middle, high = zip(
                *(quartiles(point["seconds"][name]) for point in points), strict=True
            )
            marker, colour = SIGNS[name]
            style = {"linewidth": 2.5} if name == OURS else {"linewidth": 1}
            panel.plot(
                values,
                [1e3 * each for each in middle],
                marker + "-",
                color=colour,
                markersize=4,
                label=name,
                **style,
            )
            panel.fill_between(
                values,
                [1e3 * each for each in low],
                [1e3 * each for each in high],
                color=colour,
                alpha=0.2,
            )
        panel.plot(
            values, [1e3 * point["floor"] for point in points], "--", color="black", label="floor"
        )
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(values, map(str, values), fontsize=8)
        panel.set_xlabel(labels.get(curve["axis"], curve["axis"]))
        fixed = [
            f"{labels.get(key, key)} {value}"
            for key, value in curve["base"].items()
            if key != curve["axis"]
        ]
        panel.set_title(", ".join(fixed), fontsize=8)
        panel.grid(alpha=0.3)
    for row, device in enumerate(devices):
        panels[row][0].set_ylabel(f"milliseconds, {device.upper()}")
    legend = {
        name: handle
        for panel in panels.flat
        for handle, name in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        legend.values(), legend.keys(), loc="outside lower center", ncols=len(legend), fontsize=8
    )
    figure.suptitle(caption(results), fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
