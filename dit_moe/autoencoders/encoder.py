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
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypedDict

import torch
from safetensors.torch import save
from torch import Tensor

from dit_moe import config as configs
from dit_moe.autoencoders.autoencoder import Autoencoder
from dit_moe.autoencoders.statistics import channel_statistics, mean_and_std
from dit_moe.config import ConfigError, Keys, Tree, WorkFailed, require
from dit_moe.data import DATASETS, BrokenImages, Dataset
from dit_moe.data.batch_sampler import load_batches
from dit_moe.data.image_source import ImageSource
from dit_moe.data.latents import DTYPES, SHARDS, LatentsConfig, Manifest, Shard, write_manifest
from dit_moe.distributed import enough_memory, from_main, join_processes, on_main
from dit_moe.files import write_atomically
from dit_moe.formatting import first_few
from dit_moe.json_files import Count, NonNegative, read_object
from dit_moe.shards import ENCODING, FixedShards, ShardFolder

BROKEN = "broken.json"
# Entries of encoding.json once all images were read: those that were broken, and what the others are known by.
WERE_BROKEN, ROWS = "broken", "rows_sha256"
# May change: the data set's fingerprint stands for its places, and limits decide only which images are refused.
FREE = (
    *("images.path", "images.heldout", "images.reserve", "images.id", "images.min_side", "images.max_megapixels"),
    *("images.skip_broken", "images.allow_empty"),
)


class EncodingError(WorkFailed):
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


class _Identity(TypedDict):
    """What is encoded, and how: the sections that tell it from another program's."""

    images: Tree
    first_stage: Tree


class _Record(TypedDict):
    """Of a shard: its entry in the manifest, and per channel what `channel_statistics` gives."""

    shard: Annotated[Tree, Keys(Shard)]
    sums: list[float]
    squares: list[NonNegative]
    skipped: list[tuple[Count, str]]


