"""How a variant looks in every picture of a study, and how many of them are labelled without hiding each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np

from dit_moe.plotting import INK, LINES, MARKERS

FAMILIES = {None: LINES[6], "topk": LINES[0], "topp": LINES[2], "dtopp": LINES[1]}  # grey, blue, green, vermillion
STYLES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.2, 1.2, 1.2)), (0, (9, 1.5, 3, 1.5)))
OTHERS = (LINES[3], LINES[4], LINES[5], LINES[7])
LETTERS = 8  # points: as high as labels are
LETTERED: dict[str, Any] = {"fontsize": LETTERS, "va": "center_baseline"}
LINE = 1.25  # … and this many times as far apart


@dataclass(frozen=True)
class Mark:
    """The colour says the router, the marker and the line's style which of its variants."""

    colour: str
    marker: str
    size: float
    style: Any
    number: int  # among all variants


def marks(variants: Sequence[Mapping[str, Any]]) -> dict[str, Mark]:
    """Variant → mark, the same in every picture."""
    routers = dict.fromkeys(variant["router"] for variant in variants)
    fresh = iter(OTHERS * len(routers))
    colours = {router: FAMILIES.get(router) or next(fresh) for router in routers}
    numbers = {router: count() for router in routers}
    found = {}
    for number, variant in enumerate(variants):
        router = variant["router"]
        nth = next(numbers[router])
        marker, style = MARKERS[nth % len(MARKERS)], STYLES[nth % len(STYLES)]
        found[variant["name"]] = Mark(colours[router], marker, 8.5 if marker in "PX*" else 6.5, style, number)
    return found


def legible(colour: str, dark: bool) -> tuple[float, ...]:
    """The colour, so near to the ink that letters in it can be read."""
    from matplotlib.colors import to_rgb

    return tuple(0.6 * np.array(to_rgb(colour)) + 0.4 * np.array(to_rgb(INK[dark])))


def label_ends(axis: Any, ends: Sequence[tuple[float, str, Mark]], dark: bool) -> None:
    """Names (height, name, mark) of curves in a column to the right, as near to their ends as there is room.

    The axes must have their limits and size.
    """
    ends = sorted(ends, key=lambda end: end[:2])
    gap = LETTERS * LINE / (axis.get_window_extent().height / axis.figure.dpi * 72)
    heights = np.array([axis.transLimits.transform((0, height))[1] for height, _, _ in ends])
    for (_, name, mark), height, place in zip(ends, heights, spread_apart(heights, gap), strict=True):
        how: dict[str, Any] = {"transform": axis.transAxes, "color": mark.colour, "clip_on": False}
        axis.plot([1.0, 1.035], [height, place], linewidth=0.8, **how)
        axis.plot(1.045, place, mark.marker, markersize=0.75 * mark.size, markeredgewidth=0, **how)
        axis.text(1.065, place, name, transform=axis.transAxes, color=legible(mark.colour, dark), **LETTERED)


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


Box = tuple[float, float, float, float]  # left, bottom, right, top


def label_points(
    axis: Any, points: Sequence[tuple[float, float, str, str]], dark: bool, obstacles: Sequence[Box] = ()
) -> None:
    """Names (x, y, name, colour) beside points, on no other name and no other point, tied to theirs if they are away.

    The axes must have their limits and size; `obstacles` are in the data's units.
    """
    pixel = axis.figure.dpi / 72
    at_P2 = axis.transData.transform([(x, y) for x, y, _, _ in points])
    corners = axis.transData.transform(np.reshape(np.array(obstacles, float), (-1, 2))).reshape(-1, 4)
    around = np.array([-1, -1, 1, 1]) * pixel
    taken = [*(np.tile(at_P2, 2) + 4 * around), *(corners + 1.5 * around)]
    neighbours = [np.sum(np.hypot(*(at_P2 - at).T) < 30 * pixel) for at in at_P2]
    for i in np.argsort(neighbours, kind="stable")[::-1]:  # where it is crowded there is least choice
        x, y, name, colour = points[i]
        how = {"va": "bottom", "fontsize": LETTERS, "color": legible(colour, dark)}
        text = axis.annotate(name, (x, y), (0, 0), textcoords="offset points", **how)
        size = text.get_window_extent()
        boxes, distance = _places(at_P2[i], np.array([size.width, size.height]), pixel)
        best = np.argmin(distance + _dislike(boxes, np.array(taken), axis.get_window_extent().extents, pixel))
        box = boxes[best]
        text.set_position(tuple((box[:2] - at_P2[i]) / pixel))
        taken.append(box)
        nearest = np.clip(at_P2[i], box[:2], box[2:])
        if np.hypot(*(nearest - at_P2[i])) > 15 * pixel:
            ends = axis.transData.inverted().transform([at_P2[i], nearest])
            axis.plot(*ends.T, color=colour, linewidth=0.7, alpha=0.8, zorder=1.5)


def _places(at: np.ndarray, size: np.ndarray, pixel: float) -> tuple[np.ndarray, np.ndarray]:
    """Boxes of a size on rings around a point, and how far they are from the best one, to the right; in points."""
    radius, angle = (each.ravel() for each in np.meshgrid((7, 13, 20, 30, 42, 56, 72), np.arange(24) * np.pi / 12))
    cos, sin = np.cos(angle), np.sin(angle)
    beside = np.abs(cos) > 0.3
    left = np.where(beside, cos < 0, 0.5)  # share of the box that is left of its place on the ring …
    below = np.where(beside, 0.5, sin < 0)  # … and below it
    corner = at + pixel * radius[:, None] * np.stack([cos, sin], -1) - np.stack([left, below], -1) * size
    return np.concatenate([corner, corner + size], -1), radius + 3 * (1 - cos) + 2 * np.abs(sin)


def _dislike(boxes: np.ndarray, taken: np.ndarray, axes: np.ndarray, pixel: float) -> np.ndarray:
    """Of places for a name that cover something or leave the axes, as of so many points of distance."""
    ends = np.minimum(boxes[:, None, 2:], taken[None, :, 2:]) - np.maximum(boxes[:, None, :2], taken[None, :, :2])
    covered = np.maximum(ends, 0).prod(-1)
    outside = np.maximum(axes[:2] - boxes[:, :2], boxes[:, 2:] - axes[2:]).clip(0).sum(-1)
    return 12 * (covered > 0).sum(-1) + covered.sum(-1) / pixel**2 + 50 * outside / pixel
