"""Images → features on disk, shard by shard: any number of processes, stopped and continued at will, the same features.

The same, that is, on the same kind of device, with the same number of threads per process: on a CPU, convolutions round
differently when cut among more threads.

A shard holds the features of fixed places in the set. One process makes it, in batches that start at its first image,
so neither the number of processes nor the point where they were stopped has a part in what a batch is.
"""

# B batch, N images of a set, C channels, H height, W width, D feature width, P pixels of a thumbnail

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dit_moe.config import differences
from dit_moe.data.npz import image_writer
from dit_moe.distributed import join_processes, locked, on_all, on_main
from dit_moe.evaluation.sources.base import Source
from dit_moe.evaluation.stored import (
    FORMAT,
    MANIFEST,
    TENSORS,
    Extracted,
    facts_of,
    place_of,
    read_features,
    read_manifest,
    shard_path,
    short,
)
from dit_moe.extractors import FeatureExtractor
from dit_moe.files import require_writable, write_atomically

SHARDS = 16  # of a small set, so that several processes have work
SHARD_SIZES = (32, 500)  # least and most
BATCH_SIZE = 100
THUMBNAIL = 32  # pixels
SAYING = {"name", "facts", "device"}  # of a manifest: no part in what the features are


class Extraction:
    """The features of one source in one folder.

    Args:
        source: the images.
        extractor: on its device.
        folder: made if need be; what is there already is kept.
        keep_images: put the images into the shards, too, for `images` to give them back.

    Raises ValueError, on all processes, if the extractor does not take such images, or if the folder holds features of
    other images or of another extractor.
    """

    def __init__(
        self,
        source: Source,
        extractor: FeatureExtractor,
        folder: Path,
        *,
        keep_images: bool = False,
    ) -> None:
        extractor.check(source.image_shape)
        self.source, self.extractor, self.folder, self.keep_images = source, extractor, folder, keep_images
        self.batch_size = source.batch_size or BATCH_SIZE
        # Only the main process reads the disk before the work: hashing may take long, and others' views may be old.
        main = join_processes().is_main_process
        self.manifest: dict[str, Any] = on_all(lambda: self._begin() if main else {})[0]
        self.shard_size: int = self.manifest["shard_size"]
        self.shards = math.ceil(len(source) / self.shard_size)

    def _begin(self) -> dict[str, Any]:
        require_writable(self.folder)
        path, count = self.folder / MANIFEST, len(self.source)
        least, most = SHARD_SIZES
        manifest = {
            "format": FORMAT,
            "source": self.source.identity(),
            "extractor": self.extractor.identity(),
            "name": self.source.name,
            "facts": self.source.facts(),
            "count": count,
            "image_shape": list(self.source.image_shape),
            "device": join_processes().device.type,
            "shard_size": min(most, max(least, math.ceil(count / SHARDS))),
        }
        manifest = json.loads(json.dumps(manifest))  # as it will be read
        if path.is_file():
            earlier = read_manifest(path)
            manifest["shard_size"] = earlier.get("shard_size")
            self._require_same(earlier, manifest)
        return manifest

    def _claim(self) -> None:
        """Say what the folder holds, unless another process has come first with something else since."""
        path = self.folder / MANIFEST
        if path.is_file():
            self._require_same(read_manifest(path), self.manifest)
        write_atomically(path, json.dumps(self.manifest, indent=1) + "\n")

    def _require_seen(self) -> None:
        if not (self.folder / MANIFEST).is_file():
            raise ValueError(f"{self.folder} is not seen by every node; name a folder that is by --features")

    def _require_same(self, earlier: dict[str, Any], manifest: dict[str, Any]) -> None:
        found = sorted(
            (key, pair) for key, pair in differences(earlier, manifest) if key.partition(".")[0] not in SAYING
        )
        if found:
            (key, (was, now)), *rest = found
            others = [name for name in dict.fromkeys(_plain(other) for other, _ in rest) if name != _plain(key)]
            also = f", as do {', '.join(others)}" if others else ""
            remedy = "name another folder by --features, or delete that one"
            raise ValueError(
                f"{self.folder} holds features with {_plain(key)}={short(was)}, not {short(now)}{also}; {remedy}"
            )

    def missing(self) -> list[int]:
        """The shards still to make."""
        return [shard for shard in range(self.shards) if not self._is_whole(shard)]

    def count(self, shards: list[int]) -> int:
        """How many images belong into these shards."""
        return sum(len(self._rows(shard)) for shard in shards)

    def run(
        self, on_images: Callable[[int], object] = lambda count: None, needs: Set[str] = frozenset(TENSORS.values())
    ) -> Extracted | None:
        """Make what is missing, together; the main process gets the features, the others None.

        `on_images(n)` is called after every batch of this process; `needs` are the attributes of a FeatureSet to read.
        Raises on all processes what one of them raises.
        """
        with locked(self.folder):
            on_main(self._claim)
            on_all(self._require_seen)
            self._make_missing(on_images)
        read: list[Extracted] = []
        on_main(lambda: read.append(read_features(self.folder, self.manifest, self.extractor, needs)))
        return read[0] if read else None

    def _make_missing(self, on_images: Callable[[int], object]) -> None:
        state = join_processes()
        missing = on_all(lambda: self.missing() if state.is_main_process else [])[0]
        mine = missing[state.process_index :: state.num_processes]
        batches = self.source.batches([part for shard in mine for part in self._parts(shard)])  # so that it reads ahead
        turns = iter(mine)
        for _ in range(0, len(missing), state.num_processes):  # together, so that no one waits long for another
            on_all(lambda: self._make(next(turns, None), batches, on_images))

    def save_npz(self, path: Path) -> None:
        """Write the kept images, shard by shard, as `images.npz`."""
        labels_N = self.source.labels_N
        with image_writer(path, len(self.source), None if labels_N is None else labels_N.numpy()) as add:
            for shard in range(self.shards):
                with safe_open(shard_path(self.folder, shard), "pt") as file:
                    add(file.get_tensor("images").permute(0, 2, 3, 1).numpy())

    # ------------------------------------------------------------------------------------------------------- one shard

    def _rows(self, shard: int) -> range:
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, len(self.source)))

    def _parts(self, shard: int) -> list[list[int]]:
        rows, size = self._rows(shard), self.batch_size
        return [list(rows[i : i + size]) for i in range(0, len(rows), size)]

    def _is_whole(self, shard: int) -> bool:
        """It took its name only once it was complete; but disks fail."""
        try:
            with safe_open(shard_path(self.folder, shard), "pt") as file:
                facts_of(shard_path(self.folder, shard), file, place_of(self.manifest, shard))
                shape: list[int] = file.get_slice("features").get_shape()
                has_images = not self.keep_images or "images" in file.keys()  # noqa: SIM118 (it is no dict)
                return has_images and shape[0] == len(self._rows(shard))
        except (OSError, SafetensorError):
            return False

    def _make(self, shard: int | None, batches: Iterator[Tensor], on_images: Callable[[int], object]) -> None:
        if shard is None:
            return
        rows, made = self._rows(shard), dict[str, list[Tensor]]()
        for part in self._parts(shard):
            for name, tensor in self._of(next(batches), part).items():
                made.setdefault(name, []).append(tensor)
            on_images(len(part))
        if self.source.labels_N is not None:
            made["labels"] = [self.source.labels_N[rows.start : rows.stop]]
        tensors = {name: torch.cat(parts).contiguous() for name, parts in made.items()}
        facts = {"tally": self.source.tally(), "place": place_of(self.manifest, shard)}
        write_atomically(shard_path(self.folder, shard), save(tensors, {"shard": json.dumps(facts)}))

    def _of(self, images_BCHW: Tensor, part: list[int]) -> dict[str, Tensor]:
        features_BD, spatial_BS = self.extractor(images_BCHW)
        if features_BD.shape != (len(part), self.extractor.dim):
            gave = f"features of shape {tuple(features_BD.shape)} for {len(part)} images"
            raise ValueError(f"{self.extractor.name} gave {gave}; wanted ({len(part)}, {self.extractor.dim})")
        for rows_BD in (features_BD, spatial_BS):
            if rows_BD is not None and not rows_BD.isfinite().all():
                row = part[int((~rows_BD.isfinite()).any(1).nonzero()[0])]
                problem = f"the features of image {row} are NaN or infinite"
                raise ValueError(f"{self.source.name}: {problem}; look at the image")
        found = {"features": features_BD, "thumbnails": thumbnails(images_BCHW).cpu()}
        found |= {} if spatial_BS is None else {"spatial": spatial_BS}
        return found | ({"images": images_BCHW.cpu()} if self.keep_images else {})


def _plain(key: str) -> str:
    """A key of a manifest in the user's words."""
    return key.removeprefix("source.").removeprefix("experiment.")


def thumbnails(images_BCHW: Tensor) -> Tensor:
    """uint8 [B, P]: the pixels themselves, of images larger than 32×32 means over equal areas."""
    height, width = images_BCHW.shape[2:]
    if max(height, width) > THUMBNAIL:
        size = (min(height, THUMBNAIL), min(width, THUMBNAIL))
        images_BCHW = F.adaptive_avg_pool2d(images_BCHW.float(), size).round().to(torch.uint8)
    return images_BCHW.flatten(1)


@contextmanager
def temporary_unless(folder: Path | None) -> Iterator[Path]:
    """`folder`, or one for all processes that is gone when the block ends."""
    if folder is not None:
        yield folder
        return
    made: list[tempfile.TemporaryDirectory[str]] = []
    on_main(lambda: made.append(tempfile.TemporaryDirectory(prefix="features-")))
    try:
        yield Path(on_all(lambda: made[0].name if made else "")[0])
    finally:
        for each in made:
            each.cleanup()
