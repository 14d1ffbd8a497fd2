"""How many experts the variants of a study use, over training and by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dit_moe.plotting import DIVERGING, GRID, INK, canvas, labels_above, styled
from dit_moe.studies.figures import FONT_SIZE, LINE_SPACING, Label, Style, add_labels, styles_of
from dit_moe.studies.results import WINDOW, StudyResults
from dit_moe.studies.statistics import VariantSummary, summaries

MOVING = 0.1  # of all steps
STRIP = 0.42  # inches
NEAR = 0.01  # of its target, as a controlled router is wanted to be
GOLDEN = 0.618  # multiples of it spread evenly over [0, 1) modulo 1
LEAST = 4  # halvings of the target, below which a layer's colour is the same
NUMBERED = 10  # layers whose numbers fit beside each other


@styled
def draw_active_over_training(results: StudyResults, *, dark: bool = False) -> Any:
    """Active experts over training, ± over steps and seeds; below, how far each seed of a controlled router is off."""
    from matplotlib.lines import Line2D

    rows = [row for row in summaries(results) if any(run.curves["active"] for run in row.runs)]
    if not rows:
        return None
    controlled = [row for row in rows if row.variant.controlled]
    styles = styles_of(results.variants)
    heights = [max(3.2, FONT_SIZE * LINE_SPACING * len(rows) / 72 + 0.4), *[STRIP] * len(controlled)]
    extra = 0.85 if controlled else 0.6  # for what is written above and below
    figure, axes = canvas(len(heights), 1, height=sum(heights) + extra, sharex=True, height_ratios=heights)
    upper, *strips = axes[:, 0]
    ends = _bands(upper, rows, "active", styles)
    for target in {row.target for row in rows}:
        upper.axhline(target, color=INK[dark], linestyle=":", linewidth=1.4, zorder=4)
    labels_above(upper, handles=[Line2D([], [], color=INK[dark], linestyle=":", linewidth=1.4, label="target T")])
    upper.set_ylim(bottom=0)
    over = "seeds and steps" if any(len(row.runs) > 1 for row in rows) else "steps, 1 seed"
    upper.set_ylabel(f"active experts per token\n(± σ over {over})")
    upper.xaxis.get_major_locator().set_params(integer=True)
    axes[-1, 0].set_xlabel("optimizer steps")
    named = [(upper, ends)]
    if controlled:
        _off_target(strips, controlled, styles, dark)
        zeros = [(0.0, row.label_of_all, styles[row.variant.name]) for row in controlled]
        named += [(strip, [zero]) for strip, zero in zip(strips, zeros, strict=True)]
    add_labels(figure, named, dark)
    return figure


@styled
def draw_p_over_training(results: StudyResults, *, dark: bool = False) -> Any:
    """Thresholds over training, the mean over layers, ± over seeds."""
    rows = [row for row in summaries(results) if any(run.curves["p"] for run in row.runs)]
    if not rows:
        return None
    figure, axes = canvas(height=max(3.0, FONT_SIZE * LINE_SPACING * len(rows) / 72 + 0.8))
    axis = axes[0, 0]
    ends = _bands(axis, rows, "p", styles_of(results.variants))
    axis.set_xlabel("optimizer steps")
    axis.set_ylabel("threshold p (mean over layers)")
    add_labels(figure, [(axis, ends)], dark)
    return figure


def _bands(axis: Any, rows: Sequence[VariantSummary], name: str, styles: dict[str, Style]) -> list[Label]:
    """Mean over seeds and its band; returns where the curves end.

    A curve has a few of its markers, at other steps than those of the variants before and after it.
    """
    ends = []
    for row in rows:
        steps, mean, std = _spread(row, name)
        style = styles[row.variant.name]
        axis.fill_between(steps, mean - std, mean + std, color=style.colour, alpha=0.2, linewidth=0)
        apart = max(len(steps) // 5, 1)
        marks = {"markevery": (int(style.number * GOLDEN % 1 * apart), apart), "markersize": 0.75 * style.size}
        how = {"color": style.colour, "linestyle": style.line, "marker": style.marker, "markeredgewidth": 0}
        axis.plot(steps, mean, **how, **marks)
        axis.margins(x=0)
        ends.append((float(mean[-1]), row.label_of_all, style))
    return ends


def _off_target(strips: Sequence[Any], rows: Sequence[VariantSummary], styles: dict[str, Style], dark: bool) -> None:
    """A strip for each variant: the moving mean of every seed, in per cent off the target.

    The limits are those of what follows the first tenth: how far a router starts off, the axes above show.
    """
    furthest = 200 * NEAR
    for strip, row in zip(strips, rows, strict=True):
        steps, active_SX = _curves(row, "active")
        off_SX = 100 * (_moving_mean(active_SX, MOVING) / row.target - 1)
        furthest = max(furthest, 1.1 * float(np.abs(off_SX[:, len(steps) // 10 :]).max()))
        strip.axhspan(-100 * NEAR, 100 * NEAR, color=GRID[dark], alpha=0.7, linewidth=0, zorder=0)
        strip.axhline(0, color=INK[dark], linestyle=":", linewidth=1.0, zorder=1)
        strip.plot(steps, off_SX.T, color=styles[row.variant.name].colour, linewidth=1.0)
    tick = 100 * NEAR if furthest < 300 * NEAR else float(f"{furthest / 2:.1g}")
    for strip in strips:
        strip.margins(x=0)
        strip.set_ylim(-furthest, furthest)
        strip.set_yticks([-tick, tick], [f"−{tick:g}", f"+{tick:g}"])
    seeds = ", each seed" * any(len(row.runs) > 1 for row in rows)
    how = f"off target, % (moving mean{seeds}; shaded: ± {100 * NEAR:g} %)"
    strips[0].set_title(how, loc="left", fontsize=FONT_SIZE, pad=4)


def _moving_mean(values_SX: np.ndarray, share: float) -> np.ndarray:
    """Over a share of all steps around each; fewer at the ends."""
    kernel = np.ones(max(round(share * values_SX.shape[1]), 1))
    counts = np.convolve(np.ones(values_SX.shape[1]), kernel, "same")
    return np.array([np.convolve(values, kernel, "same") / counts for values in values_SX])


def _curves(row: VariantSummary, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and the values of every seed there."""
    curves = [run.curves for run in row.runs if run.curves[name]]
    steps = np.array(max((curve["step"] for curve in curves), key=len), float)
    return steps, np.array([np.interp(steps, curve["step"], curve[name]) for curve in curves])


