"""Images of another size, or another number of channels, than their source has them."""

# B batch, C channels, H height, W width

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dit_moe.data.images import crop
from dit_moe.evaluation.sources.base import Opened, ReadOptions, Source

# ITU-R 601-2, in 16 bits and rounded, as Pillow makes grey of colours
LUMINANCE, HALF, BITS = (19595, 38470, 7471), 0x8000, 16


def converted(opened: Opened, options: ReadOptions) -> Opened:
    """`opened`, its images, the held-out ones too, brought to `options.size` and `channels` where they are not so."""
    return replace(
        opened,
        source=opened.source and convert(opened.source, options),
        heldout=opened.heldout and convert(opened.heldout, options),
    )


def convert(source: Source, options: ReadOptions) -> Source:
    """`source` itself if its images have `options.size` and `channels`, or none is given."""
    found, height, width = source.image_shape
    size = None if options.size is None or options.size == height == width else options.size
    channels = None if options.channels in (None, found) else options.channels
    return Converted(source, size, channels) if size or channels else source


class Converted(Source):
    """The images of another source.

    Args:
        source: the images.
        size: ADM's centre crop to so many pixels square; None: as they are.
        channels: 3 repeats grey, 1 takes the luminance of colours; None: as they are.
    """

    def __init__(self, source: Source, size: int | None, channels: int | None) -> None:
        self.source, self.size, self.channels, self.name = source, size, channels, source.name
        self.batch_size = source.batch_size
        of_source = source.image_shape
        self.image_shape = (channels or of_source[0], size or of_source[1], size or of_source[2])

    @property
    def labels_N(self) -> Tensor | None:  # type: ignore[override]
        return self.source.labels_N

    @property
    def label_remedy(self) -> str:  # type: ignore[override]
        return self.source.label_remedy

    def __len__(self) -> int:
        return len(self.source)

    def identity(self) -> dict[str, Any]:
        changes = {"size": self.size, "channels": self.channels}
        return self.source.identity() | {"converted": {name: value for name, value in changes.items() if value}}

    def facts(self) -> dict[str, Any]:
        return self.source.facts()

    def tally(self) -> dict[str, int]:
        return self.source.tally()

    def batches(self, parts: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        for images_BCHW in self.source.batches(parts):
            if self.size:
                images_BCHW = resize(images_BCHW, self.size)
            yield images_BCHW if self.channels is None else _with_channels(images_BCHW, self.channels)


def resize(images_BCHW: Tensor, size: int) -> Tensor:
    """ADM's centre crop of uint8 images, [B, C, size, size]."""
    count, channels = images_BCHW.shape[:2]
    resized_BHWC = np.empty((count, size, size, channels), np.uint8)
    for resized, image in zip(resized_BHWC, images_BCHW.permute(0, 2, 3, 1).cpu().numpy(), strict=True):
        picture = Image.fromarray(image.squeeze(-1) if channels == 1 else image)
        resized[:] = crop(picture, size).reshape(size, size, channels)
    return torch.from_numpy(resized_BHWC).permute(0, 3, 1, 2)


def _with_channels(images_BCHW: Tensor, channels: int) -> Tensor:
    if channels == 3:
        return images_BCHW.expand(-1, 3, -1, -1)
    weights_C11 = torch.tensor(LUMINANCE, device=images_BCHW.device).view(3, 1, 1)
    sums_B1HW = (images_BCHW.long() * weights_C11).sum(1, keepdim=True)
    return ((sums_B1HW + HALF) >> BITS).to(torch.uint8)
