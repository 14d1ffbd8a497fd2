"""The pictures of which experts are used, and what their numbers say."""

# L layers, E experts, X classes or noise levels

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dit_moe.analysis.choose import RARE, lift, most_bits, relative_load, specialisation
from dit_moe.analysis.draw_experts import (
    FEW_EXPERTS,
    KINDS,
    LONG_PANELS,
    PAIR_PANELS,
    PANELS,
    draw_experts_and_kinds,
    draw_experts_and_times,
    draw_load,
    draw_specialisation,
    draw_together,
)
from dit_moe.analysis.picture import Picture, images_a_class, named, only_some, picture
from dit_moe.analysis.stats import RoutingStats

GREY = f"; grey: an expert with less than {RARE:g} of an even load"


def of_experts(stats: RoutingStats) -> Iterator[Picture]:
    """Load, company, and what the experts are for."""
    yield _load(stats)
    if float(stats.share_LE[:, 1:].sum()) > 0:
        yield _together(stats)
    tokens = stats.tokens
    by_what = {
        "classes": stats.load_LCE if stats.tells_classes else None,
        "noise levels": stats.load_LTE,
        "frequent tokens": None if tokens is None else tokens.load_LVE,
    }
    known = {what: load_LXE for what, load_LXE in by_what.items() if load_LXE is not None and load_LXE.shape[1] > 1}
    if known and len(stats.layers_L) > 1:
        yield _specialisation(stats, known)
    if "noise levels" in known:
        yield _at_times(stats, known["noise levels"])
    if "classes" in known:
        assert stats.images_C is not None
        counted = f" Counted on {images_a_class(stats.images_C)}."
        yield _for_kinds(stats, "class", "classes", stats.class_names_C, known["classes"], counted)
    if tokens is not None and "frequent tokens" in known:
        yield _for_kinds(stats, "token", "tokens", tokens.tokens_V, known["frequent tokens"], "")


def _load(stats: RoutingStats) -> Picture:
    layers, experts = stats.layers_L, stats.experts
    effective_L = experts**stats.balance_L
    uneven = int(effective_L.argmin())
    busy = np.unravel_index(int(stats.load_LE.argmax()), stats.load_LE.shape)
    idle = int((stats.load_LE * experts < 0.1).sum())
    return picture(
        "load",
        "Experts",
        "Load and balance",
        f"The least balanced layer, {layers[uneven]}, has a load worth {effective_L[uneven]:.1f} evenly used experts "
        f"of {experts} (the exponential of its entropy). The busiest expert, {busy[1]} of layer {layers[busy[0]]}, "
        f"gets {stats.load_LE[busy] * experts:.1f} times an even share; {idle or 'none'} of {stats.load_LE.size} "
        f"{'gets' if idle <= 1 else 'get'} less than a tenth of one.",
        "Matrix of layers by experts; colour is the load relative to an even share. Bars of the effective experts.",
        draw_load,
        stats.load_LE,
        effective_L,
        layers,
    )


def _specialisation(stats: RoutingStats, known: dict[str, np.ndarray]) -> Picture:
    bits = {what: specialisation(load_LXE) for what, load_LXE in known.items()}
    tops = {what: int(bits_L.argmax()) for what, bits_L in bits.items()}
    found = "; ".join(
        f"between {what} in layer {stats.layers_L[top]}, {bits[what][top]:.3f} of at most {most_bits(known[what]):.3g} "
        "bits"
        for what, top in tops.items()
    )
    chance: dict[str, np.ndarray] = {}
    caveat = ""
    if "classes" in known and stats.shuffled_LCE is not None and stats.images_C is not None:
        chance["classes"] = specialisation(stats.shuffled_LCE)
        caveat = (
            f" With {images_a_class(stats.images_C)} some of it is chance: dashed, {chance['classes'].max():.3f} bits "
            "at most, is what the same images give with their labels shuffled."
        )
    if "frequent tokens" in known and stats.tokens is not None:
        rarest = int(stats.tokens.count_V.min())
        caveat = f" A token seldom met looks special by chance; the rarest of these was met {rarest} times."
    return picture(
        "specialisation",
        "Experts",
        "How much the experts specialise",
        f"How much the expert of a routed pair tells of the {' or of the '.join(bits)} it works for: 0 if all use the "
        f"same experts. The most {found}.{caveat}",
        "Lines of the specialisation in bits against the layer.",
        draw_specialisation,
        bits,
        chance,
        stats.layers_L,
    )


