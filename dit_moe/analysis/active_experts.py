"""The figures of how many experts the tokens use: by layer, noise level, position, class, token; over training."""

# L layers, T noise levels, E experts, S positions, K kinds (classes or tokens)

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from dit_moe.analysis.drawing import (
    LEAST,
    NOISE,
    ReportFigure,
    class_or_token,
    draw_matrix,
    images_per_class,
    mark_look,
    number_ticks,
    percent,
    scale_around,
    scale_over,
    signed,
    text_ticks,
    used_panels,
)
from dit_moe.analysis.statistics import RARE, SAME, RoutingStats, Target
from dit_moe.formatting import rounded
from dit_moe.plotting import (
    DASHED,
    DIVERGING,
    INK,
    WIDTH,
    canvas,
    colour_bar,
    styled,
)
from dit_moe.training.curves import ACTIVE, draw_training, layer_lines, mean_and_target

KINDS = 40  # rows that can be read
SEEN = 0.005  # a smaller share of a layer's tokens gets no column
POSITION = "Position in the sequence (tokens)"


# ------------------------------------------------------------------------------------------------------------- by layer


def layer_figures(stats: RoutingStats) -> Iterator[ReportFigure]:
    layers, active_L, std_L = stats.layers_L, stats.active_L, stats.active_std_L
    low, high, varied = int(active_L.argmin()), int(active_L.argmax()), int(std_L.argmax())
    single_L = stats.share_LE[:, 0]
    alone = int(single_L.argmax())
    caption = (
        f"Layer {layers[high]} uses the most experts, {active_L[high]:.2f} a token, layer {layers[low]} the fewest, "
        f"{active_L[low]:.2f}. Tokens differ the most in layer {layers[varied]}: {active_L[varied]:.2f} ± "
        f"{std_L[varied]:.2f}. In layer {layers[alone]}, {percent(single_L[alone])} of the tokens use only one."
    )
    none_L = 1 - stats.share_LE.sum(1)
    if none_L.max() >= SEEN:
        caption += f" In layer {layers[none_L.argmax()]}, {percent(none_L.max())} use none."
    yield ReportFigure(
        name="active_per_token",
        section="Layers",
        title="Active experts of a token, by layer",
        caption=caption,
        alt="Matrix of layers by number of active experts; colour is the share of the layer's tokens.",
        draw=partial(draw_active_by_layer, stats.share_LE, active_L, layers),
    )


@styled
def draw_active_by_layer(
    share_LE: np.ndarray, active_L: np.ndarray, layers: Sequence[int], *, dark: bool = False
) -> Any:
    """Share of tokens with exactly 1, 2, 3, … active experts, and with none if some have none, by layer.

    A dot marks each layer's mean.
    """
    none_L = 1 - share_LE.sum(1)
    first = 0 if none_L.max() >= SEEN else 1
    share_LE = share_LE if first else np.column_stack([none_L, share_LE])
    columns = max(3, int(np.flatnonzero(share_LE.max(0) >= SEEN).max()) + 1)
    percent_LE = 100 * share_LE[:, :columns]
    count = len(layers)
    figure, axes = canvas(height=1.5 + 0.28 * min(count, 10) + 0.09 * max(0, count - 10))
    axis = axes[0, 0]
    text_of = (lambda value: f"{value:.0f}" if value >= 0.5 else "") if columns <= 16 and count <= 14 else None
    image = draw_matrix(
        axis, percent_LE, scale_over(np.append(percent_LE, [0.0, 100.0 if count == 1 else 0.0]), 1.0), text_of=text_of
    )
    if text_of is None:
        axis.plot(active_L - first, range(count), "o", markersize=4, **mark_look(dark))
    else:
        for row, mean in enumerate(active_L):  # a notch between the rows' numbers hides none of them
            axis.plot([mean - first], [row + 0.38], "^", markersize=6, **mark_look(dark))
    number_ticks(axis.xaxis, range(first, first + columns), 16)
    number_ticks(axis.yaxis, layers)
    axis.set(xlabel="Active experts of a token", ylabel="Layer")
    colour_bar(
        figure, image, axis, f"Share of the layer's tokens (%); {'▲' if text_of else '●'} is the mean", percent_LE
    )
    return figure


# ------------------------------------------------------------------------------------------------------- by noise level


