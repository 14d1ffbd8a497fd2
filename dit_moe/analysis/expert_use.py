"""The figures of which experts are used: their load, which share a token, and what they specialise in."""

# L layers, E experts, K kinds (classes or tokens), T noise levels, X classes, tokens or noise levels

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from dit_moe.analysis.drawing import (
    NOISE,
    ReportFigure,
    class_or_token,
    draw_matrix,
    hide_frame,
    images_per_class,
    log_ratios,
    number_ticks,
    ratio_ticks,
    some_layers,
    some_layers_drawn,
    text_ticks,
    used_panels,
)
from dit_moe.analysis.statistics import (
    RARE,
    SAME,
    RoutingStats,
    divergence,
    lift,
    mean_known,
    most_bits,
    neighbours_first,
    relative_load,
    specialisation,
)
from dit_moe.plotting import DASHED, DIVERGING, INK, LINES, MARKERS, WIDTH, canvas, colour_bar, labels_above, styled

FEW_EXPERTS = 16  # so many are numbered; more are put in an order that shows their structure
KINDS = 24  # rows of classes, or of tokens, that can be read
PAIR_PANELS = 9
LONG_PANELS = 2  # of many experts
PANELS = 6  # layers shown side by side
GREY = f"; grey: an expert with less than {RARE:g} of an even load"


def expert_use_figures(stats: RoutingStats) -> Iterator[ReportFigure]:
    """Their load, which share tokens, and what they specialise in; nothing if no token uses any."""
    if np.isnan(stats.load_LE).all():
        return
    if not stats.even_load:
        yield _load_figure(stats)
    if float(stats.share_LE[:, 1:].sum()) > 0:
        yield _together_figure(stats)
    tokens = stats.tokens
    by_what = {
        "classes": stats.load_LCE if stats.can_compare_classes else None,
        "noise levels": stats.load_LTE,
        "frequent tokens": None if tokens is None else tokens.load_LVE,
    }
    known = {
        what: load_LXE
        for what, load_LXE in by_what.items()
        if load_LXE is not None and load_LXE.shape[1] > 1 and np.nan_to_num(specialisation(load_LXE)).max() >= SAME
    }
    if known and len(stats.layers_L) > 1:
        yield _specialisation_figure(stats, known)
    if "noise levels" in known:
        yield _noise_levels_figure(stats, known["noise levels"])
    if "classes" in known:
        assert stats.images_C is not None
        counted = f" Counted on {images_per_class(stats.images_C)}."
        yield _kinds_figure(stats, "class", "classes", stats.class_names_C, known["classes"], counted)
    if tokens is not None and "frequent tokens" in known:
        yield _kinds_figure(stats, "token", "tokens", tokens.tokens_V, known["frequent tokens"], "")


def _load_figure(stats: RoutingStats) -> ReportFigure:
    layers, experts = stats.layers_L, stats.experts
    effective_L = stats.effective_L
    uneven = int(effective_L.argmin())
    busy = np.unravel_index(int(np.nanargmax(stats.load_LE)), stats.load_LE.shape)
    idle = int((np.nan_to_num(stats.load_LE) * experts < 0.1).sum())
    return ReportFigure(
        name="load",
        section="Experts",
        title="Load and balance",
        caption=(
            f"The least balanced layer, {layers[uneven]}, has a load worth {effective_L[uneven]:.1f} evenly used "
            f"experts of {experts} (the exponential of its entropy). The busiest expert, {busy[1]} of layer "
            f"{layers[busy[0]]}, gets {stats.load_LE[busy] * experts:.1f} times an even share; {idle or 'none'} of "
            f"{stats.load_LE.size} {'gets' if idle <= 1 else 'get'} less than a tenth of one."
        ),
        alt="Matrix of layers by experts; colour is the load relative to an even share. Bars of the effective experts.",
        draw=partial(_draw_load, stats.load_LE, effective_L, layers),
    )


