"""The figures of a study. Here: how a variant looks in all of them; how good variants are, and for which cost.

A figure is a function of the results, or None where they have no numbers for it. Only variants of one objective share
axes.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np

from dit_moe.plotting import INK, LINES, MARKERS, PAPER, canvas, styled
from dit_moe.studies.results import StudyResults, VariantResults
from dit_moe.studies.statistics import CONFIDENCE, Spread, VariantSummary, by_objective, summaries
from dit_moe.studies.table import flops_unit

LEAST_DIFFERENCE = 1.0  # per cent to either side that the axis of differences has at least
NARROWEST = 0.1  # width of an axis as a share of its middle: what costs the same stands in one place

ROUTER_COLOURS = {
    None: LINES[6],
    "topk": LINES[0],
    "topp": LINES[2],
    "dtopp": LINES[1],
}  # grey, blue, green, vermillion
LINE_STYLES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.2, 1.2, 1.2)), (0, (9, 1.5, 3, 1.5)))
OTHER_COLOURS = (LINES[3], LINES[4], LINES[5], LINES[7])
FONT_SIZE = 8  # of labels, in points
LINE_SPACING = 1.25  # in font sizes


@dataclass(frozen=True)
class Style:
    """The colour tells the router; marker and line tell its variants apart."""

    colour: str
    marker: str
    size: float
    line: Any
    number: int  # among all variants


def styles_of(variants: Sequence[VariantResults]) -> dict[str, Style]:
    """By the variant's name; the same in every figure."""
    routers = dict.fromkeys(variant.router for variant in variants)
    fresh = iter(OTHER_COLOURS * len(routers))
    colours = {router: ROUTER_COLOURS.get(router) or next(fresh) for router in routers}
    numbers = {router: count() for router in routers}
    found = {}
    for number, variant in enumerate(variants):
        router = variant.router
        nth = next(numbers[router])
        marker, line = MARKERS[nth % len(MARKERS)], LINE_STYLES[nth % len(LINE_STYLES)]
        found[variant.name] = Style(colours[router], marker, 8.5 if marker in "PX*" else 6.5, line, number)
    return found


def _legible(colour: str, dark: bool) -> tuple[float, ...]:
    """The colour, mixed with the ink so that text in it can be read."""
    from matplotlib.colors import to_rgb

    return tuple(0.6 * np.array(to_rgb(colour)) + 0.4 * np.array(to_rgb(INK[dark])))


Label = tuple[float, str, Style]  # the height of what is named, in the data's units, a variant's label and its style


def add_labels(figure: Any, labels: Sequence[tuple[Any, Sequence[Label]]], dark: bool) -> None:
    """To the right of each axes a column of names, each as near to the height of what it names as there is room.

    Call it last: limits stay as they are. The layout makes room for the names when the figure is drawn.
    """
    figure.draw_without_rendering()
    for axis, entries in labels:
        axis.autoscale(False)
        entries = sorted(entries, key=lambda entry: entry[:2])
        gap = FONT_SIZE * LINE_SPACING / (axis.get_window_extent().height / axis.figure.dpi * 72)
        heights = np.array([axis.transLimits.transform((0, height))[1] for height, _, _ in entries])
        for (_, name, style), height, place in zip(entries, heights, spread_apart(heights, gap), strict=True):
            how: dict[str, Any] = {"transform": axis.transAxes, "color": style.colour, "clip_on": False}
            axis.plot([1.0, 1.035], [height, place], linewidth=0.8, **how)
            axis.plot(1.045, place, style.marker, markersize=0.75 * style.size, markeredgewidth=0, **how)
            colour = _legible(style.colour, dark)
            axis.text(
                1.065, place, name, transform=axis.transAxes, color=colour, fontsize=FONT_SIZE, va="center_baseline"
            )


def spread_apart(places: np.ndarray, gap: float) -> np.ndarray:
    """The ascending places nearest to ascending `places`, in the least squares sense, that are at least `gap` apart.

    They stay in [0, 1] if there is room.
    """
    from sklearn.isotonic import isotonic_regression

    if not len(places):
        return places
    steps = gap * np.arange(len(places))
    highest = max(1.0 - steps[-1], 0.0)
    return np.asarray(isotonic_regression(places - steps, y_min=0.0, y_max=highest)) + steps


# --------------------------------------------------------------------------------------------------- quality and cost

Quantity = Callable[[VariantSummary], Spread | None]


