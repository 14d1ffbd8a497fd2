"""What sampling can leave in a folder. Every kind takes the images as they come and keeps none that it need not."""

# N images of the run, B images of a batch, C channels, H height, W width

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from dit_moe.data.class_names import readable_names
from dit_moe.data.npz import image_writer
from dit_moe.files import require_own, require_replaceable, require_writable, write_atomically
from dit_moe.json_files import read_object
from dit_moe.pictures import foreign_pictures, grid_layout, png_folder, save_grid

SAMPLE_JSON = "sample.json"  # says how everything beside it was made
ImageWriter = Callable[[Tensor], object]  # called with uint8 images [B, C, H, W]


@contextmanager
def _npz(path: Path, labels_N: Tensor, class_names: Sequence[str] | None) -> Iterator[ImageWriter]:
    with image_writer(path, len(labels_N), labels_N.numpy()) as add:
        yield lambda images_BCHW: add(images_BCHW.permute(0, 2, 3, 1).numpy())


@contextmanager
def _grid(path: Path, labels_N: Tensor, class_names: Sequence[str] | None) -> Iterator[ImageWriter]:
    shown, _ = grid_layout(labels_N)
    wanted, kept = set(shown), dict[int, Tensor]()
    indices = iter(range(len(labels_N)))

    def write(images_BCHW: Tensor) -> None:
        for image, i in zip(images_BCHW, indices, strict=False):
            if i in wanted:
                kept[i] = image.clone()  # a view would keep its whole batch

    yield write
    names = readable_names(class_names, int(labels_N.max()) + 1)
    save_grid(torch.stack([kept[i] for i in shown]), labels_N, path, names)


Output = Callable[[Path, Tensor, Sequence[str] | None], AbstractContextManager[ImageWriter]]
OUTPUTS: dict[str, tuple[str, Output]] = {
    "npz": ("images.npz", _npz),
    "png": ("png", png_folder),
    "grid": ("grid.png", _grid),
}
DEFAULT = ("npz", "grid")


def parse_outputs(text: str) -> tuple[str, ...]:
    """The kinds of output in a text like "npz,grid". ValueError for an unknown one, or none."""
    names = tuple(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in OUTPUTS:
            raise ValueError(f"--save={text}: {name!r} is no kind of output; choose from {', '.join(OUTPUTS)}")
    return names


def require_writable_outputs(out: Path, names: Sequence[str]) -> None:
    """ValueError if these outputs cannot be written into the folder `out`, or would replace what is not ours."""
    require_writable(out)
    require_own_samples(out, (OUTPUTS[name][0] for name in names if name != "png"))
    if "png" in names:
        require_replaceable(out / "png", foreign_pictures)


def require_own_samples(out: Path, files: Iterable[str]) -> None:
    """ValueError if `out` holds a sample.json of other origin, or any of the `files` without one of ours."""
    require_own(out, (SAMPLE_JSON, *files), not {"files", "texts"}.isdisjoint(read_object(out / SAMPLE_JSON)))


@contextmanager
def open_outputs(
    out: Path, names: Sequence[str], labels_N: Tensor, class_names: Sequence[str] | None = None
) -> Iterator[ImageWriter]:
    """Yields ``write(images_BCHW)``, to be called with all images in order; the files are in place when the block ends.

    They replace those of an earlier run only then, and its sample.json lists none, as it would speak of others.

    Args:
        class_names: of the labels 0, 1, …; None: not known.
    """
    with ExitStack() as stack:
        kinds = [OUTPUTS[name] for name in names]
        writers = [stack.enter_context(save(out / file, labels_N, class_names)) for file, save in kinds]

        def write(images_BCHW: Tensor) -> None:
            for each in writers:
                each(images_BCHW)

        yield write
        write_atomically(out / SAMPLE_JSON, json.dumps({"files": []}) + "\n")
