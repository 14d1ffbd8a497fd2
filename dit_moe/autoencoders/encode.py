"""Images → shards of latents: any number of processes, stopped and continued at will, always the same bytes.

The same, that is, on the same kind of device, with the same number of threads per process: on a CPU, convolutions of
larger networks round differently when cut among more threads.

A shard holds the latents of fixed places in the data set, is encoded by one process in batches that start at its first
image, and is followed by a record of itself. What is done is what has a record; the manifest is made of the records.
"""

# n rows of a shard, B batch, F flips, M moments, C channels, H height, W width of latents

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from dit_moe import config as configs
from dit_moe.autoencoders.autoencoder import Autoencoder
from dit_moe.config import ConfigError, Tree, require
from dit_moe.data import DATASETS, BrokenImages, Dataset
from dit_moe.data.batch_sampler import load_batches
from dit_moe.data.latents import LatentsConfig
from dit_moe.data.manifest import DTYPES, MANIFEST, SHARDS, Manifest, Shard, write_manifest
from dit_moe.distributed import join_processes, on_all, on_main
from dit_moe.files import read_object, require_own, write_atomically

ENCODING, BROKEN = "encoding.json", "broken.json"
OWN = {"images", "first_stage"}  # keys of an encoding by which it is told from other files of that name
# May change: the data set's fingerprint stands for its places, and limits decide only which images are refused.
FREE = ("images.path", "images.heldout", "images.id", "images.min_side", "images.max_megapixels")


class EncodingError(Exception):
    """The encoding could not be finished; what is done of it is kept."""


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """Which images to encode, and how to keep their latents. Where they go is ``data.path``."""

    images: Annotated[Any, DATASETS]
    dtype: Literal["fp16", "bf16", "fp32"] = "fp16"
    flips: bool = True  # mirrored images as a second entry
    batch_size: int = 32
    shard_size: int = 4096  # images in a file: what an interruption costs at most
    workers: int = 0  # processes that read and crop images ahead

    def __post_init__(self) -> None:
        for name in ("batch_size", "shard_size"):
            require(getattr(self, name) >= 1, self, name, "must be at least 1")
        require(self.workers >= 0, self, "workers", "must be at least 0")
        if isinstance(self.images, LatentsConfig):
            raise ConfigError("images.name", "=latents holds latents; name a data set of images")
        if getattr(self.images, "flip", False):
            raise ConfigError("images.flip", "=True: flips are encode.flips here; drop the line")


