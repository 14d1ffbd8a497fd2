"""The figures of single images: which patches took many experts, at several noise levels."""

# M images, T noise levels, L layers, S patches of an image, H height, W width, C channels

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from dit_moe.analysis.drawing import LEAST, ReportFigure, hide_frame, scale_over, some_layers
from dit_moe.analysis.statistics import Examples, RoutingStats
from dit_moe.plotting import SEQUENTIAL, WIDTH, canvas, colour_bar, styled

IMAGES = 3  # in one figure
OPACITY = 0.78  # of a map over an image
LEVELS = 6  # columns that a phone can show
LAYERS = 8


def image_example_figures(stats: RoutingStats) -> Iterator[ReportFigure]:
    examples = stats.examples
    if examples is None or not len(examples.images_MHWC):
        return
    count, levels = len(examples.images_MHWC), _levels_shown(examples)
    maps_MTS = examples.active_MTLS.mean(2)
    first, last = levels[0], levels[-1]
    for start in range(0, count, IMAGES):
        images = list(range(start, min(start + IMAGES, count)))
        maps = maps_MTS[images]
        yield ReportFigure(
            name="maps" if count <= IMAGES else f"maps_{start // IMAGES + 1}",
            section="Single images",
            title="Experts per patch"
            if count <= IMAGES
            else f"Experts per patch, images {start + 1} to {images[-1] + 1}",
            caption=(
                "Above, what the network saw at each noise level; below, the decoded image tinted by the experts that "
                f"each of its patches took, mean of the layers. At t = {examples.times_T[first]:.2f} patches take "
                f"between {maps[:, first].min():.2f} and {maps[:, first].max():.2f}, at t = "
                f"{examples.times_T[last]:.2f} between {maps[:, last].min():.2f} and {maps[:, last].max():.2f}."
            ),
            alt="Noisy images, and the same images tinted by the active experts of each patch, by noise level.",
            draw=partial(_draw_images, examples, images),
        )
    if len(stats.layers_L) > 1:
        spread_L = examples.active_MTLS[0].max(2).mean(0) - examples.active_MTLS[0].min(2).mean(0)
        widest = int(spread_L.argmax())
        yield ReportFigure(
            name="maps_by_layer",
            section="Single images",
            title=f"The first image, layer by layer (class {examples.classes_M[0]})",
            caption=(
                f"Patches differ the most in layer {stats.layers_L[widest]}: by {spread_L[widest]:.1f} experts from "
                "the cheapest to the most expensive patch, on average over the noise levels."
            ),
            alt="Maps of the active experts of each patch, a row for each layer and a column for each noise level.",
            draw=partial(_draw_image_by_layer, examples, 0, stats.layers_L),
        )


def _levels_shown(examples: Examples) -> list[int]:
    """Indices of the noise levels that are drawn: at most `LEVELS`, from the noisiest on, as sampling goes."""
    order = np.argsort(-examples.times_T, kind="stable")
    return [int(order[index]) for index in some_layers(len(order), LEVELS)]


@styled
def _draw_images(examples: Examples, images: Sequence[int], *, dark: bool = False) -> Any:
    """What the network saw of some images, and the mean active experts of each patch over the decoded image.

    All images have one scale of colours, also those left to another picture.
    """
    from matplotlib.cm import ScalarMappable

    levels = _levels_shown(examples)
    maps_MTS = examples.active_MTLS[:, levels].mean(2)
    norm = scale_over(maps_MTS, LEAST)
    cell = WIDTH / (len(levels) + 0.35)
    figure, axes = canvas(2 * len(images), len(levels), height=0.75 + len(images) * (2 * cell + 0.04))
    for place, image in enumerate(images):
        for column, level in enumerate(levels):
            seen, over = axes[2 * place, column], axes[2 * place + 1, column]
            _show_image(seen, examples.noisy_MTHWC[image, level])
            _show_image(over, _map_over(examples.images_MHWC[image], maps_MTS[image, column], norm))
            if place == 0:
                seen.set_title(f"t = {examples.times_T[level]:.2f}")
            if column == 0:
                seen.set_ylabel(f"{_shortened(examples.classes_M[image])}\nseen")
                over.set_ylabel("experts")
    colour_bar(figure, ScalarMappable(norm, _tints()), axes, "Active experts of the patch, mean of layers", maps_MTS)
    return figure


@styled
def _draw_image_by_layer(examples: Examples, image: int, layers: Sequence[int], *, dark: bool = False) -> Any:
    """The active experts of one image's patches, a row for each layer and a column for each noise level."""
    levels, rows = _levels_shown(examples), some_layers(len(layers), LAYERS)
    maps_TLS = examples.active_MTLS[image][np.ix_(levels, rows)]
    norm = scale_over(maps_TLS, LEAST)
    side = round(maps_TLS.shape[2] ** 0.5)
    cell = WIDTH / (len(levels) + 0.35)
    figure, axes = canvas(len(rows), len(levels), height=0.8 + len(rows) * (cell + 0.02))
    for row, layer in enumerate(rows):
        for column, level in enumerate(levels):
            axis = axes[row, column]
            shown = axis.imshow(maps_TLS[column, row].reshape(side, side), cmap=SEQUENTIAL, norm=norm)
            _hide_axes(axis)
            if row == 0:
                axis.set_title(f"t = {examples.times_T[level]:.2f}")
            if column == 0:
                axis.set_ylabel(f"layer {layers[layer]}")
    colour_bar(figure, shown, axes, "Active experts of the patch", maps_TLS)
    return figure


def _map_over(image_HWC: np.ndarray, map_S: np.ndarray, norm: Any) -> np.ndarray:
    """The image in grey, tinted by the map."""
    from matplotlib import colormaps

    height, width = image_HWC.shape[:2]
    side = round(map_S.size**0.5)
    rows, columns = np.arange(height) * side // height, np.arange(width) * side // width
    map_HW = map_S.reshape(side, side)[np.ix_(rows, columns)]
    grey_HW1 = image_HWC.reshape(height, width, -1).mean(2, keepdims=True) / 255
    return OPACITY * colormaps[SEQUENTIAL](norm(map_HW))[..., :3] + (1 - OPACITY) * grey_HW1


def _tints() -> Any:
    """The colours of `_map_over` where the image is of a middle grey, for the colour bar."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    colours = colormaps[SEQUENTIAL](np.linspace(0, 1, 256))[:, :3]
    return ListedColormap(OPACITY * colours + (1 - OPACITY) * 0.5)


def _show_image(axis: Any, image_HWC: np.ndarray) -> None:
    if image_HWC.shape[-1] == 1:
        image_HWC = image_HWC.repeat(3, axis=-1)
    axis.imshow(image_HWC, interpolation="nearest")
    _hide_axes(axis)


def _hide_axes(axis: Any) -> None:
    hide_frame(axis)
    axis.set(xticks=[], yticks=[])


def _shortened(name: str) -> str:
    return name if len(name) <= 10 else name[:9].rstrip() + "…"
