"""Pictures of which experts are used: their load, which share a token, and what they specialise in."""

# L layers, E experts, K kinds (classes or tokens), T noise levels

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dit_moe.analysis.axes import (
    bare,
    colour_bar,
    log_ratios,
    matrix,
    number_ticks,
    ratio_ticks,
    small_panels,
    text_ticks,
)
from dit_moe.analysis.choose import divergence, lift, neighbours_first, relative_load, some_layers
from dit_moe.analysis.draw_active import NOISE
from dit_moe.plotting import DIVERGING, INK, LINES, MARKERS, WIDTH, canvas, labels_above, styled

FEW_EXPERTS = 16  # so many are numbered; more are put in an order that shows their structure
KINDS = 24  # rows of classes, or of tokens, that can be read
PAIR_PANELS = 9
LONG_PANELS = 2  # of many experts
PANELS = 6  # layers shown side by side


@styled
def draw_load(load_LE: np.ndarray, effective_L: np.ndarray, layers: Sequence[int], *, dark: bool = False) -> Any:
    """How much more or less than an even share of the pairs each expert gets, and how many experts that amounts to."""
    count, experts = load_LE.shape
    figure, axes = canvas(
        1, 2, height=1.6 + 0.24 * min(count, 10) + 0.09 * max(0, count - 10), sharey=True, width_ratios=(2.6, 1)
    )
    cells, bars = axes[0]
    logs, norm = log_ratios(load_LE * experts)
    image = matrix(cells, logs, norm, DIVERGING)
    number_ticks(cells.xaxis, range(experts), 16)
    number_ticks(cells.yaxis, layers)
    cells.set(xlabel="Expert", ylabel="Layer")
    ratio_ticks(colour_bar(figure, image, cells, "Load, relative to an even share"), norm)
    bars.barh(range(count), effective_L, height=0.7, color=LINES[0])
    for row, effective in enumerate(effective_L if count <= 14 else ()):
        wide = effective > experts / 3
        look = {"ha": "right", "color": "#ffffff"} if wide else {"ha": "left"}
        bars.text(effective, row, f" {effective:.1f} ", va="center", fontsize=8, **look)
    bars.axvline(experts, color=INK[dark], linewidth=1.0, linestyle=(0, (4, 3)))
    bars.set(xlabel=f"Effective experts\n(of {experts})", xlim=(0, experts * 1.04))
    bars.tick_params(axis="y", length=0)
    bars.grid(axis="y", visible=False)
    return figure


