"""The curves of a run's log: loss, rates and gradients over training, and its routers with a line for each layer."""

# L MoE layers, U logged steps, X points

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dit_moe.plotting import (
    DASHED,
    INK,
    LINES,
    MARKERS,
    SEQUENTIAL,
    canvas,
    colour_bar,
    labels_above,
    styled,
)

ACTIVE, THETA = "Active experts per token", "Scale of the logits θ"
FEW_LAYERS = len(LINES)  # so many lines have a colour and a marker each; more have a scale of colours
LOGGED = {  # numbers of a log's lines that have a panel of their own
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
    "images_per_s": "Images per second",
    "tokens_per_s": "Tokens per second",
}
TALL, LOW = 2.15, 1.35  # inches of a panel with a legend, and of one without


@dataclass(frozen=True, kw_only=True)
class RouterCurves:
    """The routers over training."""

    step_U: np.ndarray
    active_U: np.ndarray  # mean of the layers
    active_LU: np.ndarray
    p_LU: np.ndarray | None = None  # None: the routers have no controlled threshold
    theta_LU: np.ndarray | None = None  # None: no dynamic routing normalization


def router_curves(log: Sequence[Mapping[str, Any]], step: int | None = None) -> RouterCurves | None:
    """From the lines of a run's log, those up to `step`; None if there are no such lines or the model is dense."""
    lines = [line for line in log if line.get("layers") and (step is None or line["step"] <= step)]
    if not lines:
        return None

    every = set.intersection(*(set(line["layers"]) for line in lines))
    if "active" not in every or any(line.get("active") is None for line in lines):
        return None

    def by_layer(name: str) -> np.ndarray | None:
        return np.array([line["layers"][name] for line in lines]).T if name in every else None

    return RouterCurves(
        step_U=np.array([line["step"] for line in lines]),
        active_U=np.array([line["active"] for line in lines]),
        active_LU=np.array([line["layers"]["active"] for line in lines]).T,
        p_LU=by_layer("p"),
        theta_LU=by_layer("theta"),
    )


@styled
def draw_training(
    routers: RouterCurves | None,
    layers: Sequence[int],
    target: tuple[float, str] | None,
    log: Sequence[Mapping[str, Any]] = (),
    evaluations: Sequence[Mapping[str, Any]] = (),
    *,
    dark: bool = False,
) -> Any:
    """Over the steps, one above another: loss, distances to the data, active experts, threshold p, scale θ, `LOGGED`.

    Args:
        routers: None leaves out what is about them.
        target: mean active experts, and what to call it.
        log: lines with the loss and what else is `LOGGED`; none leaves these out.
        evaluations: lines that may have a held-out loss; a number ``name`` is drawn if it has a ``name_floor``.
    """
    measured = measured_in(evaluations)
    curves = (
        {} if routers is None else {ACTIVE: routers.active_LU, "Threshold p": routers.p_LU, THETA: routers.theta_LU}
    )
    by_layer = {label: values_LU for label, values_LU in curves.items() if values_LU is not None}
    logged = {label: name for name, label in LOGGED.items() if log and all(name in line for line in log)}
    figure, panels = stacked(["Loss"] * bool(log) + [*measured, *by_layer], list(logged))
    if log:
        _draw_loss(panels["Loss"], log, evaluations)
    for label, name in logged.items():
        if name == "lr":
            panels[label].plot([line["step"] for line in log], [line[name] for line in log])
        else:
            _draw_noisy(panels[label], log, name)
    if routers is not None:
        step_U, mean_U, *means = _means([routers.step_U, routers.active_U, *by_layer.values()])
        for label, values_LU in zip(by_layer, means, strict=True):
            axis = panels[label]
            if len(layers) > 1 and bool(np.all(np.ptp(values_LU, axis=0) < 1e-9)):
                if label != ACTIVE:  # whose mean is drawn below
                    line_of_means(axis, step_U, values_LU[0], dark=dark, label="all layers")
            else:
                layer_lines(figure, axis, step_U, values_LU, layers, dark=dark, depth_bar=label == ACTIVE)
            if label == ACTIVE:
                mean_and_target(axis, step_U, mean_U, layers, target, dark=dark)
            elif axis.get_legend_handles_labels()[1] == ["all layers"]:
                axis.legend(loc="best")
    for name in measured:
        _draw_measured(panels[name], evaluations, name, dark=dark)
    return figure


