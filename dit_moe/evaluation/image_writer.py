"""Writing `images.npz`, all at once or as the images come: a set of any size then takes the memory of one batch."""

# N images of the set, B images of a batch, H height, W width, C channels

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from dit_moe.evaluation.images import require_images, require_labels
from dit_moe.files import atomic_file

NPY_HEADER = 1024  # bytes before the numbers of an npy file; those of plain arrays are 128


def write_images(path: str | Path, images_NHWC: np.ndarray, labels_N: np.ndarray | None = None) -> None:
    """Write an uncompressed npz that `open_npz` and ADM's evaluator read; complete or not at all."""
    require_images(images_NHWC, str(path))
    with image_writer(path, len(images_NHWC), labels_N) as add:
        add(images_NHWC)


@contextmanager
def image_writer(
    path: str | Path, count: int, labels_N: np.ndarray | None = None
) -> Iterator[Callable[[np.ndarray], None]]:
    """Yields ``add(images_BHWC)``, to be called until `count` images are in; the file is in place when the block ends.

    An exception in the block, from wherever, leaves what `path` was before. ``add`` raises ValueError for anything but
    uint8 images of 1 or 3 channels, for images of another size, and for one too many; so does the end for one too few.
    """
    require_labels(labels_N, count, str(path))
    with atomic_file(Path(path)) as file, zipfile.ZipFile(file, "w") as archive:
        with ExitStack() as entry:
            array = _Array(lambda size: entry.enter_context(_open_entry(archive, "arr_0.npy", size)), count, str(path))
            yield array.add
            array.require_complete()
        if labels_N is not None:
            with _open_entry(archive, "labels.npy", labels_N.nbytes + NPY_HEADER) as labels:
                np.lib.format.write_array(labels, labels_N)


def _open_entry(archive: zipfile.ZipFile, name: str, most: int) -> IO[bytes]:
    """An entry to write up to `most` bytes into.

    Beyond 2 GiB it needs zip64, which is decided here by its size: Python before 3.11.4 writes entries with
    ``force_zip64`` that say they need no zip64 and yet have its fields, which some readers refuse.
    """
    entry = zipfile.ZipInfo(name)
    entry.file_size = most if most > zipfile.ZIP64_LIMIT else 0
    return archive.open(entry, "w")


class _Array:
    """An npy file of `count` images, written in order; the first ones decide what the header says of their size."""

    file: IO[bytes]

    def __init__(self, open_file: Callable[[int], IO[bytes]], count: int, source: str) -> None:
        self.open_file, self.count, self.source = open_file, count, source
        self.written, self.image_shape = 0, ()

    def add(self, images_BHWC: np.ndarray) -> None:
        require_images(images_BHWC, self.source)
        if not self.written:
            self.image_shape = images_BHWC.shape[1:]
            header = {"descr": "|u1", "fortran_order": False, "shape": (self.count, *self.image_shape)}
            self.file = self.open_file(self.count * images_BHWC[0].nbytes + NPY_HEADER)
            np.lib.format.write_array_header_1_0(self.file, header)
        if images_BHWC.shape[1:] != self.image_shape:
            raise ValueError(f"{self.source}: images of {images_BHWC.shape[1:]} follow such of {self.image_shape}")
        self.written += len(images_BHWC)
        if self.written > self.count:
            raise ValueError(f"{self.source}: more than the {self.count} images that it was to hold")
        self.file.write(np.ascontiguousarray(images_BHWC).data)

    def require_complete(self) -> None:
        if self.written < self.count:
            raise ValueError(f"{self.source}: {self.written} of {self.count} images; the rest was never made")
