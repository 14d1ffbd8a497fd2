"""An npz file: images as ADM's evaluator and `dit-moe sample` keep them, statistics, or both. Nothing is unpickled.

Images of an uncompressed npz stay in the file and are mapped into memory batch by batch, whatever its size.
"""

# N images, B images of a batch, C channels, H height, W width

from __future__ import annotations

import hashlib
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from dit_moe.data.npz import Rows, extremes, require_images, require_labels, require_shape
from dit_moe.distributed import on_main
from dit_moe.evaluation.sources.base import Opened, ReadOptions, Source, made_by, sha256_of_labels
from dit_moe.evaluation.sources.statistics import NAMES as STATISTICS
from dit_moe.evaluation.sources.statistics import statistics_of

IMAGES, LABELS = "arr_0", ("labels", "arr_1")  # of np.savez(file, images, labels), as ADM has them
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip's entry: magic, and the lengths of what follows it (APPNOTE 4.3.7)
_DAMAGE = (
    *(OSError, EOFError, ValueError, TypeError, KeyError, struct.error, zipfile.BadZipFile, zlib.error),
    *(NotImplementedError, RuntimeError),  # a compression of another kind, a password
)


def open_npz(path: str | Path, options: ReadOptions | None = None) -> Opened:
    """Images (``arr_0``, with ``labels`` or ``arr_1``), statistics (``mu``, ``sigma``), or both.

    Float images become uint8 if `options` gives their range: a value stands for the nearest of 256 levels, the lowest
    and the highest of which are the ends of the range. `options.size` and `channels` are left to `converted`.

    Raises ValueError, beginning with the file: not a readable npz, or what it holds cannot be evaluated.
    """
    file = _Npz(Path(path))
    numbers = {name: file.read(name) for name in STATISTICS if name in file}
    statistics = statistics_of(numbers, str(path)) if {"mu", "sigma"} & numbers.keys() else None
    if IMAGES in file:
        return Opened(NpzSource(file, options or ReadOptions()), statistics)
    if statistics is None:
        wanted = f"save images as {IMAGES}, or statistics as mu and sigma"
        raise ValueError(f"{path} has no array {IMAGES} but {', '.join(file.names) or 'none'}; {wanted}")
    return Opened(statistics=statistics)


