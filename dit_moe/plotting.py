"""How every chart looks: one style, light and dark, with colours that colour-blind readers can tell apart.

A function that draws takes `dark` and returns a `Figure`, made by `canvas`; `save_figure` or `png_of` renders it.
pyplot is not used, and matplotlib's settings are other ones only while a function draws: any thread may, one at a time.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ParamSpec

import numpy as np

from dit_moe.files import write_atomically

WIDTH = 4.8  # inches: on a phone of 360 pixels letters of 8 points, the smallest here, are 8 pixels high
DPI = 160
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#8C510A")  # Okabe & Ito, and two
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
SEQUENTIAL = "viridis"  # quantities from none to much
DIVERGING = "RdBu_r"  # quantities around a middle, such as the target
INK = {False: "#1c1e21", True: "#e6e6e6"}
PAPER = {False: "#ffffff", True: "#16181c"}
GRID = {False: "#d5d8dc", True: "#3a3f46"}
DASHED = (0, (4, 3))

P = ParamSpec("P")


def rc(dark: bool) -> Any:
    """The settings of matplotlib for the light or the dark style."""
    from cycler import cycler

    ink, paper = INK[dark], PAPER[dark]
    return {
        "font.size": 9,
        "axes.titlesize": 9.5,
        "axes.labelsize": 9,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "legend.fontsize": 8,
        "legend.frameon": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID[dark],
        "grid.linewidth": 0.6,
        "lines.linewidth": 1.5,
        "lines.markersize": 4.5,
        "text.color": ink,
        "axes.edgecolor": ink,
        "axes.labelcolor": ink,
        "xtick.color": ink,
        "ytick.color": ink,
        "axes.facecolor": paper,
        "figure.facecolor": paper,
        "savefig.facecolor": paper,
        "axes.prop_cycle": cycler(color=LINES),
        "image.cmap": SEQUENTIAL,
    }


def _settings(own: Mapping[str, Any]) -> AbstractContextManager[None]:
    """matplotlib's defaults with our `own`: a matplotlibrc of the user's (text by LaTeX, say) has no part in them."""
    from matplotlib import style

    found: AbstractContextManager[None] = style.context(["default", dict(own)])
    return found


def styled(draw: Callable[P, Any]) -> Callable[P, Any]:
    """Decorates a function that draws: everything it makes has the style, `dark` or not."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Any:
        with _settings(rc(bool(kwargs.get("dark", False)))):
            return draw(*args, **kwargs)

    return drawn


def canvas(rows: int = 1, columns: int = 1, *, height: float = 3.2, **how: Any) -> tuple[Any, np.ndarray]:
    """A figure of `WIDTH` × `height` inches and its axes [rows, columns]; call it within a `styled` function."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **how)


def png_of(figure: Any) -> bytes:
    """The rendered figure."""
    file = io.BytesIO()
    with _settings({}):  # of rendering
        figure.savefig(file, format="png", dpi=DPI)
    return file.getvalue()


def save_figure(figure: Any, path: Path) -> None:
    """The rendered figure as a file, whole or not at all."""
    write_atomically(path, png_of(figure))


def labels_above(axis: Any, columns: int | None = None, handles: Sequence[Any] | None = None) -> None:
    """A legend above the axes, where it hides no curve."""
    how: dict[str, Any] = {} if handles is None else {"handles": list(handles)}
    axis.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=columns or 4, borderaxespad=0.2, **how)


def colour_bar(figure: Any, image: Any, axes: Any, label: str, values: np.ndarray | None = None) -> Any:
    """A colour bar above `axes`, where it takes no width; it ends where the values do."""
    bar = figure.colorbar(image, ax=axes, location="top", aspect=40, pad=0.02, label=label)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=2)
    if values is not None and (high := float(values.max())) > (low := float(values.min())):
        bar.ax.set_xlim(max(low, image.norm.vmin), min(high, image.norm.vmax))
    return bar
