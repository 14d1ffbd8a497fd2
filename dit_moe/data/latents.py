"""Latents that `dit-moe encode` wrote, read by memory map: no process holds a copy, and any row is one short read.

    data/imagenet256/
        manifest.json                 written last: a folder without it holds no latents yet; its last entry is the hash
                                      of its text without that entry
        encoding.json                 what is being encoded and how; an interrupted encoding goes on only with the same
        shards/00000.safetensors …    moments [n, F, M, C, H, W], labels [n], index [n]
        shards/00000.json …           written after its shard: hash, size and sums of it

F is 1, or 2 with the mirrored image second; M is 2, mean and std, or 1 from a deterministic autoencoder. Latents are
as the autoencoder makes them, before scale and shift. Rows follow the order of the images, and `index` is the place of
a row's image there.
"""

# n rows of a shard, B batch, F flips, M moments, C channels, H height, W width of latents

from __future__ import annotations

import hashlib
import json
import math
import mmap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, TypedDict

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dit_moe.config import ConfigError, Keys, Place, Tree, Within, convert, require
from dit_moe.data.base import DATASETS, place_of
from dit_moe.files import require_size
from dit_moe.json_files import Count, FileName, Name, NonNegative, Sha256, Size, parse, read_sealed, write_sealed
from dit_moe.shards import MANIFEST, SHARDS

FORMAT = 1
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
MOST_HEADER = 2**20  # bytes at the beginning of a shard, which take some hundred
MOST_OPEN = 512  # mapped files: each holds a descriptor, of which a process often may have 1024
_HEADER_DTYPES = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}  # as safetensors calls them
_INTEGERS = {2: np.int16, 4: np.int32}  # of as many bytes as the numbers: NumPy has no bfloat16


class NoLatents(ValueError):
    """There are no finished latents in the folder."""


@dataclass(frozen=True)
class Shard:
    """One file of latents."""

    file: FileName
    count: Count  # rows
    bytes: Size
    sha256: Sha256


class Autoencoding(TypedDict):
    """What is read of the section first_stage without the autoencoder."""

    sha256: str


class Encoding(TypedDict):
    """What is read of the section encode without its config."""

    shard_size: Size