@styled
def _draw_load(load_LE: np.ndarray, effective_L: np.ndarray, layers: Sequence[int], *, dark: bool = False) -> Any:
    """How much more or less than an even share of the pairs each expert gets, and how many experts that amounts to."""
    count, experts = load_LE.shape
    figure, axes = canvas(
        1, 2, height=1.6 + 0.24 * min(count, 10) + 0.09 * max(0, count - 10), sharey=True, width_ratios=(2.6, 1)
    )
    cells, bars = axes[0]
    logs, norm = log_ratios(load_LE * experts)
    image = draw_matrix(cells, logs, norm, DIVERGING)
    number_ticks(cells.xaxis, range(experts), 16)
    number_ticks(cells.yaxis, layers)
    cells.set(xlabel="Expert", ylabel="Layer")
    ratio_ticks(colour_bar(figure, image, cells, "Load, relative to an even share"), norm)
    bars.barh(range(count), effective_L, height=0.7, color=LINES[0])
    for row, effective in enumerate(effective_L if count <= 14 else ()):
        wide = effective > experts / 3
        look = {"ha": "right", "color": "#ffffff"} if wide else {"ha": "left"}
        bars.text(effective, row, f" {effective:.1f} ", va="center", fontsize=8, **look)
    bars.axvline(experts, color=INK[dark], linewidth=1.0, linestyle=DASHED)
    bars.set(xlabel=f"Effective experts\n(of {experts})", xlim=(0, experts * 1.04))
    bars.tick_params(axis="y", length=0)
    bars.grid(axis="y", visible=False)
    return figure


# -------------------------------------------------------------------------------------------- experts that share tokens


def _together_figure(stats: RoutingStats) -> ReportFigure:
    lifts_LEE = np.stack([lift(together_EE) for together_EE in stats.together_LEE])
    busy_LE = stats.load_LE * stats.experts >= 0.5
    common_LEE = np.where(busy_LE[:, :, None] & busy_LE[:, None], lifts_LEE, np.nan)
    extremes = ""
    if not np.isnan(common_LEE).all():
        high = np.unravel_index(int(np.nanargmax(common_LEE)), common_LEE.shape)
        low = np.unravel_index(int(np.nanargmin(common_LEE)), common_LEE.shape)
        extremes = (
            f"Among experts with at least half an even load, {high[1]} and {high[2]} of layer "
            f"{stats.layers_L[high[0]]} are together {common_LEE[high]:.2f} times as often as their loads make it, "
            f"{low[1]} and {low[2]} of layer {stats.layers_L[low[0]]} {common_LEE[low]:.2f} times. "
        )
    return ReportFigure(
        name="together",
        section="Experts",
        title="Which experts share a token",
        caption=(
            f"{extremes}1× is what experts chosen by load alone would have, with as many of them a token as the layer "
            f"has{GREY}.{some_layers_drawn(len(stats.layers_L), PAIR_PANELS)}"
        ),
        alt=(
            "For each layer drawn, a matrix of experts by experts; colour is how often two share a token, over what "
            "their loads make."
        ),
        draw=partial(_draw_together, stats.together_LEE, stats.layers_L),
    )


@styled
def _draw_together(together_LEE: np.ndarray, layers: Sequence[int], *, dark: bool = False) -> Any:
    """How much more often than their loads alone make it two experts serve the same token, layer by layer."""
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
    for axis, index in zip(used_panels(axes, len(picked)), picked, strict=True):
        image = draw_matrix(axis, logs[index], norm, DIVERGING)
        axis.set(aspect="equal", title=f"layer {layers[index]}")
        _expert_ticks(axis.xaxis, experts)
        _expert_ticks(axis.yaxis, experts)
    order = "Experts, neighbours are often together" if experts > FEW_EXPERTS else "Expert"
    _label_panels(figure, order, order)
    ratio_ticks(colour_bar(figure, image, axes, "Share a token, relative to what their loads make"), norm)
    return figure


def _expert_ticks(axis: Any, experts: int) -> None:
    """The numbers of the experts, as far as they can be read."""
    if experts > FEW_EXPERTS:
        axis.set_ticks([])
    else:
        number_ticks(axis, range(experts), 8)


def _label_panels(figure: Any, x: str, y: str) -> None:
    figure.supxlabel(x, fontsize=9)
    figure.supylabel(y, fontsize=9)


# ------------------------------------------------------------------------------------------------------ specialisation


