"""The figures of a study. Here: how good its variants are, and for which cost; variants of one objective share axes.

A figure is a function of the results, or None where they have no numbers for it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_moe.plotting import INK, PAPER, canvas, save_figure, styled
from dit_moe.studies.figure_styles import Style, add_labels, styles_of
from dit_moe.studies.figures_routing import draw_active_by_layer, draw_active_over_training, draw_p_over_training
from dit_moe.studies.statistics import CONFIDENCE, Spread, VariantSummary, by_objective, summaries
from dit_moe.studies.table import flops_unit

NARROWEST = 0.1  # width of an axis as a share of its middle: what costs the same stands in one place

Quantity = Callable[[VariantSummary], Spread | None]


@dataclass(frozen=True)
class Panel:
    """Axes of their own for some variants."""

    label: str
    rows: Sequence[VariantSummary]
    y: Quantity

    @property
    def inches(self) -> float:
        return min(max(1.4 + 0.2 * len(self.rows), 2.4), 3.9)


@styled
def draw_loss_vs_flops(results: Mapping[str, Any], *, dark: bool = False) -> Any:
    """Held-out loss against measured FLOPs, ± over seeds; a panel for each objective."""
    prefix, power = flops_unit(summaries(results))
    label = f"forward {prefix}FLOPs per {results['unit']}, measured"
    panels = _panels(results, results["loss"]["label"], results["loss"]["unit"], lambda row: row.loss)
    return _scatter(results, panels, lambda row: _scaled(row.flops, power), label, dark)


@styled
def draw_quality_vs_active(results: Mapping[str, Any], *, dark: bool = False) -> Any:
    """Held-out loss and the metric, of each objective, against the measured mean of active experts."""
    metric = results["metric"]
    panels = _panels(results, results["loss"]["label"], results["loss"]["unit"], lambda row: row.loss)
    if metric is not None:
        better = f"{metric['better']} is better" if metric["better"] else ""
        panels += _panels(results, metric["label"], better, lambda row: row.metric)
    panels = [each for each in panels if any(row.active and each.y(row) for row in each.rows)]
    label = "active experts per token, measured on held-out data"
    return _scatter(results, panels, lambda row: row.active, label, dark)


def _panels(results: Mapping[str, Any], name: str, remark: str, y: Quantity) -> list[Panel]:
    """A panel for each objective that has runs."""
    groups = {objective: [row for row in rows if row.runs] for objective, rows in by_objective(results).items()}
    panels = []
    for objective, rows in groups.items():
        remarks = ", ".join(filter(None, [objective * (len(groups) > 1), remark]))
        panels.append(Panel(name + f"\n({remarks})" * bool(remarks), rows, y))
    return [panel for panel in panels if panel.rows]


def _scatter(results: Mapping[str, Any], panels: Sequence[Panel], x: Quantity, label: str, dark: bool) -> Any:
    """Points with bars of one standard deviation; what has no x is a dashed line. None without a panel."""
    if not panels:
        return None
    styles = styles_of(results["variants"])
    inches = [panel.inches for panel in panels]
    figure, axes = canvas(len(panels), 1, height=sum(inches) + 0.2, sharex=True, height_ratios=inches)
    labels = []
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        axis.set_ylabel(panel.label)
        axis.margins(0.14, 0.1)
        entries = []
        for row in panel.rows:
            y, style = panel.y(row), styles[row.variant["name"]]
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
        if at_x is not None and at_y is not None and variant["router"] == "topp":
            kind = (styles[variant["name"]].colour, variant["objective"], variant["experts"], variant["target"])
            chains[kind].append((at_x.mean, at_y.mean))
    for kind, chain in chains.items():
        yield sorted(chain), kind[0]


@styled
def draw_differences(results: Mapping[str, Any], *, dark: bool = False) -> Any:
    """Paired differences of held-out losses to the baseline, in per cent of it: each seed, mean, and interval."""
    groups = {name: [row for row in rows if row.difference] for name, rows in by_objective(results).items()}
    groups = {name: rows for name, rows in groups.items() if rows}
    if not groups:
        return None
    baselines = Counter(row.baseline["label"] for rows in groups.values() for row in rows)
    usual = baselines.most_common(1)[0][0]
    styles, counts = styles_of(results["variants"]), [len(rows) for rows in groups.values()]
    inches = 1.3 + 0.35 * len(groups) + (0.25 if len(baselines) == 1 else 0.32) * sum(counts)
    figure, axes = canvas(len(groups), 1, height=inches, sharex=True, height_ratios=counts)
    for axis, (objective, rows) in zip(axes[:, 0], groups.items(), strict=True):
        axis.axvline(0, color=INK[dark], linewidth=1.0)
        for y, row in enumerate(rows):
            _difference(axis, y, row, styles[row.variant["name"]], dark)
        others = [f"\nto {each}" * (each != usual) for each in (row.baseline["label"] for row in rows)]
        axis.set_yticks(range(len(rows)), [row.label + other for row, other in zip(rows, others, strict=True)])
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.grid(visible=False, axis="y")
        axis.tick_params(axis="y", length=0)
        axis.spines["left"].set_visible(False)
        if len(groups) > 1:
            axis.set_title(f"objective: {objective}", loc="left")
    unless = " (or as named)" * (len(baselines) > 1)
    label = results["loss"]["label"]
    how = f"{label}, paired by seed:\ndifference to {usual}{unless}, %\n← better · worse →"
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
    others = {run["seed"]: run["loss"] for run in row.baseline["runs"]}
    seeds = [100 * (run["loss"] - others[run["seed"]]) / paired.baseline for run in row.runs if run["seed"] in others]
    if paired.low is not None and paired.high is not None:
        low, high = (100 * end / paired.baseline for end in (paired.low, paired.high))
        axis.plot([low, high], [y, y], color=style.colour, linewidth=2.2, solid_capstyle="butt")
        axis.plot(seeds, [y + 0.33] * len(seeds), ".", color=style.colour, markersize=5, markeredgewidth=0)
    face = style.colour if paired.excludes_zero else PAPER[dark]
    point = {"color": style.colour, "markerfacecolor": face, "markersize": style.size, "markeredgewidth": 1.2}
    axis.plot(100 * paired.relative, y, style.marker, **point)


def _scaled(spread: Spread | None, power: float) -> Spread | None:
    return spread and Spread(spread.mean / power, None if spread.std is None else spread.std / power, spread.n)


FIGURES: dict[str, Callable[..., Any]] = {  # name of the file: (results, dark=False) → figure or None
    "loss_vs_flops": draw_loss_vs_flops,
    "difference_to_baseline": draw_differences,
    "active_over_training": draw_active_over_training,
    "p_over_training": draw_p_over_training,
    "active_by_layer": draw_active_by_layer,
    "quality_vs_active": draw_quality_vs_active,
}


def save_figures(results: Mapping[str, Any], folder: Path) -> None:
    """Each as a PNG; one of an earlier state of the study that there are no numbers for is removed."""
    for name, draw in FIGURES.items():
        figure, path = draw(results), folder / f"{name}.png"
        if figure is None:
            path.unlink(missing_ok=True)
        else:
            save_figure(figure, path)
