"""Features of images, kept on disk in shards that any number of processes make, stopped and continued at will.

The features are always the same on the same kind of device, with the same number of threads per process: on a CPU,
convolutions round differently when they are cut among more threads.
"""

# B batch, N images of a set, C channels, H height, W width, D feature width, P pixels of a thumbnail

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NotRequired, Self, TypedDict

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dit_moe.config import Tree, WorkFailed, convert, differences
from dit_moe.data.npz import image_writer
from dit_moe.distributed import enough_memory, from_main, join_processes, locked, on_all, on_main
from dit_moe.evaluation.sources.base import FEATURES_MANIFEST, Source
from dit_moe.extractors import FeatureExtractor
from dit_moe.files import require_writable, write_atomically
from dit_moe.json_files import Count, Size, checked, load, parse, require_format
from dit_moe.metrics import FeatureSet
from dit_moe.shards import FixedShards

FORMAT = 1
TENSORS = {  # in a shard: attribute of a FeatureSet
    "features": "features_ND",
    "spatial": "spatial_NS",
    "thumbnails": "thumbnails_NP",
    "labels": "labels_N",
}
KINDS = {  # of these: dimensions, dtypes
    "features": (2, (torch.float32, torch.float64)),
    "spatial": (2, (torch.float32, torch.float64)),
    "thumbnails": (2, (torch.uint8,)),
    "labels": (1, (torch.int64,)),
}
SHARDS = 16  # of a small set, so that several processes have work
SHARD_SIZES = (32, 500)  # least and most
BATCH_SIZE = 100
THUMBNAIL = 32  # pixels


@dataclass(frozen=True)
class ExtractedFeatures:
    """The features of a set, what decides them, and what a result records of their origin."""

    features: FeatureSet
    identity: Tree
    described: Tree
    content_N: tuple[bytes, ...] | None = None  # a hash of each image, as far as its thumbnail shows; None: not known


@dataclass(frozen=True)
class FeatureManifest:
    """What a folder of features holds. `name`, `facts` and `device` have no part in what the features are."""

    format: int
    source: Tree  # Source.identity()
    extractor: Tree  # FeatureExtractor.identity()
    name: str
    facts: Tree
    count: Size
    image_shape: tuple[Size, Size, Size]
    device: str
    shard_size: Size

    @classmethod
    def read(cls, path: Path) -> Self:
        """ValueError if the file is anything else."""
        remedy = "name another folder by --features, or delete that one"
        found = load(path, remedy)
        require_format(found, FORMAT, path, remedy)
        return checked(found, cls, str(path), remedy)

    def identity(self) -> Tree:
        """All that decides the features and how they are kept, as a file has it."""
        entries = asdict(self)
        return json.loads(json.dumps({key: entries[key] for key in entries.keys() - {"name", "facts", "device"}}))

    def key_of(self, shard: int) -> str:
        """What a shard records of itself: which features it is part of, and its number among them."""
        what = json.dumps([self.source, self.extractor, self.shard_size], sort_keys=True)
        return f"{hashlib.sha256(what.encode()).hexdigest()[:16]} {shard}"


class _ShardFacts(TypedDict):
    """What a shard says of itself."""

    tally: dict[str, Count]
    place: NotRequired[str]