class Encoder:
    """Encodes the images of `dataset` with `stage` into `folder`, together with all other processes.

    Raises:
        ConfigError: `folder` holds an encoding of other images, or in another way.
    """

    def __init__(self, config: EncodeConfig, stage: Autoencoder, dataset: Dataset, folder: Path) -> None:
        self.config, self.stage, self.dataset, self.folder = config, stage, dataset, folder
        stage.load()
        self.encoding = self._describe()
        self.shards = FixedShards(len(dataset), config.shard_size, config.batch_size)
        self.files = ShardFolder(folder, _Identity, _Record)
        self.row_shape = (  # F, M, C, H, W
            2 if config.flips else 1,
            2 if stage.config.kind == "AutoencoderKL" else 1,
            *stage.latent_shape(dataset.image_shape),
        )

    def _describe(self) -> Tree:
        """What decides the bytes of the latents, apart from the machine."""
        how = {name: getattr(self.stage.config, name) for name in ("kind", "sha256", "precision", "tiling")}
        images, kept = described(self.config)
        what = {"images": images, "fingerprint": self.dataset.fingerprint, "count": len(self.dataset)}
        return json.loads(json.dumps(what | {"first_stage": how} | kept))

    def require_same(self, earlier: Tree) -> None:
        """ConfigError unless an `earlier` encoding in the folder was of the same images in the same way.

        Broken images that were mended since may be of other sizes, and so may images of other splits.
        """
        remedy = "take that value, encode into another data.path, or delete that folder"
        where = f"the encoding in {self.folder}"
        changed = earlier.get("fingerprint") != self.encoding["fingerprint"]
        free = {*FREE, "fingerprint"} if changed and self._only_mended() else FREE
        configs.require_same(self.encoding, earlier, "encode", where, remedy, free)

    def _only_mended(self) -> bool:
        """Whether the images are those that the encoding in the folder has read, but for those that it found broken."""
        read = read_object(self.folder / ENCODING)
        but = read.get(WERE_BROKEN)
        if not isinstance(self.dataset, ImageSource) or read.get("count") != len(self.dataset):
            return False
        known = isinstance(but, list) and all(type(i) is int and 0 <= i < len(self.dataset) for i in but)
        return known and read.get(ROWS) == self.dataset.sha256_of_rows(but)

    def _keep_what_was_read(self, broken: Collection[int]) -> None:
        if isinstance(self.dataset, ImageSource):
            read = {WERE_BROKEN: sorted(broken), ROWS: self.dataset.sha256_of_rows(broken)}
            write_atomically(self.folder / ENCODING, json.dumps(self.encoding | read, indent=1) + "\n")

    def missing(self, skip_broken: bool = False) -> list[int]:
        """The shards still to make: those without a record, or whose file is not as long as that says.

        Unless broken images are to be skipped, those that lack some too: they may have been mended.
        """
        return [shard for shard in range(len(self.shards)) if self._find(shard, skip_broken) is None]

    def run(self, skip_broken: bool = False, on_images: Callable[[int], object] = lambda count: None) -> Manifest:
        """Make what is missing, then the manifest. `on_images(n)` after every batch of this process.

        Raises EncodingError, after all that can be encoded is, if images are broken and not to be skipped; ValueError,
        before it, if the folder holds files of the names that are to be written which no encoding wrote.
        """
        on_main(self._require_own_folder)
        self.files.begin(self.encoding)
        records = self.shards.make_missing(
            find=lambda shard: self._find(shard, skip_broken),
            read=self._read,
            make=lambda shard, batches: self._make(shard, batches, skip_broken),
            on_rows=on_images,
        )
        broken = {image: problem for record in records.values() for image, problem in record["skipped"]}
        on_main(lambda: self._keep_what_was_read(broken))
        if broken and not skip_broken:
            self._refuse_broken(broken)
        return from_main(lambda: self._finish([records[shard] for shard in range(len(self.shards))]))

    def _require_own_folder(self) -> None:
        self.files.require_own(BROKEN)
        if (earlier := self.files.identity()) is not None:
            self.require_same(earlier)

    # ------------------------------------------------------------------------------------------------------- one shard

    def _find(self, shard: int, skip_broken: bool) -> Tree | None:
        """The record of a shard that is done."""
        record, path = self.files.record(shard), self.files.path(shard, ".safetensors")
        if record is None or not path.is_file() or path.stat().st_size != record["shard"]["bytes"]:
            return None
        rows, channels = record["shard"]["count"] + len(record["skipped"]), self.row_shape[2]
        of_this = record["shard"]["file"] == path.name and rows == len(self.shards.rows(shard))
        if not (of_this and len(record["sums"]) == len(record["squares"]) == channels):
            return None
        return record if skip_broken or not record["skipped"] else None

    def _read(self, batches: Iterable[list[int]]) -> Iterator[Any]:
        pin = join_processes().device.type == "cuda"
        return load_batches(_ReadableRows(self.dataset), batches, self.config.workers, pin)

    def _make(self, shard: int, batches: Iterator[tuple[list[int], Any]], skip_broken: bool) -> Tree:
        """Encode a shard from its batches and keep it, unless it has broken images that are not to be skipped."""
        moments, labels = [torch.empty(0, *self.row_shape, dtype=DTYPES[self.config.dtype])], [torch.empty(0).long()]
        index: list[int] = []
        broken: dict[int, str] = {}
        for _, rows in batches:
            broken |= rows["broken"]
            index += rows["index"]
            if rows["index"]:
                moments.append(self._moments(rows["images"], rows["index"]))
                labels.append(rows["labels"])
        record: Tree = {"skipped": sorted(broken.items())}
        if broken and not skip_broken:
            return record
        places = torch.tensor(index, dtype=torch.int64)
        tensors = {"moments": torch.cat(moments), "labels": torch.cat(labels), "index": places}
        content, path = save(tensors), self.files.path(shard, ".safetensors")
        write_atomically(path, content)
        sums, squares = channel_statistics(tensors["moments"])
        facts = Shard(path.name, len(index), len(content), hashlib.sha256(content).hexdigest())
        record = {"shard": asdict(facts), "sums": sums.tolist(), "squares": squares.tolist()} | record
        self.files.write_record(shard, record)
        return record

    def _moments(self, images_BCHW: Tensor, index: Sequence[int]) -> Tensor:
        """[B, F, M, C, H, W] on the CPU. EncodingError if one does not fit the dtype, or all not the memory."""
        remedy = f"lower encode.batch_size (now {self.config.batch_size}), or set first_stage.slicing=true"
        with enough_memory(EncodingError, remedy):
            images = images_BCHW.to(join_processes().device, non_blocking=True)
            ways = [images, images.flip(-1)] if self.config.flips else [images]
            each = [torch.stack([m for m in self.stage.encode_raw(way) if m is not None], 1) for way in ways]
        moments = torch.stack(each, 1).to(DTYPES[self.config.dtype]).cpu()
        finite_B = moments.isfinite().flatten(1).all(1)
        if not finite_B.all():
            bad = [i for i, fine in zip(index, finite_B.tolist(), strict=True) if not fine]
            problem = f"the latents of images {bad[:8]} are not finite in {self.config.dtype}"
            raise EncodingError(f"{problem}; set encode.dtype=bf16 or fp32, and first_stage.precision=fp32")
        return moments

    # ---------------------------------------------------------------------------------------------------- all together

    def _finish(self, records: Sequence[Tree]) -> Manifest:
        there = os.listdir(self.folder / SHARDS)
        if lost := [record["shard"]["file"] for record in records if record["shard"]["file"] not in there]:
            problem = f"{first_few(lost)} of the shards in {self.folder / SHARDS} are not there"
            raise EncodingError(f"{problem}; do all nodes see the same disk?")
        shards = tuple(Shard(**record["shard"]) for record in records)
        if not any(shard.count for shard in shards):
            raise EncodingError(f"all {len(self.dataset)} images are broken; nothing was encoded")
        flips, moments, channels, height, width = self.row_shape
        mean_C, std_C = mean_and_std(
            [(record["sums"], record["squares"]) for record in records],
            sum(shard.count for shard in shards) * flips * height * width,
        )
        manifest = Manifest(
            class_names=tuple(self.dataset.class_names),
            image_shape=self.dataset.image_shape,
            latent_shape=(channels, height, width),
            moments=moments,
            flips=self.config.flips,
            dtype=self.config.dtype,
            autoencoder=configs.dump(configs.located(self.stage.config, Path.cwd())),
            mean=tuple(mean_C.tolist()),
            std=tuple(std_C.tolist()),
            encoding=self.encoding,
            skipped=tuple((i, problem) for record in records for i, problem in record["skipped"]),
            shards=shards,
            passed_over=getattr(self.dataset, "passed_over", {}),
        )
        write_manifest(self.folder, manifest)
        (self.folder / BROKEN).unlink(missing_ok=True)
        return manifest

    def _refuse_broken(self, broken: dict[int, str]) -> NoReturn:
        """List the broken images in a file, and raise."""
        path = self.folder / BROKEN
        listed = [{"index": i, "problem": problem} for i, problem in sorted(broken.items())]
        on_main(lambda: write_atomically(path, json.dumps(listed, indent=1) + "\n"))
        more, them = (f" and {len(broken) - 1} more, listed in {path}", "them") if len(broken) > 1 else ("", "it")
        remedy = f"mend {them} in place and run the same command again, or leave {them} out by --skip-broken"
        raise EncodingError(f"{broken[min(broken)]}{more}; {remedy}")


def described(config: EncodeConfig) -> tuple[Tree, Tree]:
    """What an encoding records of its config: the section of the images, and all else that decides bytes."""
    images = {"name": DATASETS.name_of(config.images), **configs.dump(config.images)}
    return images, {name: value for name, value in asdict(config).items() if name not in ("images", "workers")}


class _ReadableRows:
    """A data set that gives the rows of a batch that can be read, and says what is wrong with the others."""

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