@styled
def draw_together(together_LEE: np.ndarray, layers: Sequence[int], *, dark: bool = False) -> Any:
    """How much oftener than their loads make it, two experts serve the same token, layer by layer."""
    experts = together_LEE.shape[1]
    lifts_LEE = np.stack([lift(together_EE) for together_EE in together_LEE])
    if experts > FEW_EXPERTS:
        orders = [neighbours_first(lift_EE) for lift_EE in lifts_LEE]
        lifts_LEE = np.stack([lift_EE[np.ix_(o, o)] for lift_EE, o in zip(lifts_LEE, orders, strict=True)])
    logs, norm = log_ratios(lifts_LEE)
    picked = some_layers(len(layers), PAIR_PANELS)
    columns = min(len(picked), 2 if len(picked) <= 4 else 3)
    rows = -(-len(picked) // columns)
    figure, axes = canvas(rows, columns, height=1.0 + rows * min(WIDTH / columns, 3.0))
    for axis, index in zip(small_panels(axes, len(picked)), picked, strict=True):
        image = matrix(axis, logs[index], norm, DIVERGING)
        axis.set(aspect="equal", title=f"layer {layers[index]}")
        if experts > FEW_EXPERTS:
            axis.set(xticks=[], yticks=[])
        else:
            number_ticks(axis.xaxis, range(experts), 8)
            number_ticks(axis.yaxis, range(experts), 8)
    order = "Experts, neighbours are often together" if experts > FEW_EXPERTS else "Expert"
    figure.supxlabel(order, fontsize=9)
    figure.supylabel(order, fontsize=9)
    ratio_ticks(colour_bar(figure, image, axes, "Share a token, relative to what their loads make"), norm)
    return figure


@styled
def draw_specialisation(
    bits_by_what: dict[str, np.ndarray],
    chance_by_what: dict[str, np.ndarray],
    layers: Sequence[int],
    *,
    dark: bool = False,
) -> Any:
    """How much a layer's experts differ between classes and between noise levels, in bits, layer by layer.

    Dashed, in the same colours: what chance makes of it, where that is known.
    """
    figure, axes = canvas(height=2.7)
    axis = axes[0, 0]
    for index, (what, bits_L) in enumerate(bits_by_what.items()):
        axis.plot(range(len(layers)), bits_L, color=LINES[index], marker=MARKERS[index], label=f"between {what}")
        if what in chance_by_what:
            dashed = {"linestyle": (0, (4, 3)), "linewidth": 1.0, "label": f"{what} by chance"}
            axis.plot(range(len(layers)), chance_by_what[what], color=LINES[index], **dashed)
    number_ticks(axis.xaxis, layers, 16)
    axis.set(xlabel="Layer", ylabel="Specialisation\n(bits per routed pair)")
    axis.set_ylim(0, max(0.01, axis.get_ylim()[1]))
    labels_above(axis, 2)
    return figure


@styled
def draw_experts_and_times(
    load_LTE: np.ndarray, times_T: np.ndarray, layers: Sequence[int], *, dark: bool = False
) -> Any:
    """At which noise levels each expert is used more than on average; many experts are ordered by where they work."""
    logs, norm = log_ratios(relative_load(load_LTE).transpose(0, 2, 1))
    experts = load_LTE.shape[2]
    picked = some_layers(len(layers), PANELS)
    rows = -(-len(picked) // 2)
    figure, axes = canvas(rows, min(2, len(picked)), height=1.1 + rows * (1.8 if experts <= FEW_EXPERTS else 2.2))
    for axis, index in zip(small_panels(axes, len(picked)), picked, strict=True):
        order = np.arange(experts)
        if experts > FEW_EXPERTS:
            weight_TE = load_LTE[index] / np.maximum(load_LTE[index].sum(0), 1e-12)
            order = np.argsort(times_T @ weight_TE, kind="stable")
        image = matrix(axis, logs[index][order], norm, DIVERGING)
        axis.set(title=f"layer {layers[index]}")
        number_ticks(axis.xaxis, [f"{time:.2f}" for time in times_T], 6)
        if experts > FEW_EXPERTS:
            axis.set_yticks([])
        else:
            number_ticks(axis.yaxis, range(experts), 8)
    figure.supxlabel(NOISE, fontsize=9)
    figure.supylabel("Expert" if experts <= FEW_EXPERTS else "Experts, ordered by where they work", fontsize=9)
    ratio_ticks(colour_bar(figure, image, axes, "Share of the pairs, relative to all noise levels"), norm)
    return figure


@styled
def draw_experts_and_kinds(
    load_LKE: np.ndarray, names: Sequence[str], layers: Sequence[int], kind: str, *, dark: bool = False
) -> Any:
    """Which classes, or tokens, use each expert more than the average one does."""
    ratios_LKE = relative_load(load_LKE)
    experts = load_LKE.shape[2]
    shown = peculiar(load_LKE, KINDS)
    logs, norm = log_ratios(ratios_LKE[:, shown])
    columns = 2 if experts <= FEW_EXPERTS and len(layers) > 1 else 1
    picked = some_layers(len(layers), LONG_PANELS if experts > FEW_EXPERTS else PANELS)
    rows = -(-len(picked) // columns)
    figure, axes = canvas(rows, columns, height=1.1 + rows * (0.35 + 0.165 * len(shown)), sharey=True)
    for axis, index in zip(small_panels(axes, len(picked)), picked, strict=True):
        order = np.arange(experts)
        if experts > FEW_EXPERTS:
            over_KE = np.clip(np.nan_to_num(ratios_LKE[index, shown]) - 1, 1e-9, None)
            order = np.argsort(np.arange(len(shown)) @ over_KE / over_KE.sum(0), kind="stable")
        image = matrix(axis, logs[index][:, order], norm, DIVERGING)
        axis.set(title=f"layer {layers[index]}")
        text_ticks(axis.yaxis, [names[i] for i in shown])
        if experts > FEW_EXPERTS:
            axis.set_xticks([])
        else:
            number_ticks(axis.xaxis, range(experts), 8)
        bare(axis)
    figure.supxlabel("Expert" if experts <= FEW_EXPERTS else "Experts, ordered by what they serve", fontsize=9)
    figure.supylabel(kind, fontsize=9)
    ratio_ticks(colour_bar(figure, image, axes, f"Share of the pairs, relative to the average {kind.lower()}"), norm)
    return figure


def peculiar(load_LKE: np.ndarray, most: int) -> list[int]:
    """Indices of at most `most` classes or tokens, in their order, whose experts differ the most from the average."""
    if load_LKE.shape[1] <= most:
        return list(range(load_LKE.shape[1]))
    return sorted(np.argsort(-divergence(load_LKE).mean(0), kind="stable")[:most].tolist())
