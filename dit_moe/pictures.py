"""The two pictures of a run: a grid of samples, and the curves of its training."""

# N images, C channels, H height, W width

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from dit_moe.files import write_atomically

MIN_CELL = 64  # pixels; smaller images are enlarged by a whole factor, so that every pixel stays a square
GAP = 2
MANY_LAYERS = 8


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
    return Image.fromarray(canvas.squeeze(-1) if channels == 1 else canvas)


def by_class(images_NCHW: Tensor, labels_N: Tensor, columns: int = 10, rows: int = 16) -> Tensor:
    """The first `columns` images of each of the first `rows` classes, class after class, for `image_grid`."""
    classes = labels_N.unique()[:rows].tolist()
    columns = min([columns, *[int((labels_N == label).sum()) for label in classes]])
    return images_NCHW[[i for label in classes for i in (labels_N == label).nonzero().flatten()[:columns].tolist()]]


def save_grid(images_NCHW: Tensor, labels_N: Tensor, path: Path) -> None:
    """A PNG with one row of images for each class."""
    chosen = by_class(images_NCHW, labels_N)
    rows = min(16, len(labels_N.unique()))
    save_png(image_grid(chosen, columns=max(1, len(chosen) // rows)), path)


def save_png(image: Image.Image, path: Path) -> None:
    write_atomically(path, lambda file: image.save(file, format="PNG"))


# ------------------------------------------------------------------------------------------------------------ curves


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's log.jsonl."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def save_curves(log: Sequence[dict[str, Any]], target: float | None, path: Path) -> None:
    """A PNG of loss, and for a model with experts of active experts, threshold and θ per layer, over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    layered = [line for line in log if line.get("layers")]
    panels = ["loss"] + (
        ["active", *[name for name in ("p", "theta") if name in layered[-1]["layers"]]] if layered else []
    )
    figure, axes = plt.subplots(len(panels), 1, figsize=(8, 2.6 * len(panels)), sharex=True, squeeze=False)
    for name, axis in zip(panels, axes[:, 0], strict=True):
        if name == "loss":
            _draw_loss(axis, log)
        else:
            _draw_layers(axis, layered, name)
        axis.grid(alpha=0.3)
    if layered:
        axis = axes[1, 0]
        axis.plot([line["step"] for line in layered], [line["active"] for line in layered], "k", lw=1.2, label="mean")
        if target is not None:
            axis.axhline(target, color="tab:red", ls="--", lw=1, label=f"target {target:g}")
        _legend(axis)
    axes[-1, 0].set_xlabel("optimizer step")
    figure.tight_layout()
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110))
    plt.close(figure)


def _draw_loss(axis: Any, log: Sequence[dict[str, Any]]) -> None:
    steps, losses = [line["step"] for line in log], np.array([line["loss"] for line in log])
    window = max(1, len(losses) // 40)
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    axis.plot(steps, losses, color="tab:blue", alpha=0.25, lw=0.8, label="logged")
    axis.plot(steps[window - 1 :], smooth, color="tab:blue", lw=1.5, label=f"mean of {window}")
    axis.set_ylabel("loss")
    axis.set_ylim(top=np.quantile(losses, 0.98) * 1.1, bottom=min(0, losses.min()))
    _legend(axis)


def _legend(axis: Any) -> None:
    """Above the axes, where it hides no curve."""
    axis.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), fontsize=8, ncols=7, frameon=False, borderaxespad=0.1)


_LABELS = {"active": "active experts / token", "p": "threshold p", "theta": "router scale θ"}


def _draw_layers(axis: Any, layered: Sequence[dict[str, Any]], name: str) -> None:
    import matplotlib.pyplot as plt

    steps = [line["step"] for line in layered]
    values_TL = np.array([line["layers"][name] for line in layered])
    if name == "p" and (values_TL == values_TL[:, :1]).all():
        axis.plot(steps, values_TL[:, 0], color="k", lw=1.2, label="all layers")
        _legend(axis)
    else:
        depth = values_TL.shape[1]
        colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, depth))  # dark is shallow; safe for colour-blind eyes
        for layer in range(depth):
            shown = depth <= MANY_LAYERS or layer in (0, depth - 1)
            axis.plot(
                steps, values_TL[:, layer], color=colours[layer], lw=0.9, label=f"layer {layer}" if shown else None
            )
        _legend(axis)
    axis.set_ylabel(_LABELS[name])
