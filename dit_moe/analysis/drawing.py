"""What the figures of routing share: their description, labels that fit, coloured matrices and their scales."""

# X places along an axis, Y rows

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from dit_moe.formatting import rounded
from dit_moe.plotting import INK, PAPER, SEQUENTIAL

NOISE = "Noise level t (0: data, 1: noise)"
LEAST = 0.1  # experts; differences below it stay pale
LABEL_LETTERS = 24
UNKNOWN = "#8b9098"  # a cell without a value: grey is on no scale
RATIOS = (1.25, 1.5, 2.0, 4.0, 8.0)  # how far scales around "as often as on average" may reach


@dataclass(frozen=True, kw_only=True)
class ReportFigure:
    """A figure of the report, and what is said about it."""

    name: str  # of its file
    section: str
    title: str
    caption: str  # what to look at, with the numbers
    alt: str  # what kind of figure it is, for those who do not see it
    draw: Callable[..., Any]  # (dark=False) → a figure of matplotlib


# ----------------------------------------------------------------------------------------------------------- captions


def percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{rounded(100 * share, 1)} %"


def images_per_class(images_C: np.ndarray) -> str:
    low, high = int(images_C.min()), int(images_C.max())
    return f"{low} images a class" if low == high else f"{low} to {high} images a class"


def some_layers_drawn(count: int, most: int) -> str:
    return "" if count <= most else f" Drawn: {most} of {count} layers, evenly from the first to the last."


def class_or_token(kind: str, name: str) -> str:
    """A class or a token in a sentence; a token in quotes, as it may be a comma."""
    return f"{kind} “{name}”" if kind == "token" else f"{kind} {name}"


def some_layers(count: int, most: int) -> list[int]:
    """Indices of at most `most` layers, evenly from the first to the last."""
    return list(range(count)) if count <= most else [round(i) for i in np.linspace(0, count - 1, most)]


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
    """A deviation with two digits and a sign; 0 has none: +1.3, −.25, 0."""
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


def scale_around(values: np.ndarray, middle: float, least: float) -> Any:
    """Colours symmetric around `middle`, as far as the values reach, and at least `least`: noise stays pale."""
    from matplotlib.colors import Normalize

    reach = max(least, float(np.abs(values - middle).max()))
    return Normalize(middle - reach, middle + reach)


def scale_over(values: np.ndarray, least: float) -> Any:
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


def draw_matrix(
    axis: Any,
    values_YX: np.ndarray,
    norm: Any,
    colours: str = SEQUENTIAL,
    text_of: Callable[[float], str] | None = None,
) -> Any:
    """A coloured matrix, first row on top; `text_of` writes each number into its cell."""
    from matplotlib import colormaps

    known = colormaps[colours].with_extremes(bad=UNKNOWN)
    image = axis.imshow(values_YX, cmap=known, norm=norm, aspect="auto", interpolation="nearest")
    hide_frame(axis)
    if text_of is not None:
        for (row, column), value in np.ndenumerate(values_YX):
            ink = "#ffffff" if _brightness(image.cmap(norm(value))) < 0.45 else "#000000"
            axis.text(column, row, text_of(value), ha="center", va="center", color=ink, fontsize=8)
    return image


def hide_frame(axis: Any) -> None:
    """No grid, no frame, no tick marks."""
    axis.grid(False)
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)


def _brightness(rgba: Sequence[float]) -> float:
    red, green, blue = rgba[:3]
    return 0.299 * red + 0.587 * green + 0.114 * blue


def used_panels(axes: np.ndarray, used: int) -> list[Any]:
    """The first `used` axes of a grid; the others are hidden."""
    flat = list(axes.flat)
    for axis in flat[used:]:
        axis.set_axis_off()
    return flat[:used]


def mark_look(dark: bool) -> dict[str, Any]:
    """The look of a mark that must be seen on any colour."""
    return {"color": PAPER[not dark], "markeredgecolor": INK[not dark], "markeredgewidth": 1.0}
