"""What a dataset is: images (later also latents) with labels, fetched a whole batch at a time."""

# B batch, C channels, H height, W width

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from dit_moe.registry import Registry

DATASETS = Registry("dataset")  # DATASETS.build(config, split)


class Dataset(Protocol):
    """A map-style dataset. `DATASETS.build(config, split)` makes one; ValueError if there is no such split.

    `__getitems__` is what torch's loaders call with a whole batch of indices, so one call serves one read of a shard.
    """

    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]  # (C, H, W)

    def __len__(self) -> int: ...

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """{"images": uint8 [B, C, H, W], "labels": int64 [B]}, rows in the order of `indices`."""
        ...