class FeatureFolder:
    """Features on disk, a manifest and shards, with what a `Source` tells of their images."""

    def __init__(self, path: Path, manifest: FeatureManifest) -> None:
        self.path, self.manifest = path, manifest
        self.name, self.image_shape, self.label_remedy = str(path), manifest.image_shape, Source.label_remedy
        self.class_names = tuple(manifest.facts.get("class_names") or ()) or None
        self.shards = math.ceil(manifest.count / manifest.shard_size)

    @classmethod
    def open(cls, path: Path) -> Self:
        """ValueError if a shard is missing, damaged or another's."""
        folder = cls(path, FeatureManifest.read(path / FEATURES_MANIFEST))
        for shard in range(folder.shards):
            with folder.open_shard(shard) as file:
                folder.counts_of(shard, file)
        return folder

    def require_extractor(self, extractor: FeatureExtractor) -> None:
        """ValueError if the features are of another one."""
        found = differences(self.manifest.extractor, json.loads(json.dumps(extractor.identity())))
        if unlike := ", ".join(f"{key}={_short(was)}, not {_short(now)}" for key, (was, now) in found):
            raise ValueError(f"{self.path} holds features of another extractor, {unlike}; name it by --extractor")

    def __len__(self) -> int:
        return self.manifest.count

    def facts(self) -> Tree:
        """What is known of how the images were made."""
        return self.manifest.source | self.manifest.facts

    def shard_path(self, shard: int) -> Path:
        return self.path / f"{shard:05d}.safetensors"

    def rows(self, shard: int) -> int:
        """How many images a shard is of."""
        return min(self.manifest.shard_size, self.manifest.count - shard * self.manifest.shard_size)

    @contextmanager
    def open_shard(self, shard: int) -> Iterator[Any]:
        """ValueError if it is missing, or if what is read of it in the block is damaged or not there."""
        if not self.shard_path(shard).is_file():
            remedy = "run the command that makes it again; on several nodes, give --features a folder that all see"
            raise ValueError(f"{self.shard_path(shard)} is not there; {remedy}")
        try:
            with safe_open(self.shard_path(shard), "pt") as file:
                yield file
        except (OSError, SafetensorError) as error:
            raise self._refusal(shard, f"cannot be read ({error})") from None

    def _refusal(self, shard: int, problem: str) -> ValueError:
        return ValueError(f"{self.shard_path(shard)} {problem}; delete it and run the command that makes it again")

    def counts_of(self, shard: int, file: Any) -> dict[str, int]:
        """What was counted while the images of an open shard were made. ValueError if it is not that shard."""
        recorded = file.metadata() or {}
        try:
            before = {"tally": parse(recorded["tally"])} if "shard" not in recorded else {}  # the older way
            facts = convert(_ShardFacts, before or parse(recorded["shard"]))
        except (ValueError, KeyError):
            raise self._refusal(shard, "holds no features") from None
        counts: dict[str, int] = facts["tally"]
        place = facts.get("place", self.manifest.key_of(shard))
        if place != self.manifest.key_of(shard):
            raise self._refusal(shard, "holds the features of other images, those of another folder or number")
        return counts

    @cached_property
    def known(self) -> frozenset[str]:
        """The attributes of a FeatureSet that are kept."""
        with self.open_shard(0) as file:
            return frozenset(TENSORS[name] for name in TENSORS.keys() & set(file.keys()))

    @cached_property
    def labels_N(self) -> Tensor | None:
        """int64, one for each image, if there are any."""
        return self._read("labels") if "labels_N" in self.known else None

    def read(self, extractor: FeatureExtractor, needs: Set[str] = frozenset(TENSORS.values())) -> ExtractedFeatures:
        """The features and labels, and what else of a FeatureSet `needs` names and is kept."""
        manifest, counts = self.manifest, Counter[str]()
        for shard in range(self.shards):
            with self.open_shard(shard) as file:
                counts.update(self.counts_of(shard, file))
        needs = (needs | {"features_ND", "labels_N"}) & self.known
        found: dict[str, Any] = {needed: self._read(name) for name, needed in TENSORS.items() if needed in needs}
        logits_NK = extractor.logits(found["features_ND"]) if extractor.has_logits else None
        if logits_NK is not None and extractor.classes is not None:
            found["predictions_N"] = logits_NK.argmax(1)
        described = self.facts() | {"name": manifest.name, "count": manifest.count}
        described |= {"image_shape": list(manifest.image_shape), "device": manifest.device}
        if counts.get("tokens"):
            described["active_experts"] = counts["pairs"] / counts["tokens"]
        features = FeatureSet(manifest.name, manifest.count, logits_NK=logits_NK, **found)
        return ExtractedFeatures(features, manifest.source, described, self._content())

    def _content(self) -> tuple[bytes, ...] | None:
        if "thumbnails_NP" not in self.known:
            return None
        rows = self._read("thumbnails").numpy()
        return tuple(hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows)

    def _read(self, name: str) -> Tensor:
        """A tensor of all images, without ever having a shard twice in memory."""
        whole: Tensor | None = None
        ndim, dtypes = KINDS[name]
        for shard in range(self.shards):
            with self.open_shard(shard) as file:
                rows: Tensor = file.get_tensor(name)
            like = rows if whole is None else whole
            fits = rows.ndim == ndim and len(rows) == self.rows(shard) and rows.shape[1:] == like.shape[1:]
            if not fits or rows.dtype not in dtypes or rows.dtype != like.dtype:
                found = f"{rows.dtype} {list(rows.shape)}".removeprefix("torch.")
                raise self._refusal(shard, f"holds {name} of another kind, {found}")
            if not rows.isfinite().all():
                raise self._refusal(shard, f"holds {name} that are NaN or infinite")
            whole = rows.new_empty(self.manifest.count, *rows.shape[1:]) if whole is None else whole
            whole[shard * self.manifest.shard_size :][: len(rows)] = rows
        assert whole is not None, "a set has at least one image"
        return whole


# ---------------------------------------------------------------------------------------------------------- extraction


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
        raise ValueError(f"{path} holds features with {key}={_short(was)}, not {_short(wanted)}{also}; {remedy}")


def _short(value: object) -> str:
    return f"{value[:12]}…" if isinstance(value, str) and len(value) == 64 else str(value)  # a hash


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
