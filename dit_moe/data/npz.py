"""`images.npz`: what its arrays must be, how they are read, and how they are written.

Arrays of an uncompressed npz stay in the file and are mapped into memory as they are read. Images are written all at
once or as they come. A set of any size then takes the memory of one batch.
"""

# N images of the set, B images of a batch, C channels, H height, W width

from __future__ import annotations

import hashlib
import io
import math
import os
import struct
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import numpy as np

from dit_moe.data.image_source import ImageSourceConfig
from dit_moe.files import atomic_file, missing, require_no_stand_in

CHANNELS = (1, 3)
NPY_HEADER = 1024  # most bytes that we write before the numbers of an npy file; plain arrays have 128
MOST_NPY_HEADER = 10_000  # that are read, as NumPy does it
PLAUSIBLE = 2**28, 100  # bytes that any entry may unpack to, and how many times those of a larger one in the file
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip's entry: magic, and the lengths of what follows it (APPNOTE 4.3.7)


class Rows(Protocol):
    """An array, in memory or in a file, whose rows can be read."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def __getitem__(self, rows: Any) -> np.ndarray: ...


# ------------------------------------------------------------------------------------------------------------- checks


def require_images(images_NHWC: Rows, source: str) -> None:
    """ValueError, beginning with `source`, unless these are at least one image, uint8 with 1 or 3 channels."""
    if images_NHWC.dtype != np.uint8:
        raise ValueError(f"{source}: images have dtype {images_NHWC.dtype}; save them as uint8 0..255")
    require_shape(images_NHWC.shape, source)


def require_shape(shape: tuple[int, ...], source: str) -> None:
    """ValueError, with what was probably meant, unless `shape` is [N, H, W, C] with 1 or 3 channels and without a 0,
    and an image has as many pixels as one can have."""
    if 0 in shape:
        raise ValueError(f"{source}: there is nothing in images of shape {shape}; sample at least 2")
    if len(shape) == 4 and shape[-1] in CHANNELS:
        if shape[1] * shape[2] > (most := ImageSourceConfig.max_megapixels) * 1e6:
            found = f"images are {shape[2]}×{shape[1]} pixels, more than {most:g} million"
            raise ValueError(f"{source}: {found}; save smaller ones")
        return
    hint = ""
    if len(shape) == 4 and shape[1] in CHANNELS:
        hint = "; the channels seem to stand first: save images.transpose(0, 2, 3, 1)"
    elif len(shape) == 3:
        hint = "; an axis is missing: save grey images as images[..., None], a single image as image[None]"
    wanted = "wanted [N, height, width, channels] with 1 or 3 channels"
    raise ValueError(f"{source}: images have shape {shape}; {wanted}{hint}")


def require_labels(labels_N: np.ndarray | None, count: int, source: str) -> None:
    """ValueError, beginning with `source`, unless labels, if any, are one whole number ≥ 0 for each image."""
    if labels_N is None:
        return
    if labels_N.shape != (count,) or not np.issubdtype(labels_N.dtype, np.integer):
        found = f"labels are {labels_N.dtype} of shape {labels_N.shape}"
        raise ValueError(f"{source}: {found}; wanted one whole number for each of {count} images")
    if count and labels_N.max() >= 2**63:
        raise ValueError(f"{source}: label {labels_N.max()} of image {labels_N.argmax()} is beyond 64 bits")
    if count and labels_N.min() < 0:
        problem = f"label {labels_N.min()} of image {labels_N.argmin()} is negative"
        raise ValueError(f"{source}: {problem}; classes count from 0")


# ----------------------------------------------------------------------------------------------------------- reading


class NpzFile:
    """An npz file to read; nothing in it is unpickled. It stays open: a file that replaces it has no effect.

    Nothing that an array's header claims is believed, or allocated, before the zip and the size of the file agree.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise ValueError(f"{missing(path)}; name an npz file of images or statistics")
        with self._readable():
            self.file = path.open("rb")
            self.archive = zipfile.ZipFile(self.file)
            self.names = [name.removesuffix(".npy") for name in self.archive.namelist()]
            if twice := [name for name, count in Counter(self.names).items() if count > 1]:
                raise ValueError(f"there are two arrays {twice[0]}")

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def read(self, name: str) -> np.ndarray:
        """An array, read into memory in C order."""
        with self._readable():
            self._header(name)
            with self.archive.open(f"{name}.npy") as entry:
                return np.asarray(np.lib.format.read_array(entry, allow_pickle=False), order="C")

    def array(self, name: str) -> Rows:
        """An array that stays in the file if it lies there as it is in memory."""
        with self._readable():
            entry, header = self.archive.getinfo(f"{name}.npy"), self._header(name)
            if entry.compress_type == zipfile.ZIP_STORED and not header.fortran:
                start = _content_start(self.file, entry)
                if start + entry.file_size <= os.fstat(self.file.fileno()).st_size:
                    return _MappedArray(self.file, start + header.length, header.shape, header.dtype)
        return self.read(name)

    def sha256(self, name: str, array: Rows) -> str:
        """Of the bytes of an array. A mapped one is held to the zip's check sum, as reading into memory does."""
        if isinstance(array, np.ndarray):
            return hashlib.sha256(array.data).hexdigest()
        digest = hashlib.sha256()
        with self._readable(), self.archive.open(f"{name}.npy") as entry:
            entry.read(self._header(name).length)
            while content := entry.read(2**20):
                digest.update(content)
        return digest.hexdigest()

    def _header(self, name: str) -> _Header:
        """ValueError, or another error of the parsers, if it is damaged, or the entry in the zip has another size."""
        entry, there = self.archive.getinfo(f"{name}.npy"), os.fstat(self.file.fileno()).st_size
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{name} is packed in another way than by np.savez_compressed")
        most, times = PLAUSIBLE
        if entry.file_size > max(most, times * min(entry.compress_size, there)):
            claim = f"{name} would unpack to {entry.file_size / 1e9:,.4g} GB"
            raise ValueError(f"{claim}, more than {times} times its {entry.compress_size / 1e6:.4g} MB in the file")
        with self.archive.open(entry) as file:
            header = _read_header(io.BytesIO(file.read(MOST_NPY_HEADER)))
        if header.dtype.hasobject or min(header.shape, default=0) < 0:
            problem = "Python objects" if header.dtype.hasobject else f"numbers of shape {header.shape}"
            raise ValueError(f"{name} holds {problem}")
        size = header.length + math.prod(header.shape) * header.dtype.itemsize
        if entry.file_size != size:
            raise ValueError(f"{name} has {entry.file_size} bytes where its header says {size}")
        return header

    @contextmanager
    def _readable(self) -> Iterator[None]:
        """Within it, what shows that the file is damaged becomes one ValueError."""
        try:
            yield
        except MemoryError:
            raise
        except Exception as error:  # of many kinds, from zipfile, zlib and NumPy
            require_no_stand_in(self.path)
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            remedy = "make it again or copy it again, with np.savez of plain arrays"
            raise ValueError(f"{self.path} is not a readable npz of plain arrays: {reason}; {remedy}") from None


