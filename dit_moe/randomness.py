"""Every random number comes from a generator named by what it is for, never from a global state.

A generator is derived from a key such as ``(seed, "train", step)``. Nothing about randomness has to be saved to resume
a run, and nothing depends on how a batch was split: the draws of a training step are made for the whole global batch
and each process and micro-batch takes its own rows (`BatchRandom`); image i of a sampling run has its own generator.
"""

# B rows of this micro-batch, G rows of the global batch

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator that depends on `key` alone; different keys give independent streams."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class BatchRandom:
    """Random draws for the rows `start:stop` of a global batch of `total` rows.

    Each call advances one shared stream by a whole global batch and returns this part's rows, so 1×32 and 4×8
    micro-batches, or one process and two, see the same numbers for the same image.
    """

    def __init__(
        self, *key: int | str, total: int, start: int = 0, stop: int | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self.total, self.rows = total, slice(start, total if stop is None else stop)
        self._generator = generator(*key, device=device)
        self.device = self._generator.device

    def normal(self, *shape: int) -> Tensor:
        """Standard normal [B, *shape]."""
        return torch.randn(self.total, *shape, generator=self._generator, device=self.device)[self.rows]

    def uniform(self) -> Tensor:
        """Uniform in [0, 1), [B]."""
        return torch.rand(self.total, generator=self._generator, device=self.device)[self.rows]

    def stratified(self) -> Tensor:
        """Uniform in [0, 1), [B], one draw in each of the G equal strata of the global batch, in random order."""
        strata_G = torch.randperm(self.total, generator=self._generator, device=self.device)
        jitter_G = torch.rand(self.total, generator=self._generator, device=self.device)
        return ((strata_G + jitter_G) / self.total)[self.rows]

    def integers(self, high: int) -> Tensor:
        """Uniform whole numbers in [0, high), [B]."""
        return torch.randint(high, (self.total,), generator=self._generator, device=self.device)[self.rows]


def normal_like_images(generators: Sequence[torch.Generator], shape: Sequence[int], device: torch.device) -> Tensor:
    """Standard normal [B, *shape], row i from generators[i]: from those on the CPU every device sees the same noise."""
    return torch.stack([torch.randn(*shape, generator=each, device=each.device) for each in generators]).to(device)
