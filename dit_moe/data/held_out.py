"""Whether images that are held out are trained on after all: the same files, through links too, or copies of them."""

# N images of a data set, B of them that are looked at

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import fields
from typing import Any

import numpy as np

from dit_moe.config import ConfigError
from dit_moe.data.base import Dataset
from dit_moe.data.image_source import ImageSource
from dit_moe.data.images import BadImage
from dit_moe.data.latents import LatentShards
from dit_moe.data.listing import note
from dit_moe.formatting import first_few

LOOKED_AT = 500  # held-out images, spread evenly, that are looked for among those of training
LISTED = 20_000  # images of training whose sizes are looked up to find them; of more, only a copy of all is found


def require_held_out(trained: Dataset | LatentShards, heldout: Dataset | LatentShards) -> None:
    """ConfigError if files of the split `heldout` are read in training too, or if its images are copies of those.

    A part that is trained on is counted and said on stderr.
    """
    remedy = "name images that are not trained on, or set heldout=null"
    if shared := sorted(parts_of(trained) & parts_of(heldout)):
        raise ConfigError("heldout", f" has {first_few(shared)}, which is trained on; {remedy}")
    if not (isinstance(trained, ImageSource) and isinstance(heldout, ImageSource)):
        return
    rows_B = np.unique(np.linspace(0, len(heldout.labels_N) - 1, LOOKED_AT).astype(int))
    content = set(_hashes(trained, _candidates(trained, heldout, rows_B).tolist()))
    found = sum(each in content for each in _hashes(heldout, rows_B.tolist())) if content else 0
    if found == len(rows_B):
        raise ConfigError("heldout", f" holds copies of images that are trained on; {remedy}")
    if found:
        note(f"{found} of {len(rows_B)} held-out images that were looked at are trained on: distances to them read low")


def names_heldout(config: Any) -> bool:
    """Whether the options of a data set say which images are held out; what they have by default may not suit it."""
    default = next((field.default for field in fields(config) if field.name == "heldout"), None)
    return getattr(config, "heldout", None) not in (None, default)


def parts_of(dataset: Dataset | LatentShards) -> set[str]:
    """What a split is read from: real paths, or hashes."""
    return set(getattr(dataset, "parts", ()))


def _candidates(trained: ImageSource, heldout: ImageSource, rows_B: np.ndarray) -> np.ndarray:
    """Images of training that may be copies of these held-out ones: of equal sizes, or in a data set of equal names."""
    if len(trained.labels_N) <= LISTED:
        return np.flatnonzero(np.isin(trained.sizes(range(len(trained.labels_N))), heldout.sizes(rows_B.tolist())))
    return rows_B if trained.fingerprint == heldout.fingerprint else rows_B[:0]


def _hashes(dataset: ImageSource, images: Iterable[int]) -> Iterator[bytes]:
    for image in images:
        with suppress(OSError, BadImage):  # is told when the image is used
            yield hashlib.sha256(dataset.read(image)).digest()