def _at_times(stats: RoutingStats, load_LTE: np.ndarray) -> Picture:
    assert stats.times_T is not None
    layer, time, expert, ratio = _strongest(load_LTE)
    return picture(
        "experts_by_time",
        "Experts",
        "At which noise levels the experts work",
        f"Red: used more than on average over the noise levels{GREY}. The strongest preference of an expert with at "
        "least half "
        f"an even load: expert {expert} of layer {stats.layers_L[layer]}, {ratio:.2f} times as often as on average at "
        f"t = {stats.times_T[time]:.2f}.{only_some(len(stats.layers_L), PANELS)}",
        "For each layer drawn, a matrix of experts by noise levels; colour is the use relative to the average.",
        draw_experts_and_times,
        load_LTE,
        stats.times_T,
        stats.layers_L,
    )


def _for_kinds(
    stats: RoutingStats, kind: str, kinds: str, names: list[str], load_LKE: np.ndarray, counted: str
) -> Picture:
    layer, place, expert, ratio = _strongest(load_LKE)
    cut = "" if len(names) <= KINDS else f" Drawn: the {KINDS} of {len(names)} {kinds} that differ the most."
    drawn = LONG_PANELS if stats.experts > FEW_EXPERTS else PANELS
    return picture(
        f"experts_by_{kind}",
        "Experts",
        f"Which {kinds} the experts serve",
        f"Red: used more than by the average {kind}{GREY}. The strongest preference of an expert with at least half "
        f"an even load: expert {expert} of layer {stats.layers_L[layer]}, {ratio:.2f} times as often as on average for "
        f"{named(kind, names[place])}.{counted}{cut}{only_some(len(stats.layers_L), drawn)}",
        f"For each layer drawn, a matrix of {kinds} by experts; colour is the use relative to the average {kind}.",
        draw_experts_and_kinds,
        load_LKE,
        names,
        stats.layers_L,
        kind.capitalize(),
    )


def _together(stats: RoutingStats) -> Picture:
    lifts_LEE = np.stack([lift(together_EE) for together_EE in stats.together_LEE])
    busy_LE = stats.load_LE * stats.experts >= 0.5
    common_LEE = np.where(busy_LE[:, :, None] & busy_LE[:, None], lifts_LEE, np.nan)
    told = ""
    if not np.isnan(common_LEE).all():
        high = np.unravel_index(int(np.nanargmax(common_LEE)), common_LEE.shape)
        low = np.unravel_index(int(np.nanargmin(common_LEE)), common_LEE.shape)
        told = (
            f"Among experts with at least half an even load, {high[1]} and {high[2]} of layer "
            f"{stats.layers_L[high[0]]} are together {common_LEE[high]:.2f} times as often as their loads make it, "
            f"{low[1]} and {low[2]} of layer {stats.layers_L[low[0]]} {common_LEE[low]:.2f} times. "
        )
    return picture(
        "together",
        "Experts",
        "Which experts share a token",
        f"{told}1× is what experts chosen by load alone would have, with as many of them a token as the layer has"
        f"{GREY}.{only_some(len(stats.layers_L), PAIR_PANELS)}",
        "For each layer drawn, a matrix of experts by experts; colour is how often two share a token, over what their "
        "loads make.",
        draw_together,
        stats.together_LEE,
        stats.layers_L,
    )


def _strongest(load_LXE: np.ndarray) -> tuple[int, int, int, float]:
    """Layer, place, expert and ratio of the strongest preference of experts that are not rarely used."""
    ratio_LXE = np.where(load_LXE.mean(1, keepdims=True) * load_LXE.shape[2] >= 0.5, relative_load(load_LXE), 0.0)
    layer, place, expert = np.unravel_index(int(ratio_LXE.argmax()), ratio_LXE.shape)
    return int(layer), int(place), int(expert), float(ratio_LXE.max())