def noise_level_figures(stats: RoutingStats) -> Iterator[ReportFigure]:
    if stats.active_LT is None or stats.times_T is None or np.ptp(stats.active_LT) < SAME:
        return
    active_LT, times_T, layers = stats.active_LT, stats.times_T, stats.layers_L
    data, noise = int(times_T.argmin()), int(times_T.argmax())
    moved_L = np.ptp(active_LT, axis=1)
    mover = int(moved_L.argmax())
    target = stats.target
    # Where nothing holds the target, all cells may be far above it, or below, and would have one colour.
    middle, name = (target.mean, target.name) if target.held else (float(active_LT.mean()), "mean")
    where = np.unravel_index(int(np.abs(active_LT - middle).argmax()), active_LT.shape)
    yield ReportFigure(
        name="active_by_layer_and_time",
        section="Noise levels",
        title="Active experts by layer and noise level",
        caption=(
            f"Blue cells use fewer experts than {middle:.4g} ({name}), red ones more. The farthest from it "
            f"is layer {layers[where[0]]} at t = {times_T[where[1]]:.2f}, with {active_LT[where]:.2f}."
        ),
        alt=f"Matrix of layers by noise levels; colour is the mean number of active experts around the {name}.",
        draw=partial(draw_active_by_layer_and_time, active_LT, times_T, layers, (middle, f"{name} {middle:.4g}")),
    )
    mean_T = active_LT.mean(0)
    yield ReportFigure(
        name="active_over_time",
        section="Noise levels",
        title="Active experts over the noise level",
        caption=(
            f"On the way from noise (t = {times_T[noise]:.2f}) to data (t = {times_T[data]:.2f}) the mean of the "
            f"layers goes from {mean_T[noise]:.2f} to {mean_T[data]:.2f} experts a token. Layer {layers[mover]} "
            f"changes the most: between {active_LT[mover].min():.2f} and {active_LT[mover].max():.2f}."
        ),
        alt="Lines of the mean number of active experts against the noise level, one for each layer.",
        draw=partial(_draw_lines, times_T, active_LT, layers, target, NOISE),
    )


@styled
def draw_active_by_layer_and_time(
    active_LT: np.ndarray, times_T: np.ndarray, layers: Sequence[int], middle: tuple[float, str], *, dark: bool = False
) -> Any:
    """Mean active experts as a matrix of layers × noise levels, coloured around `middle`, a number and its name."""
    count, levels = active_LT.shape
    figure, axes = canvas(height=1.5 + 0.26 * min(count, 10) + 0.09 * max(0, count - 10))
    axis = axes[0, 0]
    text_of = (lambda value: f"{value:.2f}") if levels <= 11 and count <= 14 else None
    image = draw_matrix(axis, active_LT, scale_around(active_LT, middle[0], LEAST), DIVERGING, text_of)
    number_ticks(axis.xaxis, [f"{time:.2f}" for time in times_T])
    number_ticks(axis.yaxis, layers)
    axis.set(xlabel=NOISE, ylabel="Layer")
    colour_bar(figure, image, axis, f"{ACTIVE} (white: {middle[1]})", active_LT)
    return figure


@styled
def _draw_lines(
    x_X: np.ndarray,
    active_LX: np.ndarray,
    layers: Sequence[int],
    target: Target,
    label: str,
    *,
    dark: bool = False,
) -> Any:
    """Mean active experts against what `label` names, a line for each layer."""
    figure, axes = canvas(height=3.3)
    axis = axes[0, 0]
    layer_lines(figure, axis, x_X, active_LX, layers, dark=dark)
    mean_and_target(axis, x_X, active_LX.mean(0), layers, (target.mean, str(target)), dark=dark)
    axis.set(xlabel=label, ylabel=ACTIVE)
    return figure


# ---------------------------------------------------------------------------------------------------------- by position


def position_figures(stats: RoutingStats) -> Iterator[ReportFigure]:
    return (_text_positions if stats.kind == "text" else _image_positions)(stats)


def _image_positions(stats: RoutingStats) -> Iterator[ReportFigure]:
    mean_S, layers = stats.active_LS.mean(0), stats.layers_L
    side = math.isqrt(mean_S.size)
    if side < 3:
        return
    inner = np.zeros((side, side), dtype=bool)
    inner[1:-1, 1:-1] = True
    inside, edge = mean_S[inner.ravel()].mean(), mean_S[~inner.ravel()].mean()
    yield ReportFigure(
        name="active_by_position",
        section="Positions",
        title="Active experts by place in the image",
        caption=(
            f"Patches at the image's edge use {edge:.2f} experts, those inside {inside:.2f} (mean of the layers). "
            f"{_most_different(stats.active_LS, layers)} The number above each map is the layer's mean."
        ),
        alt="A map of the image's patches for each layer; colour is active experts around the layer's mean.",
        draw=partial(_draw_positions_in_image, stats.active_LS, layers),
    )