class Encoder:
    """Encodes the images of `dataset` with `stage` into `folder`, together with all other processes.

    Raises:
        ConfigError: `folder` holds an encoding of other images, or in another way.
    """

    def __init__(self, config: EncodeConfig, stage: Autoencoder, dataset: Dataset, folder: Path) -> None:
        self.config, self.stage, self.dataset, self.folder = config, stage, dataset, folder
        stage.load()
        self.encoding = self._describe()
        self.shards = math.ceil(len(dataset) / config.shard_size)
        self.row_shape = (  # F, M, C, H, W
            2 if config.flips else 1,
            2 if stage.config.kind == "AutoencoderKL" else 1,
            *stage.latent_shape(dataset.image_shape),
        )

    def _describe(self) -> Tree:
        """What decides the bytes of the latents, apart from the machine."""
        how = {name: getattr(self.stage.config, name) for name in ("kind", "sha256", "precision", "tiling")}
        kept = {name: value for name, value in asdict(self.config).items() if name not in ("images", "workers")}
        images = {"name": DATASETS.name_of(self.config.images), **configs.dump(self.config.images)}
        what = {"images": images, "fingerprint": self.dataset.fingerprint, "count": len(self.dataset)}
        return json.loads(json.dumps(what | {"first_stage": how} | kept))

    def require_same(self, earlier: Tree) -> None:
        """ConfigError unless an `earlier` encoding in the folder was of the same images in the same way."""
        remedy = "take that value, encode into another data.path, or delete that folder"
        where = f"the encoding in {self.folder}"
        configs.require_same(self.encoding, earlier, "encode", where, remedy, FREE)

    def missing(self, skip_broken: bool = False) -> list[int]:
        """The shards still to make: those without a record, or whose file is not as long as that says.

        Unless broken images are to be skipped, those that lack some too: they may have been mended.
        """
        records = self._records(skip_broken)
        return [shard for shard in range(self.shards) if shard not in records]

    def count(self, shards: Sequence[int]) -> int:
        """How many images belong into these shards."""
        return sum(len(self._rows(shard)) for shard in shards)

    def run(self, skip_broken: bool = False, on_images: Callable[[int], object] = lambda count: None) -> Manifest:
        """Make what is missing, then the manifest. `on_images(n)` after every batch of this process.

        Raises EncodingError, after all that can be encoded is, if images are broken and not to be skipped; ValueError,
        before it, if the folder holds files of the names that are to be written which no encoding wrote.
        """
        on_main(lambda: require_own(self.folder, (MANIFEST, ENCODING, BROKEN, SHARDS), self._is_own()))
        on_all(lambda: (self.folder / SHARDS).mkdir(parents=True, exist_ok=True))
        on_main(self._begin)
        state = join_processes()
        # Only the main process reads records; of those made from now on it is told, as its view of the disk may be old.
        records = on_all(lambda: self._records(skip_broken) if state.is_main_process else {})[0]
        missing = [shard for shard in range(self.shards) if shard not in records]
        mine = missing[state.process_index :: state.num_processes]
        turns, batches = iter(mine), self._batches(mine)
        broken: dict[int, str] = {}
        for _ in range(0, len(missing), state.num_processes):  # together, so that no one waits long for another
            for made, found in on_all(lambda: self._encode(next(turns, None), batches, skip_broken, on_images)):
                records |= made
                broken |= found
        if broken and not skip_broken:
            on_main(lambda: self._list_broken(broken))
            raise EncodingError(self._explain(broken))
        manifest = on_all(lambda: self._finish(records) if state.is_main_process else None)[0]
        assert manifest is not None, "the main process is the first"
        return manifest

    def _is_own(self) -> bool:
        """Whether an encoding was begun in the folder, of which its encoding.json is the first file, or finished."""
        begun, finished = read_object(self.folder / ENCODING), read_object(self.folder / MANIFEST).get("encoding")
        return any(isinstance(each, dict) and each.keys() >= OWN for each in (begun, finished))

    def _begin(self) -> None:
        path = self.folder / ENCODING
        if path.is_file() and any((self.folder / SHARDS).glob("*.json")):  # before the first shard all may change
            self.require_same(json.loads(path.read_text()))
        write_atomically(path, json.dumps(self.encoding, indent=1) + "\n")

    # ------------------------------------------------------------------------------------------------------- one shard

    def _batches(self, shards: Sequence[int]) -> Iterator[Any]:
        """Read rows, batch by batch, of these shards one after the other."""
        batches = [part for shard in shards for part in self._parts(shard)]
        pin = join_processes().device.type == "cuda"
        return load_batches(_Tolerant(self.dataset), batches, self.config.workers, pin)

    def _rows(self, shard: int) -> range:
        size = self.config.shard_size
        return range(shard * size, min((shard + 1) * size, len(self.dataset)))

    def _parts(self, shard: int) -> list[list[int]]:
        rows, size = self._rows(shard), self.config.batch_size
        return [list(rows[i : i + size]) for i in range(0, len(rows), size)]

    def _encode(
        self, shard: int | None, batches: Iterator[Any], skip_broken: bool, on_images: Callable[[int], object]
    ) -> tuple[dict[int, Tree], dict[int, str]]:
        """Encode one shard, if there is one left, from the next `batches` and keep it.

        Returns its record, if it was kept, under its number, and its broken images.
        """
        if shard is None:
            return {}, {}
        moments: list[Tensor] = []
        labels: list[Tensor] = []
        index: list[int] = []
        broken: dict[int, str] = {}
        for part in self._parts(shard):
            rows = next(batches)
            broken |= rows["broken"]
            index += rows["index"]
            if rows["index"]:
                moments.append(self._moments(rows["images"], rows["index"]))
                labels.append(rows["labels"])
            on_images(len(part))
        if broken and not skip_broken:
            return {}, broken
        empty = torch.empty(0, *self.row_shape, dtype=DTYPES[self.config.dtype])
        tensors = {
            "moments": torch.cat([empty, *moments]),
            "labels": torch.cat([torch.empty(0, dtype=torch.int64), *labels]),
            "index": torch.tensor(index, dtype=torch.int64),
        }
        return {shard: self._keep(shard, tensors, broken)}, broken

    def _moments(self, images_BCHW: Tensor, index: Sequence[int]) -> Tensor:
        """[B, F, M, C, H, W] on the CPU. EncodingError if one does not fit the dtype, or all not the memory."""
        try:
            images = images_BCHW.to(join_processes().device, non_blocking=True)
            ways = [images, images.flip(-1)] if self.config.flips else [images]
            each = [torch.stack([m for m in self.stage.encode_raw(way) if m is not None], 1) for way in ways]
        except torch.OutOfMemoryError:
            problem = f"the device has too little memory for encode.batch_size={self.config.batch_size}"
            raise EncodingError(f"{problem}; lower it, or set first_stage.slicing=true") from None
        moments = torch.stack(each, 1).to(DTYPES[self.config.dtype]).cpu()
        finite_B = moments.isfinite().flatten(1).all(1)
        if not finite_B.all():
            bad = [i for i, fine in zip(index, finite_B.tolist(), strict=True) if not fine]
            problem = f"the latents of images {bad[:8]} are not finite in {self.config.dtype}"
            raise EncodingError(f"{problem}; set encode.dtype=bf16 or fp32, and first_stage.precision=fp32")
        return moments

    def _keep(self, shard: int, tensors: dict[str, Tensor], broken: dict[int, str]) -> Tree:
        content, path = save(tensors), self._path(shard)
        write_atomically(path, content)
        sums, squares = channel_statistics(tensors["moments"])
        record = {
            "shard": asdict(Shard(path.name, len(tensors["index"]), len(content), hashlib.sha256(content).hexdigest())),
            "sums": sums.tolist(),
            "squares": squares.tolist(),
            "skipped": sorted(broken.items()),
        }
        write_atomically(path.with_suffix(".json"), json.dumps(record) + "\n")
        return record

    def _path(self, shard: int) -> Path:
        return self.folder / SHARDS / f"{shard:05d}.safetensors"

    def _records(self, skip_broken: bool) -> dict[int, Tree]:
        """Of the shards that are done."""
        found = {shard: self._record(shard) for shard in range(self.shards)}
        return {i: record for i, record in found.items() if record and (skip_broken or not record["skipped"])}

    def _record(self, shard: int) -> Tree | None:
        path = self._path(shard)
        if not (path.is_file() and path.with_suffix(".json").is_file()):
            return None
        record = json.loads(path.with_suffix(".json").read_text())
        return record if path.stat().st_size == record["shard"]["bytes"] else None

    # ---------------------------------------------------------------------------------------------------- all together

    def _finish(self, records: dict[int, Tree]) -> Manifest:
        there = os.listdir(self.folder / SHARDS)
        if lost := sorted({self._path(shard).name for shard in range(self.shards)} - set(there)):
            more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            problem = f"{lost[0]}{more} of the shards in {self.folder / SHARDS} are not there"
            raise EncodingError(f"{problem}; do all nodes see the same disk?")
        manifest = self._manifest([records[shard] for shard in range(self.shards)])
        write_manifest(self.folder, manifest)
        (self.folder / BROKEN).unlink(missing_ok=True)
        return manifest

    def _manifest(self, records: Sequence[Tree]) -> Manifest:
        shards = tuple(Shard(**record["shard"]) for record in records)
        if not any(shard.count for shard in shards):
            raise EncodingError(f"all {len(self.dataset)} images are broken; nothing was encoded")
        flips, moments, channels, height, width = self.row_shape
        mean_C, std_C = mean_and_std(
            [(record["sums"], record["squares"]) for record in records],
            sum(shard.count for shard in shards) * flips * height * width,
        )
        return Manifest(
            class_names=tuple(self.dataset.class_names),
            image_shape=self.dataset.image_shape,
            latent_shape=(channels, height, width),
            moments=moments,
            flips=self.config.flips,
            dtype=self.config.dtype,
            autoencoder=configs.dump(self.stage.config),
            mean=tuple(mean_C.tolist()),
            std=tuple(std_C.tolist()),
            encoding=self.encoding,
            skipped=tuple((i, problem) for record in records for i, problem in record["skipped"]),
            shards=shards,
        )

    def _list_broken(self, broken: dict[int, str]) -> None:
        listed = [{"index": i, "problem": problem} for i, problem in sorted(broken.items())]
        write_atomically(self.folder / BROKEN, json.dumps(listed, indent=1) + "\n")

    def _explain(self, broken: dict[int, str]) -> str:
        first, others = broken[min(broken)], len(broken) - 1
        more, them = (f" and {others} more, listed in {self.folder / BROKEN}", "them") if others else ("", "it")
        remedy = f"mend {them} in place and run the same command again, or leave {them} out by --skip-broken"
        return f"{first}{more}; {remedy}"


