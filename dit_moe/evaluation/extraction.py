"""Features of images are made: missing shards by all processes together, stopped and continued at will.

They are always the same on the same kind of device, with the same number of threads per process: on a CPU, convolutions
round differently when they are cut among more threads.
"""

# B batch, N images of a set, C channels, H height, W width, D feature width, P pixels of a thumbnail

from __future__ import annotations

import json
import math
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dit_moe.config import WorkFailed, differences
from dit_moe.data.npz import image_writer
from dit_moe.distributed import enough_memory, from_main, join_processes, locked, on_all, on_main
from dit_moe.evaluation.features import FORMAT, TENSORS, ExtractedFeatures, FeatureFolder, FeatureManifest, shorter
from dit_moe.evaluation.sources.base import FEATURES_MANIFEST, Source
from dit_moe.extractors import FeatureExtractor
from dit_moe.files import require_writable, write_atomically
from dit_moe.shards import FixedShards

SHARDS = 16  # of a small set, so that several processes have work
SHARD_SIZES = (32, 500)  # least and most
BATCH_SIZE = 100
THUMBNAIL = 32  # pixels


class Extraction:
    """The features of one source in one folder.

    Args:
        source: the images.
        extractor: on its device.
        path: of the folder, which is made if need be; features that are there already are kept.
        keep_images: put the images into the shards, too, for `save_npz`.

    Raises ValueError, on all processes, if the extractor does not take such images, or if the folder holds features of
    other images or of another extractor.
    """

    def __init__(self, source: Source, extractor: FeatureExtractor, path: Path, *, keep_images: bool = False) -> None:
        extractor.check(source.image_shape)
        self.source, self.extractor, self.keep_images = source, extractor, keep_images
        # Only the main process reads the disk before the work: hashing may take long, and others' views may be old.
        self.folder = FeatureFolder(path, from_main(lambda: self._begin(path)))
        self.shards = FixedShards(len(source), self.folder.manifest.shard_size, source.batch_size or BATCH_SIZE)

    def _begin(self, path: Path) -> FeatureManifest:
        require_writable(path)
        count, (least, most) = len(self.source), SHARD_SIZES
        earlier = FeatureManifest.read(path / FEATURES_MANIFEST) if (path / FEATURES_MANIFEST).is_file() else None
        manifest = FeatureManifest(
            format=FORMAT,
            source=json.loads(json.dumps(self.source.identity())),  # as it will be read
            extractor=json.loads(json.dumps(self.extractor.identity())),
            name=self.source.name,
            facts=json.loads(json.dumps(self.source.facts())),
            count=count,
            image_shape=self.source.image_shape,
            device=join_processes().device.type,
            shard_size=earlier.shard_size if earlier else min(most, max(least, math.ceil(count / SHARDS))),
        )
        if earlier is not None:
            _require_same(path, earlier, manifest)
        return manifest

    def _write_manifest(self) -> None:
        """Say what the folder holds, unless another process has written something else since."""
        path = self.folder.path / FEATURES_MANIFEST
        if path.is_file():
            _require_same(self.folder.path, FeatureManifest.read(path), self.folder.manifest)
        write_atomically(path, json.dumps(asdict(self.folder.manifest), indent=1) + "\n")

    def _require_visible(self) -> None:
        if not (self.folder.path / FEATURES_MANIFEST).is_file():
            raise ValueError(f"{self.folder.path} is not seen by every node; name a folder that is by --features")

    def images_to_make(self) -> int:
        """How many images are in shards that are still to be made."""
        return self.shards.rows_in([shard for shard in range(len(self.shards)) if self._find(shard) is None])

    def run(
        self, on_images: Callable[[int], object] = lambda count: None, needs: Set[str] = frozenset(TENSORS.values())
    ) -> ExtractedFeatures | None:
        """Make what is missing, together; the main process gets the features, the others None.

        `on_images(n)` is called after every batch of this process; `needs` are the attributes of a FeatureSet to read.
        Raises on all processes what one of them raises.
        """
        with locked(self.folder.path):
            on_main(self._write_manifest)
            on_all(self._require_visible)
            self.shards.make_missing(self._find, self.source.batches, self._make, on_images)
        return on_main(lambda: self.folder.read(self.extractor, needs))

    def save_npz(self, path: Path) -> None:
        """Write the kept images, shard by shard, as `images.npz`."""
        labels_N = self.source.labels_N
        with image_writer(path, len(self.source), None if labels_N is None else labels_N.numpy()) as add:
            for shard in range(len(self.shards)):
                with self.folder.open_shard(shard) as file:
                    add(file.get_tensor("images").permute(0, 2, 3, 1).numpy())

    def _find(self, shard: int) -> bool | None:
        """True if a shard is there and complete. It took its name only when it was, but disks fail."""
        path = self.folder.shard_path(shard)
        try:
            with safe_open(path, "pt") as file:
                self.folder.counts_of(shard, file)
                shape: list[int] = file.get_slice("features").get_shape()
                has_images = not self.keep_images or "images" in file.keys()  # noqa: SIM118 (it is no dict)
                return (has_images and shape[:1] == [self.folder.rows(shard)]) or None
        except (OSError, SafetensorError):
            return None

    def _make(self, shard: int, batches: Iterator[tuple[list[int], Tensor]]) -> bool:
        made, rows = defaultdict[str, list[Tensor]](list), self.shards.rows(shard)
        for part, images_BCHW in batches:
            for name, tensor in self._tensors_of(images_BCHW, part).items():
                made[name].append(tensor)
        if self.source.labels_N is not None:
            made["labels"] = [self.source.labels_N[rows.start : rows.stop]]
        tensors = {name: torch.cat(parts).contiguous() for name, parts in made.items()}
        facts = {"tally": self.source.take_counts(), "place": self.folder.manifest.key_of(shard)}
        write_atomically(self.folder.shard_path(shard), save(tensors, {"shard": json.dumps(facts)}))
        return True

    def _tensors_of(self, images_BCHW: Tensor, part: list[int]) -> dict[str, Tensor]:
        many = f"{self.extractor.name} takes {len(part)} images {'×'.join(map(str, images_BCHW.shape[1:]))} at once"
        with enough_memory(WorkFailed, f"{many}, make them smaller by --size"):
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


