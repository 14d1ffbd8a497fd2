"""Pictures of how many experts the tokens use: by layer, noise level, token, class and position."""

# L layers, T noise levels, E experts, S positions, K kinds (classes or tokens)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dit_moe.analysis.axes import (
    around,
    colour_bar,
    from_to,
    halo,
    layer_lines,
    matrix,
    mean_and_target,
    name_lines,
    number_ticks,
    signed,
    small_panels,
    text_ticks,
)
from dit_moe.analysis.choose import extremes
from dit_moe.analysis.stats import Target
from dit_moe.plotting import DIVERGING, INK, WIDTH, canvas, styled

ACTIVE = "Active experts per token"
DEVIATION = "Active experts, more or fewer than the layer's mean"
NOISE = "Noise level t (0: data, 1: noise)"
LEAST = 0.1  # experts; differences below it stay pale
KINDS = 40  # rows that can be read


@styled
def draw_layers_and_times(
    active_LT: np.ndarray, times_T: np.ndarray, layers: Sequence[int], target: Target, *, dark: bool = False
) -> Any:
    """Mean active experts as a matrix of layers × noise levels, coloured around the target."""
    count, levels = active_LT.shape
    figure, axes = canvas(height=1.5 + 0.26 * min(count, 10) + 0.09 * max(0, count - 10))
    axis = axes[0, 0]
    written = (lambda value: f"{value:.2f}") if levels <= 11 and count <= 14 else None
    image = matrix(axis, active_LT, around(active_LT, target.mean, LEAST), DIVERGING, written)
    number_ticks(axis.xaxis, [f"{time:.2f}" for time in times_T])
    number_ticks(axis.yaxis, layers)
    axis.set(xlabel=NOISE, ylabel="Layer")
    colour_bar(figure, image, axis, f"{ACTIVE} (white: {target})", active_LT)
    return figure


@styled
def draw_over_times(
    active_LT: np.ndarray, times_T: np.ndarray, layers: Sequence[int], target: Target, *, dark: bool = False
) -> Any:
    """Mean active experts against the noise level, a line for each layer."""
    figure, axes = canvas(height=3.3)
    axis = axes[0, 0]
    layer_lines(figure, axis, times_T, active_LT, layers, dark=dark)
    mean_and_target(axis, times_T, active_LT.mean(0), target, dark=dark)
    name_lines(axis, layers)
    axis.set(xlabel=NOISE, ylabel=ACTIVE)
    return figure


@styled
def draw_spread(share_LE: np.ndarray, active_L: np.ndarray, layers: Sequence[int], *, dark: bool = False) -> Any:
    """Share of tokens with exactly 1, 2, 3, … active experts, by layer; a dot marks each layer's mean."""
    columns = max(3, int(np.flatnonzero(share_LE.max(0) >= 0.005).max()) + 1)
    percent_LE = 100 * share_LE[:, :columns]
    count = len(layers)
    figure, axes = canvas(height=1.5 + 0.28 * min(count, 10) + 0.09 * max(0, count - 10))
    axis = axes[0, 0]
    written = (lambda value: f"{value:.0f}" if value >= 0.5 else "") if columns <= 16 and count <= 14 else None
    image = matrix(
        axis, percent_LE, from_to(np.append(percent_LE, [0.0, 100.0 if count == 1 else 0.0]), 1.0), written=written
    )
    if written is None:
        axis.plot(active_L - 1, range(count), "o", markersize=4, **halo(dark))
    else:
        for row, mean in enumerate(active_L):  # a notch between the rows' numbers hides none of them
            axis.plot([mean - 1], [row + 0.38], "^", markersize=6, **halo(dark))
    number_ticks(axis.xaxis, range(1, columns + 1), 16)
    number_ticks(axis.yaxis, layers)
    axis.set(xlabel="Active experts of a token", ylabel="Layer")
    colour_bar(
        figure, image, axis, f"Share of the layer's tokens (%); {'▲' if written else '●'} is the mean", percent_LE
    )
    return figure


@styled
def draw_kinds(
    active_LK: np.ndarray, names: Sequence[str], layers: Sequence[int], kind: str, *, dark: bool = False
) -> Any:
    """Active experts of classes, or of kinds of token: the mean of all layers, and each layer around its own mean."""
    mean_K = active_LK.mean(0)
    shown = extremes(mean_K, KINDS)
    deviation_KL = (active_LK - active_LK.mean(1, keepdims=True))[:, shown].T
    figure, axes = canvas(1, 2, height=1.35 + 0.185 * len(shown), sharey=True, width_ratios=(1, 1.25))
    dots, cells = axes[0]
    rows = np.arange(len(shown))
    dots.hlines(rows, mean_K.mean(), mean_K[shown], color=INK[dark], linewidth=0.8)
    dots.plot(mean_K[shown], rows, "o", color="#D55E00")
    dots.axvline(mean_K.mean(), color=INK[dark], linewidth=1.0, linestyle=(0, (4, 3)))
    dots.set(xlabel=f"{ACTIVE},\nmean of layers", ylabel=kind)
    text_ticks(dots.yaxis, [names[index] for index in shown])
    dots.tick_params(axis="y", length=0)
    dots.margins(x=0.08)
    written = signed if len(layers) <= 6 and len(shown) <= 24 else None
    image = matrix(cells, deviation_KL, around(deviation_KL, 0.0, LEAST), DIVERGING, written)
    number_ticks(cells.xaxis, layers, 10)
    cells.set(xlabel="Layer")
    if len(shown) < len(names):
        for axis in (dots, cells):
            axis.axhline(len(shown) / 2 - 0.5, color=INK[dark], linewidth=1.2)
    colour_bar(figure, image, cells, "Each layer around its own mean", deviation_KL)
    return figure


@styled
def draw_positions_of_image(active_LS: np.ndarray, layers: Sequence[int], *, dark: bool = False) -> Any:
    """A map of the image's patches for each layer: more or fewer active experts than the layer's mean."""
    side = round(active_LS.shape[1] ** 0.5)
    deviation_LS = active_LS - active_LS.mean(1, keepdims=True)
    norm = around(deviation_LS, 0.0, LEAST)
    columns = min(len(layers), 4 if len(layers) <= 12 else 6)
    rows = -(-len(layers) // columns)
    figure, axes = canvas(rows, columns, height=0.7 + rows * (WIDTH / columns + (0.12 if columns > 4 else 0.02)))
    panels = small_panels(axes, len(layers))
    for axis, values_S, layer, mean in zip(panels, deviation_LS, layers, active_LS.mean(1), strict=True):
        image = matrix(axis, values_S.reshape(side, side), norm, DIVERGING)
        axis.set(xticks=[], yticks=[], aspect="equal")
        axis.set_title(f"layer {layer}: {mean:.2f}" if columns <= 4 else f"{layer}: {mean:.1f}", fontsize=8.5)
    colour_bar(figure, image, axes, DEVIATION, deviation_LS)
    return figure


@styled
def draw_positions_of_text(
    active_LS: np.ndarray, position_S: np.ndarray, layers: Sequence[int], target: Target, *, dark: bool = False
) -> Any:
    """Mean active experts against the position in the text that the network sees at once, a line for each layer."""
    figure, axes = canvas(height=3.3)
    axis = axes[0, 0]
    layer_lines(figure, axis, position_S, active_LS, layers, dark=dark)
    mean_and_target(axis, position_S, active_LS.mean(0), target, dark=dark)
    name_lines(axis, layers)
    axis.set(xlabel="Position in the sequence (tokens)", ylabel=ACTIVE)
    return figure