def _specialisation_figure(stats: RoutingStats, known: dict[str, np.ndarray]) -> ReportFigure:
    bits = {what: specialisation(load_LXE) for what, load_LXE in known.items()}
    tops = {what: int(np.nanargmax(bits_L)) for what, bits_L in bits.items()}
    found = "; ".join(
        f"between {what} in layer {stats.layers_L[top]}, {bits[what][top]:.3f} of at most {most_bits(known[what]):.3g} "
        "bits"
        for what, top in tops.items()
    )
    chance: dict[str, np.ndarray] = {}
    caveat = ""
    if "classes" in known and stats.shuffled_LCE is not None and stats.images_C is not None:
        chance["classes"] = specialisation(stats.shuffled_LCE)
        most = np.nanmax(chance["classes"])
        caveat = (
            f" With {images_per_class(stats.images_C)} some of it is chance: dashed, {most:.3f} bits at most, is what "
            "the same images give with their labels shuffled."
        )
    if "frequent tokens" in known and stats.tokens is not None:
        rarest = int(stats.tokens.count_V.min())
        caveat = f" A token seldom met looks special by chance; the rarest of these was met {rarest} times."
    return ReportFigure(
        name="specialisation",
        section="Experts",
        title="How much the experts specialise",
        caption=(
            f"How much the expert of a routed pair tells of the {' or of the '.join(bits)} it works for: 0 if all use "
            f"the same experts. The most {found}.{caveat}"
        ),
        alt="Lines of the specialisation in bits against the layer.",
        draw=partial(_draw_specialisation, bits, chance, stats.layers_L),
    )


