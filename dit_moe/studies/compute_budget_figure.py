"""Quality against measured compute of checkpoints at several compute budgets: a figure and a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dit_moe.formatting import markdown_table
from dit_moe.plotting import INK, LINES, MARKERS, PAPER, canvas, labels_above, styled
from dit_moe.studies.table import si_prefix

MEASURES = {  # name: what it is called, what its FLOPs are of; all are the better the lower
    "loss": ("held-out loss", "FLOPs per image and network evaluation"),
    "distance": ("Fréchet distance", "FLOPs per image sampled"),
    "bits": ("held-out bits per byte", "FLOPs per token"),
}
ROUTERS = {"dtopp": "DTop-p", "topp": "top-p", "topk": "top-k"}

Entry = Mapping[str, Any]  # name, router and points of a run; a point has a target, None as trained, and its measures


def _measures(runs: Sequence[Entry]) -> list[str]:
    return [name for name in MEASURES if any(name in point["measures"] for run in runs for point in run["points"])]


def _labels(runs: Sequence[Entry]) -> list[str]:
    """What tells the runs apart: the router if that does, or the name."""
    routers = [run["router"] for run in runs]
    names = [run["name"] for run in runs]
    if len(set(routers)) == len(runs) > 1:
        return [ROUTERS.get(router, router) for router in routers]
    return names if len(set(names)) == len(runs) else [f"{name} ({i})" for i, name in enumerate(names, start=1)]


@styled
def draw_compute_budget(runs: Sequence[Entry], *, dark: bool = False) -> Any:
    """A panel for each quality, a line for each run, the point as trained ringed; beside points, active experts."""
    from matplotlib.lines import Line2D

    names = _measures(runs)
    figure, axes = canvas(len(names), height=0.35 + 2.75 * len(names))
    for name, axis in zip(names, axes[:, 0], strict=True):
        label, of = MEASURES[name]
        largest = max(measure["flops"] for run in runs for _, measure in _points(run, name))
        prefix, scale = si_prefix(largest)
        floors = set()
        for number, run in enumerate(runs):
            points = list(_points(run, name))
            colour, x = LINES[number % len(LINES)], [measure["flops"] / scale for _, measure in points]
            y = [measure["value"] for _, measure in points]
            error = [measure.get("std") or 0 for _, measure in points]
            how = {"color": colour, "marker": MARKERS[number % len(MARKERS)], "label": _labels(runs)[number]}
            axis.errorbar(x, y, yerr=error if any(error) else None, capsize=2, **how)
            for (target, measure), at_x, at_y in zip(points, x, y, strict=True):
                if target is None:
                    axis.plot(at_x, at_y, "o", ms=11, mfc="none", mec=INK[dark], mew=1.2, zorder=5)
                crowded = target is None and any(
                    abs(at_x - other) < 0.05 * (max(x) - min(x)) for other in x if other != at_x
                )
                if len(runs) <= 2 and not crowded:
                    _annotate(axis, f"{measure['active']:.2f}", at_x, at_y, above=number == 0, dark=dark)
            floors |= {measure.get("floor") for _, measure in points} - {None}
        for floor in floors:
            axis.axhline(floor, color=INK[dark], lw=1, ls=":", zorder=1)
            axis.annotate(
                "real images", (0.99, floor), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8
            )
        axis.set_xlabel(f"{prefix}{of}" if prefix else of)
        axis.set_ylabel(f"{label} (lower is better)" if len(label) < 18 else label)
        axis.margins(x=0.08, y=0.18)
    ring = Line2D([], [], ls="", marker="o", ms=9, mfc="none", mec=INK[dark], mew=1.2, label="as trained")
    labels_above(axes[0, 0], columns=3, handles=[*axes[0, 0].get_legend_handles_labels()[0], ring])
    return figure


def _annotate(axis: Any, text: str, x: float, y: float, *, above: bool, dark: bool) -> None:
    how: dict[str, Any] = {"fontsize": 7.5, "color": INK[dark], "ha": "center", "textcoords": "offset points"}
    box = {"facecolor": PAPER[dark], "edgecolor": "none", "pad": 0.6, "alpha": 0.75}
    axis.annotate(text, (x, y), xytext=(0, 9 if above else -9), va="bottom" if above else "top", bbox=box, **how)


def _points(run: Entry, name: str) -> Iterator[tuple[float, Mapping[str, Any]]]:
    """In the order of their FLOPs."""
    found = [(point["target"], point["measures"][name]) for point in run["points"] if name in point["measures"]]
    yield from sorted(found, key=lambda each: each[1]["flops"])


def to_markdown(runs: Sequence[Entry]) -> str:
    """The points of all runs as a table, in the order of their FLOPs; as trained in bold."""
    names, labels = _measures(runs), _labels(runs)
    titles = ["run", "target"]
    for name in names:
        label, of = MEASURES[name]
        titles += [label, "active experts", of]
    rows: list[list[str]] = []
    for run, label in zip(runs, labels, strict=True):
        for point in sorted(run["points"], key=lambda point: next(iter(point["measures"].values()))["flops"]):
            row = [label, "**as trained**" if point["target"] is None else f"{point['target']:.4g}"]
            for name in names:
                row += _cells(point["measures"].get(name))
            rows.append(row)
    return markdown_table(zip(titles, zip(*rows, strict=True), strict=True))


def _cells(measure: Mapping[str, Any] | None) -> list[str]:
    if measure is None:
        return ["", "", ""]
    value = f"{measure['value']:.4g}"
    if measure.get("std") is not None:
        value += f" ± {measure['std']:.2g}"
    prefix, scale = si_prefix(measure["flops"])
    return [value, f"{measure['active']:.3f}", f"{measure['flops'] / scale:.4g} {prefix}".strip()]
