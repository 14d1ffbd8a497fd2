"""Splits of one place of images by shares: which are trained on, which held out, which reserved for an extractor."""

# N images

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from dit_moe.config import ConfigError
from dit_moe.data.listing import note
from dit_moe.formatting import first_few

if TYPE_CHECKING:
    from dit_moe.data.image_source import ImageSource

DOING = {"train": "trained on", "heldout": "held out", "extractor": "reserved for the feature extractor"}


def divide(source: ImageSource, split: str) -> dict[str, np.ndarray] | None:
    """The images of every split that shares make of those of `source`; None if no share makes the split `split`.

    A hash of its key alone decides where an image belongs, so adding images moves none.

    Raises ConfigError if `split` gets no image, or a class none to train on.
    """
    config, place, labels_N = source.config, source.place, source.labels_N
    heldout, reserve = config.heldout if isinstance(config.heldout, float) else 0.0, config.reserve or 0.0
    if not (heldout or reserve) or (split == "heldout" and not heldout):
        return None
    at_N = np.array([_place_in_0_1(source.key(image)) for image in range(len(labels_N))])
    masks = {"train": (at_N >= heldout) & (at_N < 1 - reserve)}
    masks |= {"heldout": at_N < heldout} if heldout else {}
    masks |= {"extractor": at_N >= 1 - reserve} if reserve else {}
    rows_of = {name: np.flatnonzero(mask_N) for name, mask_N in masks.items()}
    shares = f"heldout={config.heldout} and reserve={config.reserve}"
    if not len(rows_of[split]):
        problem = f"the shares {shares} leave none of its {len(at_N)} images to the split {split}"
        raise ConfigError("heldout", f": {place}: {problem}; add images, or change the shares")
    if lost := sorted({*labels_N.tolist()} - {*labels_N[rows_of["train"]].tolist()}):
        classes = first_few([source.class_names[label] for label in lost])
        problem = f"the shares {shares} leave no image to train on of the class {classes}"
        raise ConfigError("heldout", f": {place}: {problem}; add images, or lower the shares")
    note(f"{place}: " + ", ".join(f"{len(rows):,} images are {DOING[name]}" for name, rows in rows_of.items()))
    return rows_of


def facts_of_shares(source: Any) -> Mapping[str, Any]:
    """What a record says of the splits that shares made: how many images each has."""
    counts = getattr(source, "split_counts", None)
    return {"split_counts": counts} if counts else {}


def _place_in_0_1(key: bytes) -> float:
    return int.from_bytes(hashlib.sha256(key).digest()[:6], "big") / 2**48
