"""What the pictures of routing have in common: lines by layer, coloured matrices, their scales, and labels that fit."""

# L layers, X places along an axis, Y rows

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from dit_moe.analysis.stats import Target
from dit_moe.plotting import INK, LINES, MARKERS, PAPER, SEQUENTIAL, labels_above

Written = Callable[[float], str]

FEW_LAYERS = len(LINES)  # so many lines have a colour and a marker each; more have a scale of colours
LABEL_LETTERS = 24
UNKNOWN = "#8b9098"  # a cell without a value: grey is on no scale
RATIOS = (1.25, 1.5, 2.0, 4.0, 8.0)  # how far scales around "as often as on average" may reach


# ----------------------------------------------------------------------------------------------------------- labels


def readable(label: str) -> str:
    """A label that the font can draw, and short: unprintable or unknown letters are written as U+…, the rest cut."""
    shown = "".join(letter if _drawable(letter) else f"U+{ord(letter):04X}" for letter in label)
    return shown if len(shown) <= LABEL_LETTERS else shown[: LABEL_LETTERS - 1].rstrip() + "…"


def _drawable(letter: str) -> bool:
    return letter.isprintable() and ord(letter) in _letters_of_font()


@cache
def _letters_of_font() -> frozenset[int]:
    from matplotlib.font_manager import findfont, get_font

    return frozenset(get_font(findfont("DejaVu Sans")).get_charmap())


def signed(value: float) -> str:
    """A deviation with two digits and a sign, which nothing has not: +1.3, −.25, 0."""
    text = f"{value:+.2f}" if abs(value) < 0.995 else f"{value:+.1f}"
    return "0" if text[1:] == "0.00" else text.replace("-", "−").replace("0.", ".")


def number_ticks(axis: Any, numbers: Sequence[object], most: int = 12) -> None:
    """Ticks at 0, 1, 2, … of an x or y axis (`axes.xaxis`), labelled; evenly thinned out to at most `most`."""
    stride = next(s for s in (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 128, 10**9) if len(numbers) <= s * most)
    axis.set_ticks(range(0, len(numbers), stride), [str(number) for number in numbers[::stride]])


def text_ticks(axis: Any, labels: Sequence[str]) -> None:
    """A tick at 0, 1, 2, … for every label, as it is: dollars start no mathematics."""
    axis.set_ticks(range(len(labels)), [readable(label) for label in labels])
    for label in axis.get_ticklabels():
        label.set_parse_math(False)


# ----------------------------------------------------------------------------------------------------------- scales


def around(values: np.ndarray, middle: float, least: float) -> Any:
    """Colours symmetric around `middle`, as far as the values reach, and at least `least`: noise stays pale."""
    from matplotlib.colors import Normalize

    reach = max(least, float(np.abs(values - middle).max()))
    return Normalize(middle - reach, middle + reach)


def from_to(values: np.ndarray, least: float) -> Any:
    """Colours over the range of the values, widened to at least `least`."""
    from matplotlib.colors import Normalize

    low, high = float(values.min()), float(values.max())
    widen = max(0.0, least - (high - low)) / 2
    return Normalize(low - widen, high + widen)


def log_ratios(ratios: np.ndarray) -> tuple[np.ndarray, Any]:
    """log2 of `ratios`, and colours symmetric around a ratio of 1 that hold 98 % of them; NaN stays NaN."""
    from matplotlib.colors import Normalize

    logs = np.log2(np.clip(ratios, 2.0**-10, 2.0**10))
    known = np.abs(logs[~np.isnan(logs)])
    wanted = 2 ** float(np.quantile(known, 0.98)) if known.size else 1.0
    reach = math.log2(next((bound for bound in RATIOS if wanted <= bound), RATIOS[-1]))
    return np.clip(logs, -reach, reach), Normalize(-reach, reach)


def ratio_ticks(bar: Any, norm: Any) -> None:
    """Label a colour bar of log2 ratios with the ratios themselves."""
    bound = 2**norm.vmax
    inner = [ratio for ratio in (2.0, 4.0) if ratio < bound * 0.99]
    ratios = [*(1 / ratio for ratio in (bound, *reversed(inner))), 1.0, *inner, bound]
    named = {0.125: "⅛×", 0.25: "¼×", 0.5: "½×"}
    labels = [named.get(ratio, f"{ratio:.3g}×") for ratio in ratios]
    labels[0], labels[-1] = "≤ " + labels[0], "≥ " + labels[-1]
    bar.set_ticks([math.log2(ratio) for ratio in ratios], labels=labels)
    bar.ax.minorticks_off()


