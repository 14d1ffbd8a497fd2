"""Which rows make up the batch of a step: a pure function of (seed, step), so a resumed run has nothing to restore."""

# G rows of the global batch

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dit_moe.config import ConfigError
from dit_moe.randomness import generator


class GlobalBatches:
    """Endless global batches of a data set: one permutation per epoch, laid end to end and cut.

    The batch of step s is positions s·G … (s+1)·G, so it may straddle epochs, and be larger than the data set.
    One permutation is held at a time (10 MB for ImageNet).
    """

    def __init__(self, size: int, batch_size: int, seed: int) -> None:
        if size < 1:
            raise ValueError("the data set is empty; point the data section at one that holds something")
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.int64)

    def batch(self, step: int) -> list[int]:
        """The G data set indices of step `step` (counted from 0)."""
        indices: list[int] = []
        while missing := self.batch_size - len(indices):
            epoch, offset = divmod(step * self.batch_size + len(indices), self.size)
            indices += self._permute(epoch)[offset : offset + missing].tolist()
        return indices

    def _permute(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            self._epoch, random = epoch, generator(self.seed, "epoch", epoch)
            self._permutation = torch.randperm(self.size, generator=random)
        return self._permutation


def rows_of_process(batch_size: int, micro_batch: int | None, rank: int = 0, world: int = 1) -> list[range]:
    """The rows of the global batch that process `rank` of `world` works on, cut into its micro-batches.

    Raises ConfigError unless `world` divides `batch_size`: gradients are averaged over processes with equal weight.
    """
    if batch_size % world:
        raise ConfigError("batch_size", f"={batch_size} cannot be shared equally by {world} processes; use a multiple")
    local = batch_size // world
    rows = range(rank * local, (rank + 1) * local)
    return [rows[i : i + (micro_batch or local)] for i in range(0, local, micro_batch or local)]


def micro_batches(batches: GlobalBatches, parts: Sequence[range], start: int, stop: int) -> Iterator[list[int]]:
    """The rows `parts` of the global batch of every step from `start` up to `stop`."""
    for step in range(start, stop):
        batch = batches.batch(step)
        for rows in parts:
            yield batch[rows.start : rows.stop]


def load_batches(
    dataset: Any, batches: Iterable[list[int]], workers: int = 0, pin_memory: bool = False
) -> Iterator[Any]:
    """What ``dataset.__getitems__`` returns for each index list of `batches`, and raises what it raises.

    `workers` processes read ahead, no more than there are batches if that is known; with 0 the calling process reads.
    The batches are the same either way.
    """
    workers = min(workers, len(batches)) if isinstance(batches, Sized) else workers
    loader: DataLoader[Any] = DataLoader(
        _ErrorsAsRows(dataset),  # type: ignore[arg-type]
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=pin_memory,
        collate_fn=_as_it_is,
        worker_init_fn=_leave_signals_to_the_parent,
    )
    for batch in loader:
        if isinstance(batch, ValueError | OSError):
            raise batch
        yield batch


class _ErrorsAsRows:
    """Returns what a data set raises instead of raising it: from a worker, torch would bury it in a traceback."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: list[int]) -> Any:
        try:
            return self.dataset.__getitems__(indices)
        except (ValueError, OSError) as problem:
            return problem


def _as_it_is(batch: Any) -> Any:
    return batch


def _leave_signals_to_the_parent(worker: int) -> None:
    """They may reach all processes of a job; the parent needs its readers until it has finished its step."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_IGN)
