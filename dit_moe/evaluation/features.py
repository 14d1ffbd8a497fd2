"""Features of images, kept on disk as a manifest and shards."""

# N images of a set, D feature width, S spatial feature width, P pixels of a thumbnail

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NotRequired, Self, TypedDict

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dit_moe.config import Tree, convert, differences
from dit_moe.evaluation.sources.base import FEATURES_MANIFEST, Source
from dit_moe.extractors import FeatureExtractor
from dit_moe.json_files import Count, Size, checked, load, parse, require_format
from dit_moe.metrics import FeatureSet

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
        if unlike := ", ".join(f"{key}={shorter(was)}, not {shorter(now)}" for key, (was, now) in found):
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


def shorter(value: object) -> str:
    return f"{value[:12]}…" if isinstance(value, str) and len(value) == 64 else str(value)  # a hash