# --------------------------------------------------------------------------------------------------------- matrices


def matrix(
    axis: Any, values_YX: np.ndarray, norm: Any, colours: str = SEQUENTIAL, written: Written | None = None
) -> Any:
    """A coloured matrix, first row on top; `written` puts each number in its cell, where it can be read."""
    from matplotlib import colormaps

    known = colormaps[colours].with_extremes(bad=UNKNOWN)
    image = axis.imshow(values_YX, cmap=known, norm=norm, aspect="auto", interpolation="nearest")
    bare(axis)
    if written is not None:
        for (row, column), value in np.ndenumerate(values_YX):
            ink = "#ffffff" if _brightness(image.cmap(norm(value))) < 0.45 else "#000000"
            axis.text(column, row, written(value), ha="center", va="center", color=ink, fontsize=8)
    return image


def bare(axis: Any) -> None:
    """No grid, no frame, no tick marks: the cells speak."""
    axis.grid(False)
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)


def colour_bar(figure: Any, image: Any, axes: Any, label: str, values: np.ndarray | None = None) -> Any:
    """A colour bar above `axes`, where it costs no width, which ends where the values do."""
    bar = figure.colorbar(image, ax=axes, location="top", aspect=40, pad=0.02, label=label)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=2)
    if values is not None and (high := float(values.max())) > (low := float(values.min())):
        bar.ax.set_xlim(max(low, image.norm.vmin), min(high, image.norm.vmax))
    return bar


def _brightness(rgba: Sequence[float]) -> float:
    red, green, blue = rgba[:3]
    return 0.299 * red + 0.587 * green + 0.114 * blue


# ------------------------------------------------------------------------------------------------------------ lines


def layer_lines(
    figure: Any,
    axis: Any,
    x_X: np.ndarray,
    values_LX: np.ndarray,
    layers: Sequence[int],
    *,
    dark: bool,
    names: bool = True,
) -> None:
    """A line for each layer: few have a colour and a marker each, many a scale of colours by depth."""
    few = len(layers) <= FEW_LAYERS
    for index, (layer, values_X) in enumerate(zip(layers, values_LX, strict=True)):
        look: dict[str, Any]
        if few:
            every = max(1, len(x_X) // 8)
            look = {"color": LINES[index], "marker": MARKERS[index], "markevery": (index * every // len(layers), every)}
        else:
            look = {"color": depth_colours(len(layers), dark)(index), "linewidth": 1.0}
        axis.plot(x_X, values_X, label=f"layer {layer}" if few else None, **look)
    if names and not few:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize

        scale = ScalarMappable(Normalize(layers[0], layers[-1]), depth_colours(len(layers), dark))
        colour_bar(figure, scale, axis, "Layer").locator = _whole_numbers()


def depth_colours(count: int, dark: bool) -> Any:
    """Colours by depth that are seen on the paper: the ends of the scale too like it are left out."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    low, high = (0.25, 1.0) if dark else (0.0, 0.85)
    return ListedColormap(colormaps[SEQUENTIAL](np.linspace(low, high, count)))


def mean_and_target(axis: Any, x_X: np.ndarray, mean_X: np.ndarray, target: Target, *, dark: bool) -> None:
    """The mean over layers as a thick line in ink, and the target as a dashed one."""
    axis.plot(x_X, mean_X, color=INK[dark], linewidth=2.4, label="mean of layers", zorder=4)
    axis.axhline(target.mean, color=INK[dark], linewidth=1.0, linestyle=(0, (4, 3)), label=str(target), zorder=1.5)


def name_lines(axis: Any, layers: Sequence[int]) -> None:
    """A legend: above the axes, or within them where a colour bar of layers is above."""
    if len(layers) <= FEW_LAYERS:
        labels_above(axis, 3 if len(layers) <= 4 else 4)
    else:
        axis.legend(loc="best", ncols=2)


def _whole_numbers() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(integer=True)


def small_panels(axes: np.ndarray, used: int) -> list[Any]:
    """The first `used` axes of a grid; the others vanish."""
    flat = list(axes.flat)
    for axis in flat[used:]:
        axis.set_axis_off()
    return flat[:used]


def halo(dark: bool) -> dict[str, Any]:
    """The look of a mark that must be seen on any colour."""
    return {"color": PAPER[not dark], "markeredgecolor": INK[not dark], "markeredgewidth": 1.0}