def _require_same(path: Path, earlier: FeatureManifest, now: FeatureManifest) -> None:
    """ValueError, naming what differs, unless the features in the folder are those that are to be made."""
    found = {
        key.removeprefix("source.").removeprefix("experiment."): values
        for key, values in sorted(differences(earlier.identity(), now.identity()))
    }
    if found:
        (key, (was, wanted)), *others = found.items()
        also = f", as do {', '.join(other for other, _ in others)}" if others else ""
        remedy = "name another folder by --features, or delete that one"
        raise ValueError(f"{path} holds features with {key}={shorter(was)}, not {shorter(wanted)}{also}; {remedy}")


def thumbnails(images_BCHW: Tensor) -> Tensor:
    """uint8 [B, P]: the pixels themselves, of images larger than 32×32 means over equal areas."""
    height, width = images_BCHW.shape[2:]
    if max(height, width) > THUMBNAIL:
        size = (min(height, THUMBNAIL), min(width, THUMBNAIL))
        images_BCHW = F.adaptive_avg_pool2d(images_BCHW.float(), size).round().to(torch.uint8)
    return images_BCHW.flatten(1)


@contextmanager
def temporary_unless(path: Path | None) -> Iterator[Path]:
    """`path`, or a folder for all processes that is gone when the block ends."""
    if path is not None:
        yield path
        return
    made = on_main(lambda: tempfile.TemporaryDirectory(prefix="features-"))
    try:
        yield Path(from_main(lambda: made.name if made else ""))
    finally:
        if made:
            made.cleanup()