@styled
def _draw_positions_in_image(active_LS: np.ndarray, layers: Sequence[int], *, dark: bool = False) -> Any:
    """A map of the image's patches for each layer: more or fewer active experts than the layer's mean."""
    side = round(active_LS.shape[1] ** 0.5)
    deviation_LS = active_LS - active_LS.mean(1, keepdims=True)
    norm = scale_around(deviation_LS, 0.0, LEAST)
    columns = min(len(layers), 4 if len(layers) <= 12 else 6)
    rows = -(-len(layers) // columns)
    figure, axes = canvas(rows, columns, height=0.7 + rows * (WIDTH / columns + (0.12 if columns > 4 else 0.02)))
    panels = used_panels(axes, len(layers))
    for axis, values_S, layer, mean in zip(panels, deviation_LS, layers, active_LS.mean(1), strict=True):
        image = draw_matrix(axis, values_S.reshape(side, side), norm, DIVERGING)
        axis.set(xticks=[], yticks=[], aspect="equal")
        axis.set_title(f"layer {layer}: {mean:.2f}" if columns <= 4 else f"{layer}: {mean:.1f}", fontsize=8.5)
    colour_bar(figure, image, axes, "Active experts, more or fewer than the layer's mean", deviation_LS)
    return figure


def _text_positions(stats: RoutingStats) -> Iterator[ReportFigure]:
    assert stats.position_S is not None and stats.tokens_S is not None
    enough_S = stats.tokens_S >= RARE * stats.tokens_S.mean()
    active_LS, tokens_S, first_S = stats.active_LS[:, enough_S], stats.tokens_S[enough_S], stats.position_S[enough_S]
    bins, layers = len(first_S), stats.layers_L
    if bins < 2:
        return
    width = int(stats.position_S[1])
    start, half = max(1, bins // 16), bins // 2
    early, late = (
        np.average(active_LS[:, some].mean(0), weights=tokens_S[some]) for some in (slice(start), slice(half, None))
    )
    if first_S[0] > 0:  # with overlapping windows few begin a document
        beginning = f"Tokens {first_S[0]} to {first_S[start - 1] + width - 1} use"
    else:
        beginning = f"The first {start * width} tokens use" if start * width > 1 else "The first token uses"
    cut = "" if enough_S.all() else " Positions that few windows reach are left out."
    yield ReportFigure(
        name="active_by_position",
        section="Positions",
        title="Active experts over the sequence",
        caption=(
            f"{beginning} {early:.2f} experts (mean of the layers), those from {first_S[half]} on "
            f"{late:.2f}. {_most_different(active_LS, layers)}{cut}"
        ),
        alt="Lines of the mean number of active experts against the position in the sequence, one for each layer.",
        draw=partial(_draw_lines, first_S + (width - 1) / 2, active_LS, layers, stats.target, POSITION),
    )


def _most_different(active_LS: np.ndarray, layers: Sequence[int]) -> str:
    spread_L = np.ptp(active_LS, axis=1)
    widest = int(spread_L.argmax())
    return f"Positions differ the most in layer {layers[widest]}, by up to {spread_L[widest]:.2f} experts."


# --------------------------------------------------------------------------------------------------- by class and token


def class_and_token_figures(stats: RoutingStats) -> Iterator[ReportFigure]:
    active_LC = stats.active_LC if stats.can_compare_classes else None
    if active_LC is not None and stats.images_C is not None and np.ptp(active_LC) >= SAME:
        counted = f" Counted on {images_per_class(stats.images_C)}."
        yield _kinds_figure("class", "classes", active_LC, stats.class_names_C, stats.layers_L, counted)
    tokens = stats.tokens
    if tokens is not None and len(tokens.tokens_V) > 1:
        yield _kinds_figure("token", "tokens", tokens.active_LV, tokens.tokens_V, stats.layers_L, "")


def _kinds_figure(
    kind: str, kinds: str, active_LK: np.ndarray, names: Sequence[str], layers: Sequence[int], counted: str
) -> ReportFigure:
    mean_K = active_LK.mean(0)
    low, high = int(mean_K.argmin()), int(mean_K.argmax())
    half = KINDS // 2
    apart = f": {percent(mean_K[high] / mean_K[low] - 1)} apart" if mean_K[low] > 0 else ""
    cut = f" Of {len(names)}, the {half} highest and the {half} lowest are drawn." if len(names) > KINDS else ""
    return ReportFigure(
        name=f"active_by_{kind}",
        section=kinds.capitalize(),
        title=f"Active experts by {kind}",
        caption=(
            f"The most experts are used by {class_or_token(kind, names[high])}, {mean_K[high]:.2f} (mean of the "
            f"layers), the fewest by {class_or_token(kind, names[low])}, {mean_K[low]:.2f}{apart}. Right, "
            f"how much more or less than the layer's mean.{counted}{cut}"
        ),
        alt=f"Dots of the mean active experts of each {kind}, and a matrix of their deviation by layer.",
        draw=partial(draw_active_by_kind, active_LK, names, layers, kind.capitalize()),
    )


@styled
def draw_active_by_kind(
    active_LK: np.ndarray, names: Sequence[str], layers: Sequence[int], kind: str, *, dark: bool = False
) -> Any:
    """Active experts of classes, or of kinds of token: the mean of all layers, and each layer around its own mean."""
    mean_K = active_LK.mean(0)
    shown = highest_and_lowest(mean_K, KINDS)
    deviation_KL = (active_LK - active_LK.mean(1, keepdims=True))[:, shown].T
    figure, axes = canvas(1, 2, height=1.35 + 0.185 * len(shown), sharey=True, width_ratios=(1, 1.25))
    dots, cells = axes[0]
    rows = np.arange(len(shown))
    dots.hlines(rows, mean_K.mean(), mean_K[shown], color=INK[dark], linewidth=0.8)
    dots.plot(mean_K[shown], rows, "o", color="#D55E00")
    dots.axvline(mean_K.mean(), color=INK[dark], linewidth=1.0, linestyle=DASHED)
    dots.set(xlabel=f"{ACTIVE},\nmean of layers", ylabel=kind)
    text_ticks(dots.yaxis, [names[index] for index in shown])
    dots.tick_params(axis="y", length=0)
    dots.margins(x=0.08)
    text_of = signed if len(layers) <= 6 and len(shown) <= 24 else None
    image = draw_matrix(cells, deviation_KL, scale_around(deviation_KL, 0.0, LEAST), DIVERGING, text_of)
    number_ticks(cells.xaxis, layers, 10)
    cells.set(xlabel="Layer")
    if len(shown) < len(names):
        for axis in (dots, cells):
            axis.axhline(len(shown) / 2 - 0.5, color=INK[dark], linewidth=1.2)
    colour_bar(figure, image, cells, "Each layer around its own mean", deviation_KL)
    return figure


def highest_and_lowest(values: np.ndarray, most: int) -> list[int]:
    """Indices by falling value; where there are more than `most`, its upper and its lower half of them."""
    order = np.argsort(-values, kind="stable").tolist()
    return order if len(order) <= most else order[: most // 2] + order[len(order) - most // 2 :]


# -------------------------------------------------------------------------------------------------------- over training


def training_figures(stats: RoutingStats) -> Iterator[ReportFigure]:
    training, target = stats.training, stats.trained_target
    if training is None or len(training.step_U) < 2:
        return
    same = stats.fixed_number is not None or np.ptp(training.active_LU) < SAME
    if same and training.p_LU is None and training.theta_LU is None:
        return
    late_U = training.active_U[-max(1, len(training.active_U) // 4) :]
    caption = (
        f"Over the last quarter of training, tokens used {late_U.mean():.3f} ± {rounded(late_U.std(), 3)} experts "
        f"({target})."
    )
    if training.p_LU is not None:
        p_U = training.p_LU.mean(0)
        caption += f" The threshold p went from {rounded(p_U[0], 2)} to {rounded(p_U[-1], 2)}."
    if training.theta_LU is not None:
        theta_L = training.theta_LU[:, -1]
        low, high = int(theta_L.argmin()), int(theta_L.argmax())
        caption += (
            f" The scale of the logits θ ended between {rounded(theta_L[low], 2)} (layer {stats.layers_L[low]}) and "
            f"{rounded(theta_L[high], 2)} (layer {stats.layers_L[high]})."
        )
    yield ReportFigure(
        name="training",
        section="Training",
        title="The routers over training",
        caption=caption,
        alt="Lines over the training steps: active experts, threshold p and scale θ, by layer.",
        draw=partial(draw_training, training, stats.layers_L, (target.mean, str(target))),
    )
