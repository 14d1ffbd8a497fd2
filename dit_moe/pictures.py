"""The pictures of a run: a grid of samples, the samples one by one, and the curves of training."""

# N images, B images of a batch, C channels, H height, W width

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from dit_moe.files import atomic_folder, write_atomically

MIN_CELL = 64  # pixels; smaller images are enlarged by a whole factor, so that every pixel stays a square
GAP = 2
MOST_ROWS, MOST_COLUMNS = 16, 10
MANY_LAYERS = 8
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


def save_curves(
    log: Sequence[dict[str, Any]], target: float | None, path: Path, evaluations: Sequence[dict[str, Any]] = ()
) -> None:
    """A PNG of loss, and for a model with experts of active experts, threshold and θ per layer, over the steps.

    Below them each number of `evaluations` that has a floor, ``name`` and ``name_floor``.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    layered = [line for line in log if line.get("layers")]
    panels = ["loss"] + (
        ["active", *[name for name in ("p", "theta") if name in layered[-1]["layers"]]] if layered else []
    )
    measured = [name for name in (evaluations[-1] if evaluations else {}) if f"{name}_floor" in evaluations[-1]]
    panels += measured
    figure, axes = plt.subplots(len(panels), 1, figsize=(8, 2.6 * len(panels)), sharex=True, squeeze=False)
    for name, axis in zip(panels, axes[:, 0], strict=True):
        if name == "loss":
            _draw_loss(axis, log, [line for line in evaluations if "heldout_loss" in line])
        elif name in measured:
            _draw_measured(axis, evaluations, name)
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


def _draw_loss(axis: Any, log: Sequence[dict[str, Any]], heldout: Sequence[dict[str, Any]]) -> None:
    steps, losses = [line["step"] for line in log], np.array([line["loss"] for line in log])
    window = max(1, len(losses) // 40)
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    axis.plot(steps, losses, color="tab:blue", alpha=0.25, lw=0.8, label="logged")
    axis.plot(steps[window - 1 :], smooth, color="tab:blue", lw=1.5, label=f"mean of {window}")
    if heldout:
        measured = [line["step"] for line in heldout], [line["heldout_loss"] for line in heldout]
        axis.plot(*measured, "o-", color="tab:orange", ms=3, lw=1.2, label="held out")
    axis.set_ylabel("loss")
    axis.set_ylim(top=np.quantile(losses, 0.98) * 1.1, bottom=min(0, losses.min()))
    _legend(axis)


def _draw_measured(axis: Any, evaluations: Sequence[dict[str, Any]], name: str) -> None:
    """On a logarithmic scale: the first distances are a hundred times the last."""
    floor = f"{name}_floor"
    lines = [line for line in evaluations if line.get(name) is not None]
    axis.plot([line["step"] for line in lines], [line[name] for line in lines], "o-", color="tab:blue", ms=3, lw=1.2)
    known = [line for line in lines if line.get(floor) is not None]
    axis.plot([line["step"] for line in known], [line[floor] for line in known], "k--", lw=1, label="floor")
    axis.set_yscale("log")
    axis.set_ylabel(name)
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
