"""The pictures of how many experts are used, and what their numbers say."""

# L layers, E experts, T noise levels, S positions, K kinds (classes or tokens)

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from dit_moe.analysis.choose import RARE
from dit_moe.analysis.draw_active import (
    KINDS,
    draw_kinds,
    draw_layers_and_times,
    draw_over_times,
    draw_positions_of_image,
    draw_positions_of_text,
    draw_spread,
)
from dit_moe.analysis.draw_examples import draw_image_by_layer, draw_images, levels_shown
from dit_moe.analysis.picture import Picture, images_a_class, named, percent, picture
from dit_moe.analysis.stats import RoutingStats

IMAGES = 3  # in one picture


def of_layers(stats: RoutingStats) -> Iterator[Picture]:
    layers, active_L, std_L = stats.layers_L, stats.active_L, stats.active_std_L
    low, high, varied = int(active_L.argmin()), int(active_L.argmax()), int(std_L.argmax())
    single_L = stats.share_LE[:, 0]
    alone = int(single_L.argmax())
    caption = (
        f"Layer {layers[high]} uses the most experts, {active_L[high]:.2f} a token, layer {layers[low]} the fewest, "
        f"{active_L[low]:.2f}. Tokens differ the most in layer {layers[varied]}: {active_L[varied]:.2f} ± "
        f"{std_L[varied]:.2f}. In layer {layers[alone]}, {percent(single_L[alone])} of the tokens make do with one."
    )
    yield picture(
        "active_per_token",
        "Layers",
        "Active experts of a token, by layer",
        caption,
        "Matrix of layers by number of active experts; colour is the share of the layer's tokens.",
        draw_spread,
        stats.share_LE,
        active_L,
        layers,
    )


def of_times(stats: RoutingStats) -> Iterator[Picture]:
    if stats.active_LT is None or stats.times_T is None:
        return
    active_LT, times_T, layers = stats.active_LT, stats.times_T, stats.layers_L
    data, noise = int(times_T.argmin()), int(times_T.argmax())
    moved_L = np.ptp(active_LT, axis=1)
    mover = int(moved_L.argmax())
    target = stats.target
    where = np.unravel_index(int(np.abs(active_LT - target.mean).argmax()), active_LT.shape)
    yield picture(
        "active_by_layer_and_time",
        "Noise levels",
        "Active experts by layer and noise level",
        f"Blue cells use fewer experts than {target.mean:.4g} ({target.name}), red ones more. The farthest from it is "
        f"layer {layers[where[0]]} at t = {times_T[where[1]]:.2f}, with {active_LT[where]:.2f}.",
        "Matrix of layers by noise levels; colour is the mean number of active experts around the target.",
        draw_layers_and_times,
        active_LT,
        times_T,
        layers,
        target,
    )
    mean_T = active_LT.mean(0)
    yield picture(
        "active_over_time",
        "Noise levels",
        "Active experts over the noise level",
        f"On the way from noise (t = {times_T[noise]:.2f}) to data (t = {times_T[data]:.2f}) the mean of the layers "
        f"goes from {mean_T[noise]:.2f} to {mean_T[data]:.2f} experts a token. Layer {layers[mover]} changes the most: "
        f"between {active_LT[mover].min():.2f} and {active_LT[mover].max():.2f}.",
        "Lines of the mean number of active experts against the noise level, one for each layer.",
        draw_over_times,
        active_LT,
        times_T,
        layers,
        target,
    )


def of_examples(stats: RoutingStats) -> Iterator[Picture]:
    examples = stats.examples
    if examples is None or not len(examples.images_MHWC):
        return
    count, levels = len(examples.images_MHWC), levels_shown(examples)
    maps_MTS = examples.active_MTLS.mean(2)
    first, last = levels[0], levels[-1]
    for start in range(0, count, IMAGES):
        images = list(range(start, min(start + IMAGES, count)))
        maps = maps_MTS[images]
        yield picture(
            "maps" if count <= IMAGES else f"maps_{start // IMAGES + 1}",
            "Single images",
            "Experts per patch" if count <= IMAGES else f"Experts per patch, images {start + 1} to {images[-1] + 1}",
            "Above, what the network saw at each noise level; below, the decoded image tinted by the experts that each "
            f"of its patches took, mean of the layers. At t = {examples.times_T[first]:.2f} patches take between "
            f"{maps[:, first].min():.2f} and {maps[:, first].max():.2f}, at t = {examples.times_T[last]:.2f} between "
            f"{maps[:, last].min():.2f} and {maps[:, last].max():.2f}.",
            "Noisy images, and the same images tinted by the number of active experts of each patch, by noise level.",
            draw_images,
            examples,
            images,
        )
    if len(stats.layers_L) > 1:
        spread_L = examples.active_MTLS[0].max(2).mean(0) - examples.active_MTLS[0].min(2).mean(0)
        widest = int(spread_L.argmax())
        yield picture(
            "maps_by_layer",
            "Single images",
            f"The first image, layer by layer (class {examples.classes_M[0]})",
            f"Patches differ the most in layer {stats.layers_L[widest]}: by {spread_L[widest]:.1f} experts from the "
            "thriftiest to the most expensive patch, on average over the noise levels.",
            "Maps of the active experts of each patch, a row for each layer and a column for each noise level.",
            draw_image_by_layer,
            examples,
            0,
            stats.layers_L,
        )