class _MappedArray:
    """An array in a file. Each read maps it again, so that pages once read do not count as memory of the process."""

    def __init__(self, file: IO[bytes], offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.file, self.offset, self.shape, self.dtype = file, offset, shape, dtype

    def __getitem__(self, rows: Any) -> np.ndarray:
        if 0 in self.shape:
            return np.empty(self.shape, self.dtype)[rows]
        return np.asarray(np.memmap(self.file, self.dtype, "r", self.offset, self.shape)[rows])


def _content_start(file: IO[bytes], entry: zipfile.ZipInfo) -> int:
    """Where the content of a zip's entry begins: its local header need not be as long as the central directory says."""
    file.seek(entry.header_offset)
    magic, name, extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    if magic != b"PK\3\4":
        raise zipfile.BadZipFile(f"no header of {entry.filename}")
    return entry.header_offset + _LOCAL_HEADER.size + name + extra


class _Header(NamedTuple):
    """Of an npy file."""

    shape: tuple[int, ...]
    fortran: bool  # whether in Fortran's order
    dtype: np.dtype[Any]
    length: int  # bytes, behind which the numbers begin


def _read_header(start: IO[bytes]) -> _Header:
    """The header of the npy file that starts so."""
    version = np.lib.format.read_magic(start)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version in readers:
        try:
            return _Header(*readers[version](start), start.tell())
        except Exception:  # of Python's parser, which tells of nodes and statements
            raise ValueError("the header of an array is damaged") from None
    raise ValueError(f"npy version {version}, which is for records, not for images")


# ----------------------------------------------------------------------------------------------------------- writing


@contextmanager
def image_writer(
    path: str | Path, count: int, labels_N: np.ndarray | None = None
) -> Iterator[Callable[[np.ndarray], None]]:
    """Write an uncompressed npz that `NpzFile` and ADM's evaluator read.

    Yields ``add(images_BHWC)``, to be called until `count` images are in; the file is in place when the block ends.

    An exception in the block, from wherever, leaves what `path` was before. ``add`` raises ValueError for anything but
    uint8 images of 1 or 3 channels, for images of another size, and for one too many; so does the end for one too few.
    """
    require_labels(labels_N, count, str(path))
    with atomic_file(Path(path)) as file, zipfile.ZipFile(file, "w") as archive:
        with ExitStack() as stack:
            entry: IO[bytes] | None = None
            shape: tuple[int, ...] = ()
            written = 0

            def add(images_BHWC: np.ndarray) -> None:
                nonlocal entry, shape, written
                require_images(images_BHWC, str(path))
                if entry is None:  # the first images decide what the header says of their size
                    shape = images_BHWC.shape[1:]
                    most = count * images_BHWC[0].nbytes + NPY_HEADER
                    entry = stack.enter_context(_open_entry(archive, "arr_0.npy", most))
                    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
                    np.lib.format.write_array_header_1_0(entry, header)
                if images_BHWC.shape[1:] != shape:
                    raise ValueError(f"{path}: images of {images_BHWC.shape[1:]} follow images of {shape}")
                written += len(images_BHWC)
                if written > count:
                    raise ValueError(f"{path}: more than the {count} images that it was to hold")
                entry.write(np.ascontiguousarray(images_BHWC).data)

            yield add
            if written < count:
                raise ValueError(f"{path}: {written} of {count} images; the rest was never made")
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
