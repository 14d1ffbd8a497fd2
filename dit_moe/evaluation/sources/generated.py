"""Images that are sampled when they are asked for, and never written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dit_moe.evaluation.sources.base import Source, sha256_of_labels
from dit_moe.moe import measure_active
from dit_moe.sampling.generator import Generator


class GeneratedSource(Source):
    """What a generator makes for these labels.

    Args:
        generator: with its sampler, seed and network.
        labels_N: the label of every image.
        name: what messages and results call it.
        identity: all that decides the images, JSON-ready.
        facts: what else a result should record.
    """

    labels_N: Tensor

    def __init__(
        self,
        generator: Generator,
        labels_N: Tensor,
        *,
        name: str,
        identity: dict[str, Any],
        facts: dict[str, Any] | None = None,
    ) -> None:
        self.generator, self.labels_N, self.name = generator, labels_N, name
        with torch.no_grad():
            blank = generator.decode(torch.zeros(1, *generator.latent_shape, device=generator.device))
        channels, height, width = blank.shape[1:]
        self.image_shape = (channels, height, width)
        self.batch_size = generator.config.batch_size
        self._identity, self._facts = identity, facts or {}
        self._counts = {"pairs": 0, "tokens": 0}  # of experts and tokens; tokens

    def __len__(self) -> int:
        return len(self.labels_N)

    def identity(self) -> dict[str, Any]:
        return {"kind": "run", **self._identity, "labels_sha256": sha256_of_labels(self.labels_N)}

    def facts(self) -> dict[str, Any]:
        return self._facts

    def batches(self, parts: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        for part in parts:
            with measure_active(self.generator.model) as active:
                images = torch.cat(list(self.generator.batches(part, self.labels_N)))
            self._counts["pairs"] += active.pairs
            self._counts["tokens"] += active.tokens
            yield images

    def take_counts(self) -> dict[str, int]:
        counts, self._counts = self._counts, {"pairs": 0, "tokens": 0}
        return counts