def measured_in(evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    """The distances among the numbers of the evaluations: those that have a floor."""
    return [name for name in (evaluations[-1] if evaluations else {}) if f"{name}_floor" in evaluations[-1]]


def stacked(labels: Sequence[str], low: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    """A figure of panels over the training steps, one above another, and its axes by label; the last are `low`."""
    inches = [TALL] * len(labels) + [LOW] * len(low)
    figure, axes = canvas(len(inches), 1, height=0.7 + sum(inches), sharex=True, height_ratios=inches)
    panels = dict(zip([*labels, *low], axes[:, 0], strict=True))
    for label, axis in panels.items():
        axis.set(ylabel=label)
    axes[-1, 0].set(xlabel="Training step")
    figure.align_ylabels()
    return figure, panels


def _means(curves: Sequence[np.ndarray], most: int = 240) -> list[np.ndarray]:
    """Curves over the same steps [..., U] as means over so many steps that at most `most` points are left."""
    length = -(-curves[0].shape[-1] // most)
    starts = np.arange(0, curves[0].shape[-1], length)
    counts = np.diff([*starts, curves[0].shape[-1]])
    return [np.add.reduceat(curve, starts, axis=-1) / counts for curve in curves]


def smoothed(log: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray, int]:
    """The mean of a number over a fortieth of the lines, at the step of the last of these; and how many they are."""
    steps, values = np.array([line["step"] for line in log]), np.array([line[name] for line in log])
    window = max(1, len(values) // 40)
    return steps[window - 1 :], np.convolve(values, np.ones(window) / window, mode="valid"), window


def _draw_noisy(axis: Any, log: Sequence[Mapping[str, Any]], name: str) -> None:
    """A number of the log; of many lines faintly, with its mean, and without the highest, those of the start."""
    values = np.array([line[name] for line in log])
    steps, means, window = smoothed(log, name)
    if window == 1:
        axis.plot(steps, means, label="each logged step")
    else:
        axis.plot(
            [line["step"] for line in log], values, color=LINES[0], alpha=0.25, linewidth=0.8, label="each logged step"
        )
        axis.plot(steps, means, color=LINES[0], label=f"mean of {window}")
        axis.set_ylim(top=np.quantile(values, 0.98) * 1.1 or None)
    axis.set_ylim(bottom=min(0, values.min()))


def _draw_loss(axis: Any, log: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]) -> None:
    _draw_noisy(axis, log, "loss")
    heldout = [(line["step"], line["heldout_loss"]) for line in evaluations if "heldout_loss" in line]
    if heldout:
        axis.plot(*zip(*heldout, strict=True), color=LINES[1], marker="o", markersize=3, label="held out")
    labels_above(axis)


def _draw_measured(axis: Any, evaluations: Sequence[Mapping[str, Any]], name: str, *, dark: bool) -> None:
    """On a logarithmic scale: the first distances are a hundred times the last."""
    floor = f"{name}_floor"
    lines = [line for line in evaluations if line.get(name) is not None]
    axis.plot([line["step"] for line in lines], [line[name] for line in lines], marker="o", markersize=3, label=name)
    known = [line for line in lines if line.get(floor) is not None]
    steps, floors = [line["step"] for line in known], [line[floor] for line in known]
    axis.plot(steps, floors, color=INK[dark], linewidth=1.0, linestyle=DASHED, label="floor")
    axis.set_yscale("log")
    labels_above(axis)


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


def line_of_means(axis: Any, x_X: np.ndarray, mean_X: np.ndarray, *, dark: bool, label: str = "mean of layers") -> None:
    """A thick line in ink, over those of the layers."""
    axis.plot(x_X, mean_X, color=INK[dark], linewidth=2.4, label=label, zorder=4)


def mean_and_target(
    axis: Any,
    x_X: np.ndarray,
    mean_X: np.ndarray,
    layers: Sequence[int],
    target: tuple[float, str] | None,
    *,
    dark: bool,
) -> None:
    """A line of the mean over layers, a dashed one at the target, and the legend of both and of the layers."""
    line_of_means(axis, x_X, mean_X, dark=dark)
    if target is not None:
        mean, label = target
        axis.axhline(mean, color=INK[dark], linewidth=1.0, linestyle=DASHED, label=label, zorder=1.5)
    if len(layers) <= FEW_LAYERS:
        labels_above(axis, 3 if len(layers) <= 4 else 4)
    else:  # a colour bar of layers is above
        axis.legend(loc="best", ncols=2)
