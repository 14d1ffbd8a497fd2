"""Pictures of single images: which patches took many experts, at several noise levels."""

# M images, T noise levels, L layers, S patches of an image, H height, W width, C channels

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dit_moe.analysis.axes import (
    bare,
    colour_bar,
    from_to,
)
from dit_moe.analysis.choose import some_layers
from dit_moe.analysis.draw_active import LEAST
from dit_moe.analysis.stats import Examples
from dit_moe.plotting import SEQUENTIAL, WIDTH, canvas, styled

OPACITY = 0.78  # of a map over an image
LEVELS = 6  # columns that a phone can show
LAYERS = 8


def levels_shown(examples: Examples) -> list[int]:
    """Indices of the noise levels that are drawn: at most `LEVELS`, from the noisiest on, as sampling goes."""
    order = np.argsort(-examples.times_T, kind="stable")
    return [int(order[index]) for index in some_layers(len(order), LEVELS)]


@styled
def draw_images(examples: Examples, images: Sequence[int], *, dark: bool = False) -> Any:
    """What the network saw of some images, and the mean active experts of each patch over the decoded image.

    All images have one scale of colours, also those left to another picture.
    """
    from matplotlib.cm import ScalarMappable

    levels = levels_shown(examples)
    maps_MTS = examples.active_MTLS[:, levels].mean(2)
    norm = from_to(maps_MTS, LEAST)
    cell = WIDTH / (len(levels) + 0.35)
    figure, axes = canvas(2 * len(images), len(levels), height=0.75 + len(images) * (2 * cell + 0.04))
    for place, image in enumerate(images):
        for column, level in enumerate(levels):
            seen, over = axes[2 * place, column], axes[2 * place + 1, column]
            _show(seen, examples.noisy_MTHWC[image, level])
            _show(over, _map_over(examples.images_MHWC[image], maps_MTS[image, column], norm))
            if place == 0:
                seen.set_title(f"t = {examples.times_T[level]:.2f}")
            if column == 0:
                seen.set_ylabel(f"{_short(examples.classes_M[image])}\nseen")
                over.set_ylabel("experts")
    colour_bar(figure, ScalarMappable(norm, _tints()), axes, "Active experts of the patch, mean of layers", maps_MTS)
    return figure


@styled
def draw_image_by_layer(examples: Examples, image: int, layers: Sequence[int], *, dark: bool = False) -> Any:
    """The active experts of one image's patches, a row for each layer and a column for each noise level."""
    levels, rows = levels_shown(examples), some_layers(len(layers), LAYERS)
    maps_TLS = examples.active_MTLS[image][np.ix_(levels, rows)]
    norm = from_to(maps_TLS, LEAST)
    side = round(maps_TLS.shape[2] ** 0.5)
    cell = WIDTH / (len(levels) + 0.35)
    figure, axes = canvas(len(rows), len(levels), height=0.8 + len(rows) * (cell + 0.02))
    for row, layer in enumerate(rows):
        for column, level in enumerate(levels):
            axis = axes[row, column]
            shown = axis.imshow(maps_TLS[column, row].reshape(side, side), cmap=SEQUENTIAL, norm=norm)
            _clear(axis)
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


def _show(axis: Any, image_HWC: np.ndarray) -> None:
    if image_HWC.shape[-1] == 1:
        image_HWC = image_HWC.repeat(3, axis=-1)
    axis.imshow(image_HWC, interpolation="nearest")
    _clear(axis)


def _clear(axis: Any) -> None:
    bare(axis)
    axis.set(xticks=[], yticks=[])


def _short(name: str) -> str:
    return name if len(name) <= 10 else name[:9].rstrip() + "…"