class _Tolerant:
    """A data set that gives what it can read of a batch, and says what it cannot."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        """The rows that could be read, with their `index`, and what is `broken`: a dict, which torch can pin."""
        broken: dict[int, str] = {}
        try:
            rows = self.dataset.__getitems__(indices)
        except BrokenImages as error:
            broken = error.problems
            indices = [i for i in indices if i not in broken]
            rows = self.dataset.__getitems__(indices) if indices else {"images": Tensor(), "labels": Tensor()}
        return {"index": indices, "images": rows["images"], "labels": rows["labels"], "broken": broken}


def channel_statistics(moments: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Per channel, over stored moments [n, F, M, C, H, W]: sums of the mean and of the second moment of a draw.

    NumPy adds in the same order whatever the number of threads.
    """
    sums, squares = np.zeros((2, moments.shape[3]))
    for part in moments.split(64):  # in float64 a whole shard would be large
        first, *rest = part.double().numpy().swapaxes(0, 2)
        sums += first.sum((0, 1, 3, 4))
        squares += sum((std**2 for std in rest), first**2).sum((0, 1, 3, 4))
    return sums, squares


def mean_and_std(parts: Sequence[tuple[Any, Any]], values: int) -> tuple[np.ndarray, np.ndarray]:
    """Per channel, of `values` numbers whose sums and second moments are the sums of these `parts`."""
    mean_C, square_C = np.sum(np.asarray(parts, dtype=np.float64), axis=0) / values
    return mean_C, np.sqrt(np.maximum(square_C - mean_C**2, 0))