@styled
def _draw_specialisation(
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
            dashed = {"linestyle": DASHED, "linewidth": 1.0, "label": f"{what} by chance"}
            axis.plot(range(len(layers)), chance_by_what[what], color=LINES[index], **dashed)
    number_ticks(axis.xaxis, layers, 16)
    axis.set(xlabel="Layer", ylabel="Specialisation\n(bits per routed pair)")
    axis.set_ylim(0, max(0.01, axis.get_ylim()[1]))
    labels_above(axis, 2)
    return figure


def _noise_levels_figure(stats: RoutingStats, load_LTE: np.ndarray) -> ReportFigure:
    assert stats.times_T is not None
    layer, time, expert, ratio = _strongest_preference(load_LTE)
    return ReportFigure(
        name="experts_by_time",
        section="Experts",
        title="At which noise levels the experts work",
        caption=(
            f"Red: used more than on average over the noise levels{GREY}. The strongest preference of an expert with "
            f"at least half an even load: expert {expert} of layer {stats.layers_L[layer]}, {ratio:.2f} times as often "
            f"as on average at t = {stats.times_T[time]:.2f}.{some_layers_drawn(len(stats.layers_L), PANELS)}"
        ),
        alt="For each layer drawn, a matrix of experts by noise levels; colour is the use relative to the average.",
        draw=partial(_draw_use_by_time, load_LTE, stats.times_T, stats.layers_L),
    )


@styled
def _draw_use_by_time(load_LTE: np.ndarray, times_T: np.ndarray, layers: Sequence[int], *, dark: bool = False) -> Any:
    """At which noise levels each expert is used more than on average; many experts are ordered by where they work."""
    logs, norm = log_ratios(relative_load(load_LTE).transpose(0, 2, 1))
    experts = load_LTE.shape[2]
    picked = some_layers(len(layers), PANELS)
    rows = -(-len(picked) // 2)
    figure, axes = canvas(rows, min(2, len(picked)), height=1.1 + rows * (1.8 if experts <= FEW_EXPERTS else 2.2))
    for axis, index in zip(used_panels(axes, len(picked)), picked, strict=True):
        order = np.arange(experts)
        if experts > FEW_EXPERTS:
            load_TE = np.nan_to_num(load_LTE[index])
            weight_TE = load_TE / np.maximum(load_TE.sum(0), 1e-12)
            order = np.argsort(times_T @ weight_TE, kind="stable")
        image = draw_matrix(axis, logs[index][order], norm, DIVERGING)
        axis.set(title=f"layer {layers[index]}")
        number_ticks(axis.xaxis, [f"{time:.2f}" for time in times_T], 6)
        _expert_ticks(axis.yaxis, experts)
    _label_panels(figure, NOISE, "Expert" if experts <= FEW_EXPERTS else "Experts, ordered by where they work")
    ratio_ticks(colour_bar(figure, image, axes, "Share of the pairs, relative to all noise levels"), norm)
    return figure


def _kinds_figure(
    stats: RoutingStats, kind: str, kinds: str, names: list[str], load_LKE: np.ndarray, counted: str
) -> ReportFigure:
    layer, place, expert, ratio = _strongest_preference(load_LKE)
    cut = "" if len(names) <= KINDS else f" Drawn: the {KINDS} of {len(names)} {kinds} that differ the most."
    drawn = LONG_PANELS if stats.experts > FEW_EXPERTS else PANELS
    return ReportFigure(
        name=f"experts_by_{kind}",
        section="Experts",
        title=f"Which {kinds} the experts serve",
        caption=(
            f"Red: used more than by the average {kind}{GREY}. The strongest preference of an expert with at least "
            f"half an even load: expert {expert} of layer {stats.layers_L[layer]}, {ratio:.2f} times as often as on "
            "average for "
            f"{class_or_token(kind, names[place])}.{counted}{cut}{some_layers_drawn(len(stats.layers_L), drawn)}"
        ),
        alt=f"For each layer drawn, a matrix of {kinds} by experts; colour is the use relative to the average {kind}.",
        draw=partial(_draw_use_by_kind, load_LKE, names, stats.layers_L, kind.capitalize()),
    )


@styled
def _draw_use_by_kind(
    load_LKE: np.ndarray, names: Sequence[str], layers: Sequence[int], kind: str, *, dark: bool = False
) -> Any:
    """Which classes, or tokens, use each expert more than the average one does."""
    ratios_LKE = relative_load(load_LKE)
    experts = load_LKE.shape[2]
    shown = _most_divergent(load_LKE, KINDS)
    logs, norm = log_ratios(ratios_LKE[:, shown])
    columns = 2 if experts <= FEW_EXPERTS and len(layers) > 1 else 1
    picked = some_layers(len(layers), LONG_PANELS if experts > FEW_EXPERTS else PANELS)
    rows = -(-len(picked) // columns)
    figure, axes = canvas(rows, columns, height=1.1 + rows * (0.35 + 0.165 * len(shown)), sharey=True)
    for axis, index in zip(used_panels(axes, len(picked)), picked, strict=True):
        order = np.arange(experts)
        if experts > FEW_EXPERTS:
            over_KE = np.clip(np.nan_to_num(ratios_LKE[index, shown]) - 1, 1e-9, None)
            order = np.argsort(np.arange(len(shown)) @ over_KE / over_KE.sum(0), kind="stable")
        image = draw_matrix(axis, logs[index][:, order], norm, DIVERGING)
        axis.set(title=f"layer {layers[index]}")
        text_ticks(axis.yaxis, [names[i] for i in shown])
        _expert_ticks(axis.xaxis, experts)
        hide_frame(axis)
    _label_panels(figure, "Expert" if experts <= FEW_EXPERTS else "Experts, ordered by what they serve", kind)
    ratio_ticks(colour_bar(figure, image, axes, f"Share of the pairs, relative to the average {kind.lower()}"), norm)
    return figure


def _most_divergent(load_LKE: np.ndarray, most: int) -> list[int]:
    """Indices of at most `most` classes or tokens, in their order, whose experts differ the most from the average."""
    if load_LKE.shape[1] <= most:
        return list(range(load_LKE.shape[1]))
    return sorted(np.argsort(-mean_known(divergence(load_LKE), 0), kind="stable")[:most].tolist())


def _strongest_preference(load_LXE: np.ndarray) -> tuple[int, int, int, float]:
    """Layer, place, expert and ratio of the strongest preference of experts that are not rarely used."""
    often_L1E = mean_known(load_LXE, 1, keepdims=True) * load_LXE.shape[2] >= 0.5
    ratio_LXE = np.nan_to_num(np.where(often_L1E, relative_load(load_LXE), 0.0))
    layer, place, expert = np.unravel_index(int(ratio_LXE.argmax()), ratio_LXE.shape)
    return int(layer), int(place), int(expert), float(ratio_LXE.max())
