"""The pictures of a run: a grid of samples, the samples one by one, and the curves of training."""

# N images, B images of a batch, C channels, H height, W width

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from dit_moe.files import atomic_folder, write_atomically
from dit_moe.plotting import (
    DASHED,
    INK,
    LINES,
    canvas,
    labels_above,
    layer_legend,
    layer_lines,
    line_at_target,
    line_of_means,
    save_figure,
    styled,
)

MIN_CELL = 64  # pixels; smaller images are enlarged by a whole factor, so that every pixel stays a square
GAP = 2
MOST_ROWS, MOST_COLUMNS = 16, 10
ACTIVE, THETA = "Active experts per token", "Scale of the logits θ"
LABELS = "labels.json"
_OWN_FILE = re.compile(r"\d{6,}\.png|labels\.json")


def image_grid(images_NCHW: Tensor, columns: int) -> Image.Image:
    """uint8 images row by row, `columns` in a row, on white; one channel is grey, three are RGB.

    Raises ValueError for other channel counts.
    """
    count, channels, height, width = images_NCHW.shape
    if channels not in (1, 3):
        raise ValueError(f"a picture needs 1 or 3 channels, these images have {channels}")
    factor = max(1, -(-MIN_CELL // max(height, width)))
    cells = images_NCHW.permute(0, 2, 3, 1).cpu().numpy().repeat(factor, 1).repeat(factor, 2)
    rows = -(-count // columns)
    step_y, step_x = cells.shape[1] + GAP, cells.shape[2] + GAP
    canvas = np.full((rows * step_y + GAP, columns * step_x + GAP, channels), 255, np.uint8)
    for i, cell in enumerate(cells):
        y, x = GAP + i // columns * step_y, GAP + i % columns * step_x
        canvas[y : y + cell.shape[0], x : x + cell.shape[1]] = cell
    return _picture(canvas)


def grid_layout(labels_N: Tensor) -> tuple[list[int], int]:
    """Which images a grid shows, and how many in a row: one row for each of the first classes.

    Where a class has but one image there are no rows to make, and the first images stand in their own order.
    """
    classes = labels_N.unique()[:MOST_ROWS].tolist()
    columns = min([MOST_COLUMNS, *[int((labels_N == label).sum()) for label in classes]])
    if columns == 1:
        return list(range(min(len(labels_N), MOST_ROWS * MOST_COLUMNS))), min(len(labels_N), MOST_COLUMNS)
    return [i for label in classes for i in (labels_N == label).nonzero().flatten()[:columns].tolist()], columns


def save_grid(images_NCHW: Tensor, labels_N: Tensor, path: Path) -> None:
    """A PNG of `grid_layout`."""
    shown, columns = grid_layout(labels_N)
    save_png(image_grid(images_NCHW[shown], columns), path)


def save_png(image: Image.Image, path: Path) -> None:
    write_atomically(path, lambda file: image.save(file, format="PNG"))


def _picture(pixels_HWC: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels_HWC.squeeze(-1) if pixels_HWC.shape[-1] == 1 else pixels_HWC)


# ------------------------------------------------------------------------------------------------- one file per image


def foreign_pictures(folder: Path) -> list[str]:
    """What in a folder is none of the samples that `png_folder` put there, all of which its labels.json lists."""
    try:
        labels = json.loads((folder / LABELS).read_bytes())
    except (OSError, ValueError):
        labels = None
    own = {LABELS, *labels} if isinstance(labels, dict) else set()
    return sorted(name for name in os.listdir(folder) if name not in own or not _OWN_FILE.fullmatch(name))


@contextmanager
def png_folder(folder: Path, labels_N: Tensor) -> Iterator[Callable[[Tensor], None]]:
    """Yields ``add(images_BCHW)``, which saves uint8 images as 000000.png, 000001.png, …; labels.json has their labels.

    When the block ends they take the place of `folder` as a whole, so that the pictures of two runs are never mixed; an
    exception in the block leaves what `folder` was before. ValueError if it holds anything but such pictures.
    """
    names = [f"{i:06d}.png" for i in range(len(labels_N))]
    waiting = iter(names)
    with (
        atomic_folder(folder, foreign_pictures) as unfinished,
        ThreadPoolExecutor() as pool,  # compressing a picture takes longer than any step of a sampler
    ):

        def add(images_BCHW: Tensor) -> None:
            pictures = map(_picture, images_BCHW.permute(0, 2, 3, 1).numpy())
            files = [unfinished / next(waiting) for _ in images_BCHW]
            list(pool.map(Image.Image.save, pictures, files))

        yield add
        missing = len(list(waiting))
        if missing:
            raise ValueError(f"{folder}: {len(names) - missing} of {len(names)} images; the rest was never made")
        labels = dict(zip(names, labels_N.tolist(), strict=True))
        (unfinished / LABELS).write_text(json.dumps(labels, indent=0) + "\n")


# ------------------------------------------------------------------------------------------------------------ curves


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's log.jsonl or evaluations.jsonl; none where there is no such file.

    ValueError for one that cannot be read.
    """
    found = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else [], start=1):
        try:
            found.append(json.loads(line))
        except ValueError:
            remedy = "take it out, or let the run go on, which puts it aside"
            raise ValueError(f"{path}: line {number} is damaged and cannot be read; {remedy}") from None
    return found


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

    def by_layer(name: str) -> np.ndarray | None:
        return np.array([line["layers"][name] for line in lines]).T if name in lines[0]["layers"] else None

    return RouterCurves(
        step_U=np.array([line["step"] for line in lines]),
        active_U=np.array([line["active"] for line in lines]),
        active_LU=np.array([line["layers"]["active"] for line in lines]).T,
        p_LU=by_layer("p"),
        theta_LU=by_layer("theta"),
    )


def save_curves(
    log: Sequence[dict[str, Any]], target: float | None, path: Path, evaluations: Sequence[dict[str, Any]] = ()
) -> None:
    """A PNG of `draw_training` with the loss; `target` is the number of active experts that the routers are held to."""
    routers = router_curves(log)
    layers = range(0 if routers is None else len(routers.active_LU))
    held_to = None if target is None else (target, f"target {target:g}")
    save_figure(draw_training(routers, layers, held_to, log, evaluations), path)


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
    """Loss, active experts, threshold p, scale θ, and distances to the data over the steps, one above the other.

    Args:
        routers: None leaves out what is about them.
        target: mean active experts, and what to call it.
        log: lines with the loss; none leaves it out.
        evaluations: lines that may have a held-out loss; a number ``name`` is drawn if it has a ``name_floor``.
    """
    measured = [name for name in (evaluations[-1] if evaluations else {}) if f"{name}_floor" in evaluations[-1]]
    curves = (
        {} if routers is None else {ACTIVE: routers.active_LU, "Threshold p": routers.p_LU, THETA: routers.theta_LU}
    )
    by_layer = {label: values_LU for label, values_LU in curves.items() if values_LU is not None}
    labels = ["Loss"] * bool(log) + [*by_layer, *measured]
    figure, axes = canvas(len(labels), 1, height=0.7 + 2.15 * len(labels), sharex=True)
    panels = dict(zip(labels, axes[:, 0], strict=True))
    for label, axis in panels.items():
        axis.set(ylabel=label)
    if log:
        _draw_loss(panels["Loss"], log, evaluations)
    if routers is not None:
        step_U, mean_U, *means = _means([routers.step_U, routers.active_U, *by_layer.values()])
        for label, values_LU in zip(by_layer, means, strict=True):
            axis = panels[label]
            if len(layers) > 1 and bool(np.all(np.ptp(values_LU, axis=0) < 1e-9)):
                line_of_means(axis, step_U, values_LU[0], dark=dark, label="all layers")
            else:
                layer_lines(figure, axis, step_U, values_LU, layers, dark=dark, depth_bar=label == ACTIVE)
            if label == ACTIVE:
                line_of_means(axis, step_U, mean_U, dark=dark)
                if target is not None:
                    line_at_target(axis, *target, dark=dark)
                layer_legend(axis, layers)
            elif axis.get_legend_handles_labels()[1] == ["all layers"]:
                axis.legend(loc="best")
    for name in measured:
        _draw_measured(panels[name], evaluations, name, dark=dark)
    axes[-1, 0].set(xlabel="Training step")
    return figure


def _means(curves: Sequence[np.ndarray], most: int = 240) -> list[np.ndarray]:
    """Curves over the same steps [..., U] as means over so many steps that at most `most` points are left."""
    length = -(-curves[0].shape[-1] // most)
    starts = np.arange(0, curves[0].shape[-1], length)
    counts = np.diff([*starts, curves[0].shape[-1]])
    return [np.add.reduceat(curve, starts, axis=-1) / counts for curve in curves]


def _draw_loss(axis: Any, log: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]) -> None:
    steps, losses = [line["step"] for line in log], np.array([line["loss"] for line in log])
    window = max(1, len(losses) // 40)
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    axis.plot(steps, losses, color=LINES[0], alpha=0.25, linewidth=0.8, label="logged")
    axis.plot(steps[window - 1 :], smooth, color=LINES[0], label=f"mean of {window}")
    heldout = [(line["step"], line["heldout_loss"]) for line in evaluations if "heldout_loss" in line]
    if heldout:
        axis.plot(*zip(*heldout, strict=True), color=LINES[1], marker="o", markersize=3, label="held out")
    axis.set_ylim(top=np.quantile(losses, 0.98) * 1.1, bottom=min(0, losses.min()))
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
