"""How a variant looks in every figure of a study, and the column of names beside the axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np

from dit_moe.plotting import INK, LINES, MARKERS

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


def styles_of(variants: Sequence[Mapping[str, Any]]) -> dict[str, Style]:
    """By the variant's name; the same in every figure."""
    routers = dict.fromkeys(variant["router"] for variant in variants)
    fresh = iter(OTHER_COLOURS * len(routers))
    colours = {router: ROUTER_COLOURS.get(router) or next(fresh) for router in routers}
    numbers = {router: count() for router in routers}
    found = {}
    for number, variant in enumerate(variants):
        router = variant["router"]
        nth = next(numbers[router])
        marker, line = MARKERS[nth % len(MARKERS)], LINE_STYLES[nth % len(LINE_STYLES)]
        found[variant["name"]] = Style(colours[router], marker, 8.5 if marker in "PX*" else 6.5, line, number)
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