class NpzSource(Source):
    """The images of an npz."""

    def __init__(self, file: _Npz, options: ReadOptions) -> None:
        self.file, self.name = file, str(file.path)
        self.images: Rows = file.array(IMAGES)
        self.range: tuple[float, float] | None = None
        if np.issubdtype(self.images.dtype, np.floating):
            self.range = options.value_range
            on_main(self._require_floats)  # reads all of them
        else:
            require_images(self.images, self.name)
        count, height, width, channels = self.images.shape
        self.image_shape = (channels, height, width)
        found = next((file.read(name) for name in LABELS if name in file), None)
        require_labels(found, count, self.name)
        self.labels_N = None if found is None else torch.from_numpy(found.astype(np.int64))

    def __len__(self) -> int:
        return self.images.shape[0]

    def identity(self) -> dict[str, Any]:
        """Raises ValueError if the file's own check sum, which is made in passing, says that it is damaged."""
        identity = {
            "kind": "images",
            "sha256": self._sha256,
            "labels_sha256": sha256_of_labels(self.labels_N),
            "shape": list(self.images.shape),
            "dtype": str(self.images.dtype),
        }
        return identity | ({"range": list(self.range)} if self.range else {})

    def facts(self) -> dict[str, Any]:
        return made_by(self.file.path)

    def batches(self, parts: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        for part in parts:
            found_BHWC = self.images[np.asarray(part, dtype=np.int64)]
            images_BHWC = found_BHWC if self.range is None else np.empty(found_BHWC.shape, np.uint8)
            if self.range is not None:
                for image, found in zip(images_BHWC, found_BHWC, strict=True):
                    image[:] = _levels(found, *self.range)
            yield torch.from_numpy(images_BHWC).permute(0, 3, 1, 2).contiguous()

    @cached_property
    def _sha256(self) -> str:
        return self.file.sha256(IMAGES, self.images)

    def _require_floats(self) -> None:
        """ValueError unless all values are finite and round to one of the levels of the range."""
        problem: str | None = None
        for start, lows, highs in extremes(self.images, self.name):
            if self.range is None or problem is not None:
                continue
            outside = (_levels(lows, *self.range) < 0) | (_levels(highs, *self.range) > 255)
            if outside.any():
                bad = int(outside.argmax())
                problem = f"image {start + bad} has values from {lows[bad]:g} to {highs[bad]:g}"
        require_shape(self.images.shape, self.name)
        if self.range is None:
            wanted = "save them as uint8 0..255, or say what is black and white, for instance --range=-1,1"
            raise ValueError(f"{self.name}: images have dtype {self.images.dtype}; {wanted}")
        if problem is not None:
            given = f"outside of --range={self.range[0]:g},{self.range[1]:g}"
            remedy = "give the range that the sampler means, or clip them"
            raise ValueError(f"{self.name}: {problem}, {given}; {remedy}")


def _levels(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Whole levels of grey, 0 at `low` and 255 at `high`; halves go up, as where first stages make uint8 of floats."""
    return np.floor((values.astype(np.float64) - low) * (255 / (high - low)) + 0.5)


# ---------------------------------------------------------------------------------------------------------- the file


class _Npz:
    """A zip of npy files. It stays open, so that what replaces it on the disk is not taken for it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise ValueError(f"{path} does not exist; name an npz file of images or statistics")
        try:
            self.file = path.open("rb")
            self.archive = zipfile.ZipFile(self.file)
        except _DAMAGE as error:
            raise self._damaged(error) from None
        self.names = [name.removesuffix(".npy") for name in self.archive.namelist()]

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def read(self, name: str) -> np.ndarray:
        """An array, read into memory in C order."""
        try:
            with self.archive.open(f"{name}.npy") as entry:
                return np.asarray(np.lib.format.read_array(entry, allow_pickle=False), order="C")
        except _DAMAGE as error:
            raise self._damaged(error) from None

    def array(self, name: str) -> Rows:
        """An array that stays in the file if it lies there as it is in memory."""
        entry = self.archive.getinfo(f"{name}.npy")
        try:
            if entry.compress_type == zipfile.ZIP_STORED and not entry.flag_bits & 1:  # 1: encrypted
                start = _content(self.file, entry)
                self.file.seek(start)
                shape, fortran, dtype = _read_header(self.file)
                if not fortran and not dtype.hasobject:
                    offset = self.file.tell()
                    self._require_whole(name, offset - start + math.prod(shape) * dtype.itemsize, entry)
                    return _Mapped(self.file, offset, shape, dtype)
        except _DAMAGE as error:
            raise self._damaged(error) from None
        return self.read(name)

    def sha256(self, name: str, array: Rows) -> str:
        """Of the bytes of an array. A mapped one is held to the zip's check sum, as reading into memory does."""
        if isinstance(array, np.ndarray):
            return hashlib.sha256(array.data).hexdigest()
        digest = hashlib.sha256()
        try:
            with self.archive.open(f"{name}.npy") as entry:
                _read_header(entry)
                while content := entry.read(2**20):
                    digest.update(content)
        except _DAMAGE as error:
            raise self._damaged(error) from None
        return digest.hexdigest()

    def _require_whole(self, name: str, wanted: int, entry: zipfile.ZipInfo) -> None:
        if entry.file_size != wanted or _content(self.file, entry) + wanted > os.fstat(self.file.fileno()).st_size:
            raise ValueError(f"{name} has {entry.file_size} bytes where its header says {wanted}")

    def _damaged(self, error: Exception) -> ValueError:
        reason = str(error) or type(error).__name__
        remedy = "make it again or copy it anew, with np.savez of plain arrays"
        return ValueError(f"{self.path} is not a readable npz of plain arrays: {reason}; {remedy}")


class _Mapped:
    """An array in a file. Each read maps it anew, so that pages once read do not count as memory of the process."""

    def __init__(self, file: IO[bytes], offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.file, self.offset, self.shape, self.dtype = file, offset, shape, dtype

    def __getitem__(self, rows: Any) -> np.ndarray:
        if 0 in self.shape:
            return np.empty(self.shape, self.dtype)[rows]
        return np.asarray(np.memmap(self.file, self.dtype, "r", self.offset, self.shape)[rows])


def _content(file: IO[bytes], entry: zipfile.ZipInfo) -> int:
    """Where the content of a zip's entry begins: its local header need not be as long as the central directory says."""
    file.seek(entry.header_offset)
    magic, name, extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    if magic != b"PK\3\4":
        raise zipfile.BadZipFile(f"no header of {entry.filename}")
    return entry.header_offset + _LOCAL_HEADER.size + name + extra


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether in Fortran's order, and dtype of the npy file that begins here; then its numbers do."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(file)
    raise ValueError(f"npy version {version}, which is for records, not for images")
