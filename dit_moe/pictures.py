"""Images as PNGs: a grid of some, or a folder with a file for each."""

# N images, B images of a batch, C channels, H height, W width

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from dit_moe.files import atomic_file, atomic_folder
from dit_moe.json_files import read_object

MIN_CELL = 64  # pixels; smaller images are enlarged by a whole factor, so that every pixel stays a square
GAP = 2
MOST_ROWS, MOST_COLUMNS = 16, 10
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
    with atomic_file(path) as file:
        image.save(file, format="PNG")


def _picture(pixels_HWC: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels_HWC.squeeze(-1) if pixels_HWC.shape[-1] == 1 else pixels_HWC)


def foreign_pictures(folder: Path) -> list[str]:
    """What in a folder is none of the samples that `png_folder` put there, all of which its labels.json lists."""
    labels = read_object(folder / LABELS)
    own = {LABELS, *labels} if labels else set()
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
        (unfinished / LABELS).write_text(json.dumps(labels, indent=0) + "\n", encoding="utf-8")