def _spread(row: VariantSummary, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps, mean over seeds, and standard deviation over seeds and, where it is known, over the steps around.

    The two are added by the law of total variance: seeds differ in their means over the same steps.
    """
    steps, values_SX = _curves(row, name)
    within = [run.curves for run in row.runs if run.curves.get(f"{name}_std")]
    variance = np.zeros(len(steps))
    if len(values_SX) > 1:
        variance += _moving_mean(values_SX, WINDOW if within else 0.0).var(axis=0, ddof=1)
    if within:
        stds = [np.interp(steps, curve["step"], curve[f"{name}_std"]) for curve in within]
        variance += np.mean(np.square(stds), axis=0)
    return steps, values_SX.mean(axis=0), np.sqrt(variance)


@styled
def draw_active_by_layer(results: StudyResults, *, dark: bool = False) -> Any:
    """Active experts of every MoE layer, held-out, mean over seeds; colours say how far from the target."""
    rows = [row for row in summaries(results) if any(run.active_layers for run in row.runs)]
    if not rows:
        return None
    means = [np.mean([run.active_layers for run in row.runs if run.active_layers], axis=0) for row in rows]
    layers = max(map(len, means))
    ratio_RL = np.full((len(rows), layers), np.nan)
    for i, (row, mean) in enumerate(zip(rows, means, strict=True)):
        ratio_RL[i, : len(mean)] = np.log2(np.maximum(mean / row.target, 2.0**-LEAST))
    most = min(max(float(np.nanmax(np.abs(ratio_RL))), 1.0), 2.0)
    figure, axes = canvas(height=max(2.2, 1.0 + 0.25 * len(rows)))
    axis = axes[0, 0]
    image = axis.imshow(ratio_RL, aspect="auto", cmap=DIVERGING, vmin=-most, vmax=most)
    if layers <= NUMBERED:
        for i, mean in enumerate(means):
            for j, value in enumerate(mean):
                ink = INK[abs(ratio_RL[i, j]) > 0.6 * most]  # light letters on the colours' dark ends
                axis.text(j, i, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=FONT_SIZE)
    axis.set_yticks(range(len(rows)), [row.label_of_all for row in rows])
    axis.set_xticks(range(0, layers, -(-layers // NUMBERED)))
    axis.set_xlabel("MoE layer, from the input on" + ("; numbers: active experts per token" * (layers <= NUMBERED)))
    axis.grid(visible=False)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    ticks = [tick for tick in (0.25, 0.5, 0.75, 1, 1.5, 2, 4) if abs(np.log2(tick)) <= most]
    bar = figure.colorbar(image, ax=axis, ticks=np.log2(ticks), pad=0.02, aspect=25)
    bar.ax.set_yticklabels([f"{tick:g}×" for tick in ticks])
    bar.set_label("active experts / target", labelpad=6)
    bar.outline.set_visible(False)
    return figure
