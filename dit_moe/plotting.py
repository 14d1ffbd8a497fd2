"""How every chart looks: one style, light and dark, with colours that colour-blind readers can tell apart.

A function that draws takes `dark` and returns a `Figure`, made by `canvas`; `save_figure` or `png_of` renders it. No
global state of matplotlib is touched, so drawing works in any thread and any program.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Sequence
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
FEW_LAYERS = len(LINES)  # so many lines have a colour and a marker each; more have a scale of colours

P = ParamSpec("P")


def rc(dark: bool) -> Any:
    """The settings of matplotlib for the light or the dark style."""
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
        "axes.prop_cycle": _cycle(),
        "image.cmap": SEQUENTIAL,
    }


def _cycle() -> Any:
    from cycler import cycler

    return cycler(color=LINES)


def styled(draw: Callable[P, Any]) -> Callable[P, Any]:
    """Decorates a function that draws: everything it makes has the style, `dark` or not."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Any:
        import matplotlib

        with matplotlib.rc_context(rc(bool(kwargs.get("dark", False)))):
            return draw(*args, **kwargs)

    return drawn


def canvas(
    rows: int = 1, columns: int = 1, *, width: float = WIDTH, height: float = 3.2, **how: Any
) -> tuple[Any, np.ndarray]:
    """A figure of `width` × `height` inches and its axes [rows, columns]; call it within a `styled` function."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **how)


def png_of(figure: Any) -> bytes:
    """The rendered figure."""
    file = io.BytesIO()
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


# ------------------------------------------------------------------------------------------------ a line for each layer


def layer_lines(
    figure: Any,
    axis: Any,
    x_X: np.ndarray,
    values_LX: np.ndarray,
    layers: Sequence[int],
    *,
    dark: bool,
    depth_bar: bool = True,
) -> None:
    """A line for each layer: few have a colour and a marker each, many a scale of colours by depth."""
    few = len(layers) <= FEW_LAYERS
    for index, (layer, values_X) in enumerate(zip(layers, values_LX, strict=True)):
        look: dict[str, Any]
        if few:
            every = max(1, len(x_X) // 8)
            look = {"color": LINES[index], "marker": MARKERS[index], "markevery": (index * every // len(layers), every)}
        else:
            look = {"color": _depth_colours(len(layers), dark)(index), "linewidth": 1.0}
        axis.plot(x_X, values_X, label=f"layer {layer}" if few else None, **look)
    if depth_bar and not few:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize
        from matplotlib.ticker import MaxNLocator

        scale = ScalarMappable(Normalize(layers[0], layers[-1]), _depth_colours(len(layers), dark))
        colour_bar(figure, scale, axis, "Layer").locator = MaxNLocator(integer=True)


def _depth_colours(count: int, dark: bool) -> Any:
    """Colours by depth that are seen on the paper: the ends of the scale too like it are left out."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    low, high = (0.25, 1.0) if dark else (0.0, 0.85)
    return ListedColormap(colormaps[SEQUENTIAL](np.linspace(low, high, count)))


def line_at_target(axis: Any, mean: float, label: str, *, dark: bool) -> None:
    """A dashed line at the mean that a router is held to."""
    axis.axhline(mean, color=INK[dark], linewidth=1.0, linestyle=DASHED, label=label, zorder=1.5)


def line_of_means(axis: Any, x_X: np.ndarray, mean_X: np.ndarray, *, dark: bool, label: str = "mean of layers") -> None:
    """A thick line in ink, over those of the layers."""
    axis.plot(x_X, mean_X, color=INK[dark], linewidth=2.4, label=label, zorder=4)


def layer_legend(axis: Any, layers: Sequence[int]) -> None:
    """A legend: above the axes, or within them where a colour bar of layers is above."""
    if len(layers) <= FEW_LAYERS:
        labels_above(axis, 3 if len(layers) <= 4 else 4)
    else:
        axis.legend(loc="best", ncols=2)
