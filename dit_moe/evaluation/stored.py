"""Features on disk: a folder of shards, and a manifest that says what they are of."""

# N images of a set, D feature width

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from dit_moe.config import differences
from dit_moe.extractors import FeatureExtractor
from dit_moe.metrics import FeatureSet

FORMAT = 1
MANIFEST = "features.json"
TENSORS = {
    "features": "features_ND",
    "spatial": "spatial_NS",
    "thumbnails": "thumbnails_NP",
    "labels": "labels_N",
}


@dataclass(frozen=True)
class Extracted:
    """The features of a set, what decides them, and what a result is to say of where they come from."""

    features: FeatureSet
    identity: dict[str, Any]
    described: dict[str, Any]


def read_manifest(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"{path} is no manifest of features; name another folder by --features, or delete that one")
    return found


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"{shard:05d}.safetensors"


def place_of(manifest: dict[str, Any], shard: int) -> str:
    """What a shard says of itself: of which features it is, and which place it has among them."""
    what = json.dumps([manifest["source"], manifest["extractor"], manifest["shard_size"]], sort_keys=True)
    return f"{hashlib.sha256(what.encode()).hexdigest()[:16]} {shard}"


def facts_of(path: Path, file: Any, place: str) -> dict[str, Any]:
    """What an open shard says of itself: its `tally`. ValueError if it does not belong to this `place`."""
    said = file.metadata() or {}
    if not said.keys() & {"shard", "tally"}:
        raise ValueError(f"{path} holds no features; delete it and run the command that makes it again")
    facts: dict[str, Any] = json.loads(said["shard"]) if "shard" in said else {"tally": json.loads(said["tally"])}
    if facts.get("place", place) != place:  # those of older versions do not say it
        problem = "holds the features of other images: it belongs into another folder, or under another number"
        raise ValueError(f"{path} {problem}; put it back, or delete it and run the command that makes it again")
    return facts


def short(value: object) -> str:
    return f"{value[:12]}…" if isinstance(value, str) and len(value) == 64 else str(value)  # a hash


@dataclass(frozen=True)
class Stored:
    """A folder of features, as far as it can be known without reading them."""

    folder: Path
    manifest: dict[str, Any]
    tensors: frozenset[str]  # attributes of a FeatureSet

    @classmethod
    def of(cls, folder: Path) -> Stored:
        """Of whatever extractor. ValueError if shards are missing."""
        manifest = read_manifest(folder / MANIFEST)
        for shard in range(_shards_of(manifest)):
            _require_shard(folder, shard)
            with safe_open(shard_path(folder, shard), "pt") as file:
                facts_of(shard_path(folder, shard), file, place_of(manifest, shard))
        with safe_open(shard_path(folder, 0), "pt") as file:
            tensors = frozenset(TENSORS[name] for name in TENSORS.keys() & set(file.keys()))
        return cls(folder, manifest, tensors)

    @classmethod
    def open(cls, folder: Path, extractor: FeatureExtractor) -> Stored:
        """ValueError if shards are missing, or if they are of another extractor."""
        stored, own = cls.of(folder), json.loads(json.dumps(extractor.identity()))
        manifest = stored.manifest
        if manifest["extractor"] != own:
            found = ", ".join(
                f"{key}={short(a)}, not {short(b)}" for key, (a, b) in differences(manifest["extractor"], own)
            )
            raise ValueError(f"{folder} holds features of another extractor, {found}; name it by --extractor")
        return stored

    def read(self, extractor: FeatureExtractor) -> Extracted:
        """The features."""
        return read_features(self.folder, self.manifest, extractor, self.tensors)

    def labels(self) -> Tensor | None:
        """int64, one for each image, if there are any."""
        if "labels_N" not in self.tensors:
            return None
        parts = []
        for shard in range(_shards_of(self.manifest)):
            with safe_open(shard_path(self.folder, shard), "pt") as file:
                parts.append(file.get_tensor("labels"))
        return torch.cat(parts)


def _shards_of(manifest: dict[str, Any]) -> int:
    return math.ceil(manifest["count"] / manifest["shard_size"])


def _require_shard(folder: Path, shard: int) -> None:
    if not shard_path(folder, shard).is_file():
        remedy = "run the command that makes it again; on several nodes, give --features a folder that all see"
        raise ValueError(f"{shard_path(folder, shard)} is not there; {remedy}")


def read_features(folder: Path, manifest: dict[str, Any], extractor: FeatureExtractor, needs: Set[str]) -> Extracted:
    found: dict[str, Any] = {}
    tally: dict[str, int] = {}
    needs = needs | {"features_ND", "labels_N"}
    for shard in range(_shards_of(manifest)):
        _require_shard(folder, shard)
        with safe_open(shard_path(folder, shard), "pt") as file:
            facts = facts_of(shard_path(folder, shard), file, place_of(manifest, shard))
            for name in (name for name in TENSORS if TENSORS[name] in needs and name in set(file.keys())):
                rows = file.get_tensor(name)
                whole = found.setdefault(TENSORS[name], rows.new_empty(manifest["count"], *rows.shape[1:]))
                whole[shard * manifest["shard_size"] :][: len(rows)] = rows
            for name, count in facts["tally"].items():
                tally[name] = tally.get(name, 0) + count
    logits_NK = extractor.logits(found["features_ND"]) if extractor.has_logits else None
    if logits_NK is not None and extractor.classes is not None:
        found["predictions_N"] = logits_NK.argmax(1)
    said = (
        manifest["source"]
        | manifest["facts"]
        | {name: manifest[name] for name in ("name", "count", "image_shape", "device")}
    )
    active = {"active_experts": tally["pairs"] / tally["tokens"]} if tally.get("tokens") else {}
    features = FeatureSet(manifest["name"], manifest["count"], logits_NK=logits_NK, **found)
    return Extracted(features, manifest["source"], said | active)