@dataclass(frozen=True)
class Panel:
    """Axes of their own for some variants."""

    label: str
    rows: Sequence[VariantSummary]
    y: Quantity


@styled
def draw_loss_vs_flops(results: StudyResults, *, dark: bool = False) -> Any:
    """Held-out loss against measured FLOPs, ± over seeds; a panel for each objective."""
    prefix, power = flops_unit(summaries(results))
    label = f"forward {prefix}FLOPs per {results.unit}, measured"
    panels = _panels(results, results.loss["label"], results.loss["unit"], lambda row: row.loss)
    return _scatter(results, panels, lambda row: _scaled(row.flops, power), label, dark)


@styled
def draw_quality_vs_active(results: StudyResults, *, dark: bool = False) -> Any:
    """Held-out loss and the metric, of each objective, against the measured mean of active experts."""
    metric = results.metric
    panels = _panels(results, results.loss["label"], results.loss["unit"], lambda row: row.loss)
    if metric is not None:
        better = f"{metric['better']} is better" if metric["better"] else ""
        panels += _panels(results, metric["label"], better, lambda row: row.metric)
    panels = [each for each in panels if any(row.active and each.y(row) for row in each.rows)]
    label = "active experts per token, measured on held-out data"
    return _scatter(results, panels, lambda row: row.active, label, dark)


def _panels(results: StudyResults, name: str, remark: str, y: Quantity) -> list[Panel]:
    """A panel for each objective that has runs."""
    groups = {objective: [row for row in rows if row.runs] for objective, rows in by_objective(results).items()}
    panels = []
    for objective, rows in groups.items():
        remarks = ", ".join(filter(None, [objective * (len(groups) > 1), remark]))
        panels.append(Panel(name + f"\n({remarks})" * bool(remarks), rows, y))
    return [panel for panel in panels if panel.rows]


def _scatter(results: StudyResults, panels: Sequence[Panel], x: Quantity, label: str, dark: bool) -> Any:
    """Points with bars of one standard deviation; what has no x is a dashed line. None without a panel."""
    if not panels:
        return None
    styles = styles_of(results.variants)
    inches = [min(max(1.4 + 0.2 * len(panel.rows), 2.4), 3.9) for panel in panels]
    figure, axes = canvas(len(panels), 1, height=sum(inches) + 0.2, sharex=True, height_ratios=inches)
    labels = []
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        axis.set_ylabel(panel.label)
        axis.margins(0.14, 0.1)
        entries = []
        for row in panel.rows:
            y, style = panel.y(row), styles[row.variant.name]
            if y is not None:
                _point(axis, x(row), y, style, dark)
                entries.append((y.mean, row.label, style))
        for chain, colour in _chains(panel, x, styles):
            axis.plot(*zip(*chain, strict=True), color=colour, linewidth=1.0, alpha=0.45, zorder=1)
        axis.ticklabel_format(useOffset=False)
        labels.append((axis, entries))
    axes[-1, 0].set_xlabel(label)
    low, high = axes[-1, 0].get_xlim()
    least = NARROWEST * (low + high) / 2
    if high - low < least:
        axes[-1, 0].set_xlim((low + high - least) / 2, (low + high + least) / 2)
    add_labels(figure, labels, dark)
    return figure


def _point(axis: Any, x: Spread | None, y: Spread, style: Style, dark: bool) -> None:
    if x is None:
        axis.axhline(y.mean, color=style.colour, linestyle="--", zorder=1)
        return
    how: dict[str, Any] = {"elinewidth": 1.0, "capsize": 2.0, "markersize": style.size, "markeredgewidth": 0.6}
    how |= {"color": style.colour, "markeredgecolor": PAPER[dark]}
    axis.errorbar(x.mean, y.mean, xerr=x.std, yerr=y.std, fmt=style.marker, **how)


def _chains(panel: Panel, x: Quantity, styles: Mapping[str, Style]) -> Iterator[tuple[list[tuple[float, float]], str]]:
    """The points of fixed thresholds of one kind of experts, from little to much compute, and their colour."""
    chains: dict[Any, list[tuple[float, float]]] = defaultdict(list)
    for row in panel.rows:
        at_x, at_y, variant = x(row), panel.y(row), row.variant
        if at_x is not None and at_y is not None and variant.router == "topp":
            kind = (styles[variant.name].colour, variant.objective, variant.experts, variant.target)
            chains[kind].append((at_x.mean, at_y.mean))
    for kind, chain in chains.items():
        yield sorted(chain), kind[0]


