"""Images as PNGs: a grid of some, or a folder with a file for each."""

# N images, B images of a batch, C channels, H height, W width

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dit_moe.files import atomic_file, atomic_folder
from dit_moe.formatting import one_line
from dit_moe.json_files import read_object

MIN_CELL = 64  # pixels; smaller images are enlarged by a whole factor, so that every pixel stays a square
GAP = 2
MOST_ROWS, MOST_COLUMNS = 16, 10
ALL_SHOWN = 100  # images
LETTER = 13  # pixels: the smallest size of captions
WIDEST = 2.5  # cells: longer captions are cut
LABELS, CLASSES = "labels.json", "classes"  # the file of labels, and its key for the names of the classes
_OWN_FILE = re.compile(r"\d{6,}\.png|labels\.json")


def image_grid(images_NCHW: Tensor, columns: int, captions: Sequence[str] = ()) -> Image.Image:
    """uint8 images row by row, `columns` in a row, on white; one channel is grey, three are RGB.

    Args:
        captions: one for each row, to its left, or one for each image, beneath it.

    Raises ValueError for other channel counts.
    """
    count, channels, height, width = images_NCHW.shape
    if channels not in (1, 3):
        raise ValueError(f"a picture needs 1 or 3 channels, these images have {channels}")
    factor = max(1, -(-MIN_CELL // max(height, width)))
    cells = images_NCHW.permute(0, 2, 3, 1).cpu().numpy().repeat(factor, 1).repeat(factor, 2)
    height, width, rows = height * factor, width * factor, -(-count // columns)
    font, texts = _font(height), [one_line(caption) for caption in captions]
    texts = [_cut(text, font, int(WIDEST * width)) for text in texts]
    needed, of_rows = max((math.ceil(font.getlength(text)) for text in texts), default=0), len(texts) == rows
    left = needed + 4 * GAP if texts and of_rows else 0
    below = 2 * GAP + sum(font.getmetrics()) if texts and not of_rows else 0
    box = max(width, needed if below else 0)
    step_y, step_x = height + below + GAP, box + GAP
    size = (left + columns * step_x + GAP, rows * step_y + GAP)
    canvas = Image.new("L" if channels == 1 else "RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for i, cell in enumerate(cells):
        x, y = left + GAP + i % columns * step_x, GAP + i // columns * step_y
        canvas.paste(picture(cell), (x + (box - width) // 2, y))
        if below and i < len(texts):
            draw.text((x + box // 2, y + height + GAP), texts[i], "black", font, anchor="ma")
    for row, text in enumerate(texts if left else ()):
        draw.text((left - 2 * GAP, GAP + row * step_y + height // 2), text, "black", font, anchor="rm")
    return canvas


def _font(height: int) -> ImageFont.FreeTypeFont:
    """For captions of cells of this height: matplotlib's, which has more alphabets than Pillow's own."""
    from matplotlib import get_data_path  # late: it takes long to import

    return ImageFont.truetype(str(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), max(LETTER, height // 10))


def _cut(text: str, font: ImageFont.FreeTypeFont, most: int) -> str:
    """`text`, or as much of its beginning as is at most so many pixels wide."""
    end = len(text)
    while (cut := text if end == len(text) else f"{text[:end].rstrip()}…") and end and font.getlength(cut) > most:
        end -= 1
    return cut


def grid_layout(labels_N: Tensor) -> tuple[list[int], int]:
    """Which images a grid shows, and how many in a row: one row for each of the first classes.

    Where a class has but one image there are no rows to make, and the first images stand in their own order. Up to
    `ALL_SHOWN` images are all shown, class by class, be the rows of one class or not, and so many of a single class.
    """
    classes = labels_N.unique()[:MOST_ROWS].tolist()
    columns = min([MOST_COLUMNS, *[int((labels_N == label).sum()) for label in classes]])
    if columns == 1:
        return list(range(min(len(labels_N), MOST_ROWS * MOST_COLUMNS))), min(len(labels_N), MOST_COLUMNS)
    in_rows = columns * len(classes)
    if in_rows < min(len(labels_N), ALL_SHOWN) and (len(labels_N) <= ALL_SHOWN or len(classes) == 1):
        return labels_N.argsort(stable=True)[:ALL_SHOWN].tolist(), min(len(labels_N), MOST_COLUMNS)
    return [i for label in classes for i in (labels_N == label).nonzero().flatten()[:columns].tolist()], columns


def class_captions(labels_N: Tensor, columns: int, names: Sequence[str]) -> list[str]:
    """For a grid of images with these labels: the class of each row or, where a row has several, of each image."""
    rows = [row.unique().tolist() for row in labels_N.split(columns)]
    shown = [row[0] for row in rows] if all(len(row) == 1 for row in rows) else labels_N.tolist()
    return [names[label] for label in shown]


def save_grid(images_NCHW: Tensor, labels_N: Tensor, path: Path, names: Sequence[str]) -> None:
    """A PNG of `grid_layout` with the `names` of the classes, in the order of their labels.

    Args:
        images_NCHW: the images that `grid_layout` shows, in that order.
    """
    shown, columns = grid_layout(labels_N)
    save_png(image_grid(images_NCHW, columns, class_captions(labels_N[shown], columns, names)), path)


def save_png(image: Image.Image, path: Path) -> None:
    with atomic_file(path) as file:
        image.save(file, format="PNG")


def picture(pixels_HWC: np.ndarray) -> Image.Image:
    """Of uint8 pixels: one channel is grey, three are RGB."""
    return Image.fromarray(pixels_HWC.squeeze(-1) if pixels_HWC.shape[-1] == 1 else pixels_HWC)


def foreign_pictures(folder: Path) -> list[str]:
    """What in a folder is none of the samples that `png_folder` put there, all of which its labels.json lists."""
    labels = read_object(folder / LABELS)
    own = {LABELS, *labels} if labels else set()
    return sorted(name for name in os.listdir(folder) if name not in own or not _OWN_FILE.fullmatch(name))


@contextmanager
def png_folder(
    folder: Path, labels_N: Tensor, class_names: Sequence[str] | None = None
) -> Iterator[Callable[[Tensor], None]]:
    """Yields ``add(images_BCHW)``, which saves uint8 images as 000000.png, 000001.png, …; labels.json has their labels.

    When the block ends they take the place of `folder` as a whole, so that the pictures of two runs are never mixed; an
    exception in the block leaves what `folder` was before. ValueError if it holds anything but such pictures.

    Args:
        class_names: of the labels 0, 1, …, which labels.json then has, too, under "classes".
    """
    names = [f"{i:06d}.png" for i in range(len(labels_N))]
    waiting = iter(names)
    with (
        atomic_folder(folder, foreign_pictures) as unfinished,
        ThreadPoolExecutor() as pool,  # compressing a picture takes longer than any step of a sampler
    ):

        def add(images_BCHW: Tensor) -> None:
            pictures = map(picture, images_BCHW.permute(0, 2, 3, 1).numpy())
            files = [unfinished / next(waiting) for _ in images_BCHW]
            list(pool.map(Image.Image.save, pictures, files))

        yield add
        missing = len(list(waiting))
        if missing:
            raise ValueError(f"{folder}: {len(names) - missing} of {len(names)} images; the rest was never made")
        labels = dict(zip(names, labels_N.tolist(), strict=True))
        labels |= {} if class_names is None else {CLASSES: list(class_names)}
        (unfinished / LABELS).write_text(json.dumps(labels, indent=0) + "\n", encoding="utf-8")