@dataclass(frozen=True)
class Manifest:
    """Everything that is known of encoded latents. `read_manifest` gets one that is whole."""

    class_names: tuple[Name, ...]
    image_shape: tuple[Size, Size, Size]  # (C, H, W)
    latent_shape: tuple[Size, Size, Size]
    moments: Annotated[int, Within(1, 2)]  # M
    flips: bool
    dtype: Literal["fp16", "bf16", "fp32"]
    autoencoder: Annotated[Tree, Keys(Autoencoding)]  # the resolved section first_stage
    mean: tuple[float, ...]  # per channel, of sampled latents before scale and shift
    std: tuple[NonNegative, ...]
    encoding: Annotated[Tree, Keys(Encoding)]  # images, crop, precision, …: what a continued encoding must find again
    skipped: tuple[tuple[Count, str], ...]  # broken images that were left out: place, reason
    shards: tuple[Shard, ...]
    passed_over: Tree = field(default_factory=dict)  # of what lay beside the images: `dit_moe.data.listing`

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            count = self.latent_shape[0]
            require(len(getattr(self, name)) == count, self, name, f"must have {count} numbers, one for each channel")
        twice = len({shard.file for shard in self.shards}) < len(self.shards)
        require(not twice and len(self) > 0, self, "shards", "must name each file once, and have at least one row")

    def __len__(self) -> int:
        """Encoded images; with flips there are twice as many rows to train on."""
        return sum(shard.count for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """The same for the same latents with the same labels, wherever they lie."""
        content = [self.autoencoder["sha256"], self.class_names, [shard.sha256 for shard in self.shards]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def describe(self) -> str:
        """The latents in a few words."""
        shape = "×".join(map(str, self.latent_shape))
        flips = ", both ways round" if self.flips else ""
        return f"{len(self):,} latents {shape} in {self.dtype}{flips}, {len(self.class_names):,} classes"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Put the manifest in place, sealed by a hash of its text."""
    downsampling = manifest.image_shape[1] // manifest.latent_shape[1]
    write_sealed(folder / MANIFEST, {"format": FORMAT, **asdict(manifest), "downsampling": downsampling})


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a folder whose shards are all there at their right sizes.

    Raises:
        NoLatents: there is none, or the encoding was not finished.
        ValueError: it was changed, is of another format, or a shard is missing or truncated.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        found = "holds an unfinished encoding" if (folder / SHARDS).is_dir() else "holds no encoded latents"
        raise NoLatents(f"{folder} {found}; run `dit-moe encode CONFIG`, or name another folder in data.path")
    manifest = read_sealed(path, Manifest, FORMAT, "encode anew")
    for shard in manifest.shards:
        again = "run `dit-moe encode` again, which makes it anew"
        require_size(folder / SHARDS / shard.file, shard.bytes, MANIFEST, again)
    return manifest


# -------------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True, kw_only=True)
class LatentsConfig:
    """A folder of encoded latents."""

    path: Annotated[str, Place()]
    heldout: Annotated[str, Place()] | None = None  # another such folder, for the split `heldout`
    flip: bool | None = None  # train on mirrored images too; None: if they were encoded
    fingerprint: str | None = None  # (recorded) of what is in the folder


@DATASETS.register("latents", LatentsConfig)
class LatentShards:
    """Rows of moments; with flips, row N + i is image i mirrored.

    Raises:
        NoLatents: nothing was encoded into the folder, or not to the end.
        ValueError: no such split, files that are damaged, or flips are wanted that were not encoded.
    """

    def __init__(self, config: LatentsConfig, split: str) -> None:
        self.folder = Path(place_of(config, split, "latents")[1])
        self.manifest = read_manifest(self.folder)
        self.class_names, self.image_shape = self.manifest.class_names, self.manifest.image_shape
        self.fingerprint = self.manifest.fingerprint
        self.parts = {str(self.folder.resolve()), *(f"the shard {shard.sha256}" for shard in self.manifest.shards)}
        if config.flip and not self.manifest.flips:
            raise ConfigError("flip", f"=True, but {self.folder} was encoded with encode.flips=false; drop the line")
        self.flip = split == "train" and (self.manifest.flips if config.flip is None else config.flip)
        self._starts = np.cumsum([0, *[shard.count for shard in self.manifest.shards]])

    def __len__(self) -> int:
        return len(self.manifest) * (2 if self.flip else 1)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """{"moments": [B, M, C, H, W] as stored, before scale and shift, "labels": int64 [B]}."""
        flip_B, image_B = np.divmod(np.asarray(indices, dtype=np.int64), len(self.manifest))
        shard_B = np.searchsorted(self._starts, image_B, side="right") - 1
        row_B = image_B - self._starts[shard_B]
        shards = [self._mapped(number) for number in shard_B.tolist()]
        for shard, row, flip in zip(shards, row_B.tolist(), flip_B.tolist(), strict=True):
            shard.prefetch(row, flip)  # the disk works on all rows at once
        manifest = self.manifest
        moments = torch.empty(len(indices), manifest.moments, *manifest.latent_shape, dtype=DTYPES[manifest.dtype])
        bits = moments.view(torch.int16 if moments.itemsize == 2 else torch.int32).numpy()  # much faster than torch
        labels_B = np.empty(len(indices), dtype=np.int64)
        for i, (shard, row, flip) in enumerate(zip(shards, row_B.tolist(), flip_B.tolist(), strict=True)):
            bits[i], labels_B[i] = shard.moments[row, flip], shard.labels[row]
        return {"moments": moments, "labels": torch.from_numpy(labels_B)}

    @property
    def labels_N(self) -> np.ndarray:
        """int64, of all images. ValueError if a shard cannot be read."""
        return np.concatenate([self._mapped(number).labels for number in range(len(self.manifest.shards))])

    def class_counts(self) -> list[int]:
        """ValueError if a shard cannot be read."""
        return np.bincount(self.labels_N, minlength=len(self.class_names)).tolist()

    def _mapped(self, number: int) -> _Mapped:
        manifest = self.manifest
        shard, size = manifest.shards[number], manifest.encoding["shard_size"]
        row = 2 if manifest.flips else 1, manifest.moments, *manifest.latent_shape
        places = range(number * size, (number + 1) * size)
        return _map(self.folder / SHARDS / shard.file, shard, manifest.dtype, row, places, len(manifest.class_names))


class _Array(TypedDict):
    """What the header of a safetensors file says of a tensor."""

    dtype: str
    shape: list[Count]
    data_offsets: tuple[Count, Count]  # from the end of the header: where its bytes begin and end


class _Header(TypedDict):
    moments: _Array
    labels: _Array
    index: _Array


class _Mapped(NamedTuple):
    """A shard file in memory as far as the system cares to keep it; all processes share its pages."""

    file: mmap.mmap
    start: int  # of the moments
    moments: np.ndarray  # [n, F, M, C, H, W] of integers as wide as the numbers
    labels: np.ndarray

    def prefetch(self, row: int, flip: int) -> None:
        size = self.moments[0, 0].nbytes
        begin = self.start + (row * self.moments.shape[1] + flip) * size
        page = begin - begin % mmap.PAGESIZE
        self.file.madvise(mmap.MADV_WILLNEED, page, begin + size - page)


@lru_cache(maxsize=MOST_OPEN)
def _map(path: Path, shard: Shard, dtype: str, row: tuple[int, ...], places: range, classes: int) -> _Mapped:
    """Map a shard's file.

    ValueError if it is no safetensors file of rows of this dtype and shape, of images with these `places` in their
    data set and with labels below `classes`.
    """
    shape = shard.count, *row
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        mapped.madvise(mmap.MADV_RANDOM)  # reading ahead would fetch eight times what shuffled rows need
        end = 8 + int.from_bytes(mapped[:8], "little")
        if end > MOST_HEADER:
            raise ValueError(f"its header is said to have {end - 8:,} bytes")
        header = convert(_Header, parse(mapped[8:end]))
        moments, labels, index = header["moments"], header["labels"], header["index"]
        _require_header("moments", moments, _HEADER_DTYPES[dtype], shape)
        _require_header("labels", labels, "I64", shape[:1])
        _require_header("index", index, "I64", shape[:1])
        with safe_open(path, "pt"):  # holds what the header says of places to the size of the file
            start = end + moments["data_offsets"][0]
        flat = np.frombuffer(mapped, _INTEGERS[DTYPES[dtype].itemsize], math.prod(shape), start)
        known, index_n = (
            np.frombuffer(mapped, np.int64, shard.count, end + each["data_offsets"][0]) for each in (labels, index)
        )
        _require_within("its rows are of images", index_n, places, "the shard of other places stands under its name")
        _require_within("has labels", known, range(classes), f"{MANIFEST} names {classes} classes")
        return _Mapped(mapped, start, flat.reshape(shape), known)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read ({error}); restore it, or run `dit-moe encode` again") from None


def _require_header(name: str, header: _Array, dtype: str, shape: tuple[int, ...]) -> None:
    if (header["dtype"], header["shape"]) != (dtype, list(shape)):
        found = f"{header['dtype']} {header['shape']}"
        raise ValueError(f"{name} are {found} where {MANIFEST} says {dtype} {list(shape)}")


def _require_within(what: str, values_n: np.ndarray, allowed: range, because: str) -> None:
    outside = np.flatnonzero((values_n < allowed.start) | (values_n >= allowed.stop))
    if outside.size:
        row = int(outside[0])
        problem = f"{what} outside of {allowed.start} to {allowed.stop - 1}: {int(values_n[row])} in row {row}"
        raise ValueError(f"{problem}; {because}")