def of_positions(stats: RoutingStats) -> Iterator[Picture]:
    yield from (_in_text if stats.kind == "text" else _in_images)(stats)


def _most_different(active_LS: np.ndarray, layers: Sequence[int]) -> str:
    spread_L = np.ptp(active_LS, axis=1)
    widest = int(spread_L.argmax())
    return f"Positions differ the most in layer {layers[widest]}, by up to {spread_L[widest]:.2f} experts."


def _in_text(stats: RoutingStats) -> Iterator[Picture]:
    assert stats.position_S is not None and stats.tokens_S is not None
    told_S = stats.tokens_S >= RARE * stats.tokens_S.mean()
    active_LS, tokens_S, first_S = stats.active_LS[:, told_S], stats.tokens_S[told_S], stats.position_S[told_S]
    bins = len(first_S)
    if bins < 2:
        return
    width = int(stats.position_S[1])
    start, half = max(1, bins // 16), bins // 2
    early, late = (
        np.average(active_LS[:, some].mean(0), weights=tokens_S[some]) for some in (slice(start), slice(half, None))
    )
    beginning = f"{start * width} tokens use" if start * width > 1 else "token uses"
    cut = "" if told_S.all() else " Positions that few windows reach are left out."
    yield picture(
        "active_by_position",
        "Positions",
        "Active experts over the sequence",
        f"The first {beginning} {early:.2f} experts (mean of the layers), those from {first_S[half]} on {late:.2f}. "
        f"{_most_different(active_LS, stats.layers_L)}{cut}",
        "Lines of the mean number of active experts against the position in the sequence, one for each layer.",
        draw_positions_of_text,
        active_LS,
        first_S + (width - 1) / 2,
        stats.layers_L,
        stats.target,
    )


def _in_images(stats: RoutingStats) -> Iterator[Picture]:
    mean_S, layers = stats.active_LS.mean(0), stats.layers_L
    side = math.isqrt(mean_S.size)
    if side < 3:
        return
    inner = np.zeros((side, side), dtype=bool)
    inner[1:-1, 1:-1] = True
    inside, edge = mean_S[inner.ravel()].mean(), mean_S[~inner.ravel()].mean()
    yield picture(
        "active_by_position",
        "Positions",
        "Active experts by place in the image",
        f"Patches at the image's edge use {edge:.2f} experts, those inside {inside:.2f} (mean of the layers). "
        f"{_most_different(stats.active_LS, layers)} The number above each map is the layer's mean.",
        "A map of the image's patches for each layer; colour is the number of active experts around the layer's mean.",
        draw_positions_of_image,
        stats.active_LS,
        layers,
    )


def of_kinds(stats: RoutingStats) -> Iterator[Picture]:
    if stats.tells_classes and stats.active_LC is not None and stats.images_C is not None:
        counted = f" Counted on {images_a_class(stats.images_C)}."
        yield _by_kind("class", "classes", stats.active_LC, stats.class_names_C, stats.layers_L, counted)
    tokens = stats.tokens
    if tokens is not None and len(tokens.tokens_V) > 1:
        yield _by_kind("token", "tokens", tokens.active_LV, tokens.tokens_V, stats.layers_L, "")


def _by_kind(
    kind: str, kinds: str, active_LK: np.ndarray, names: Sequence[str], layers: Sequence[int], counted: str
) -> Picture:
    mean_K = active_LK.mean(0)
    low, high = int(mean_K.argmin()), int(mean_K.argmax())
    cut = (
        ""
        if len(names) <= KINDS
        else f" Of {len(names)}, the {KINDS // 2} highest and the {KINDS // 2} lowest are drawn."
    )
    return picture(
        f"active_by_{kind}",
        kinds.capitalize(),
        f"Active experts by {kind}",
        f"The most experts are used by {named(kind, names[high])}, {mean_K[high]:.2f} (mean of the layers), the fewest "
        f"by {named(kind, names[low])}, {mean_K[low]:.2f}: {percent(mean_K[high] / mean_K[low] - 1)} apart. "
        "Right, how much more or less "
        f"than the layer's mean.{counted}{cut}",
        f"Dots of the mean active experts of each {kind}, and a matrix of their deviation by layer.",
        draw_kinds,
        active_LK,
        names,
        layers,
        kind.capitalize(),
    )