@styled
def draw_differences(results: StudyResults, *, dark: bool = False) -> Any:
    """Paired differences of held-out losses to the baseline, in per cent of it: each seed, mean, and interval."""
    groups = {name: [row for row in rows if row.difference] for name, rows in by_objective(results).items()}
    groups = {name: rows for name, rows in groups.items() if rows}
    if not groups:
        return None
    baselines = Counter(row.baseline.label for rows in groups.values() for row in rows)
    usual = baselines.most_common(1)[0][0]
    styles, counts = styles_of(results.variants), [len(rows) for rows in groups.values()]
    inches = 1.3 + 0.35 * len(groups) + (0.25 if len(baselines) == 1 else 0.32) * sum(counts)
    figure, axes = canvas(len(groups), 1, height=inches, sharex=True, height_ratios=counts)
    for axis, (objective, rows) in zip(axes[:, 0], groups.items(), strict=True):
        axis.axvline(0, color=INK[dark], linewidth=1.0)
        for y, row in enumerate(rows):
            _difference(axis, y, row, styles[row.variant.name], dark)
        others = [f"\nto {each}" * (each != usual) for each in (row.baseline.label for row in rows)]
        axis.set_yticks(range(len(rows)), [row.label + other for row, other in zip(rows, others, strict=True)])
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.grid(visible=False, axis="y")
        axis.tick_params(axis="y", length=0)
        axis.spines["left"].set_visible(False)
        if len(groups) > 1:
            axis.set_title(f"objective: {objective}", loc="left")
    low, high = axes[-1, 0].get_xlim()
    axes[-1, 0].set_xlim(min(low, -LEAST_DIFFERENCE), max(high, LEAST_DIFFERENCE))
    alone = " (1 seed)" * all(len(row.runs) == 1 for rows in groups.values() for row in rows)
    unless = " (or as named)" * (len(baselines) > 1)
    label = results.loss["label"]
    how = f"{label}{alone}, paired by seed:\ndifference to {usual}{unless}, %\n← better · worse →"
    axes[-1, 0].set_xlabel(how)
    legend = _legend(groups, dark)
    figure.legend(handles=legend, loc="outside upper center", ncols=2)
    return figure


def _legend(groups: Mapping[str, Sequence[VariantSummary]], dark: bool) -> list[Any]:
    from matplotlib.lines import Line2D

    pairs = [row.difference for rows in groups.values() for row in rows if row.difference]
    ink: dict[str, Any] = {"color": INK[dark], "linestyle": "none"}
    hollow: dict[str, Any] = {"marker": "o", "markersize": 6.5, "markerfacecolor": PAPER[dark]} | ink
    if all(pair.low is None for pair in pairs):
        return [Line2D([], [], label="one seed: no interval", **hollow)]
    alone = ", or one seed" * any(pair.low is None for pair in pairs)
    return [
        Line2D([], [], marker="o", markersize=6.5, label="mean, interval excludes 0", **ink),
        Line2D([], [], label="… includes 0" + alone, **hollow),
        Line2D([], [], marker=".", markersize=5, label="each seed", **ink),
        Line2D([], [], color=INK[dark], linewidth=2.2, label=f"{100 * CONFIDENCE:g} % interval"),
    ]


def _difference(axis: Any, y: int, row: VariantSummary, style: Style, dark: bool) -> None:
    paired = row.difference
    assert paired is not None
    others = {run.seed: run.loss for run in row.baseline.runs}
    seeds = [100 * (run.loss - others[run.seed]) / paired.baseline for run in row.runs if run.seed in others]
    if paired.low is not None and paired.high is not None:
        low, high = (100 * end / paired.baseline for end in (paired.low, paired.high))
        axis.plot([low, high], [y, y], color=style.colour, linewidth=2.2, solid_capstyle="butt")
        axis.plot(seeds, [y + 0.33] * len(seeds), ".", color=style.colour, markersize=5, markeredgewidth=0)
    face = style.colour if paired.excludes_zero else PAPER[dark]
    point = {"color": style.colour, "markerfacecolor": face, "markersize": style.size, "markeredgewidth": 1.2}
    axis.plot(100 * paired.relative, y, style.marker, **point)


def _scaled(spread: Spread | None, power: float) -> Spread | None:
    return spread and Spread(spread.mean / power, None if spread.std is None else spread.std / power, spread.n)
