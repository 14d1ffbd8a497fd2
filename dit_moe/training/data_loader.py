"""The batches of a run: each fetched and prepared while the device still works on the step before."""

# B rows of a micro-batch

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

import torch
from accelerate.utils import send_to_device

from dit_moe.config import ConfigError
from dit_moe.data.batch_sampler import GlobalBatches, load_batches, micro_batches, rows_of_process
from dit_moe.distributed import join_processes
from dit_moe.randomness import BatchRandom
from dit_moe.training.config import TrainConfig
from dit_moe.training.interrupt import TrainingError
from dit_moe.training.step import Batch, MicroBatch

Prepare = Callable[[Batch, BatchRandom], Batch]


class Dataset(Protocol):
    """A data set as the trainer needs it."""

    def __len__(self) -> int: ...

    def __getitems__(self, indices: list[int]) -> Batch: ...


class Prefetcher:
    """This process's micro-batches of every step, in `ready` when their step begins.

    Raises ConfigError if the processes cannot share the batch equally.
    """

    def __init__(self, config: TrainConfig, dataset: Dataset, prepare_batch: Prepare, seed: int) -> None:
        state = join_processes()
        self.dataset, self.prepare_batch, self.seed, self.device = dataset, prepare_batch, seed, state.device
        self.batches = GlobalBatches(len(dataset), config.batch_size, seed)
        try:
            self.rows = rows_of_process(config.batch_size, config.micro_batch, state.process_index, state.num_processes)
        except ConfigError as error:
            raise error.below("train") from None
        self.ready: list[MicroBatch] = []
        self.error: Exception | None = None
        self._workers = config.workers
        self._steps: Iterator[int] = iter(())
        self._loaded: Iterator[Any] = iter(())

    def start(self, step: int, stop: int) -> None:
        """Make the batch of `step` ready, and from then on, one by one, those before `stop`."""
        batches = micro_batches(self.batches, self.rows, step, stop)
        self._steps = iter(range(step, stop))
        self._loaded = load_batches(self.dataset, batches, self._workers, pin_memory=self.device.type == "cuda")
        self.advance()

    def close(self) -> None:
        """End the reading processes."""
        self._loaded, self.ready = iter(()), []

    def advance(self) -> None:
        """Make the next step's batch ready, if there is one. An error is kept for `check`, which all processes call."""
        self.ready = []
        step = next(self._steps, None)
        try:
            if step is not None:
                self.ready = [self._micro_batch(next(self._loaded), step, rows) for rows in self.rows]
        except Exception as error:
            self.error = error

    def check(self) -> None:
        """Raise the error in making the next batch ready. TrainingError if the preparation refused its rows."""
        if self.error is not None:
            raise self.error

    def not_finite(self, step: int) -> list[int]:
        """The data set indices of this process's rows of a step that hold a number that is not finite."""
        found: list[int] = []
        for rows in self.rows:
            indices = self._indices(step, rows)
            batch = self._prepare(self.dataset.__getitems__(indices), step, rows)
            bad_B = torch.zeros(len(rows), dtype=torch.bool, device=self.device)
            for tensor in batch.values():
                bad_B |= ~tensor.isfinite().reshape(len(rows), -1).all(1)
            found += [indices[i] for i in bad_B.nonzero().flatten().tolist()]
        return found

    def _micro_batch(self, fetched: Batch, step: int, rows: range) -> MicroBatch:
        share = len(rows) / sum(map(len, self.rows))
        random = partial(self._random, "train", step, rows)
        return MicroBatch(batch=self._prepare(fetched, step, rows), random=random, share=share)

    def _prepare(self, fetched: Batch, step: int, rows: range) -> Batch:
        fetched = send_to_device(fetched, self.device, non_blocking=True)
        try:
            with torch.no_grad():
                return self.prepare_batch(fetched, self._random("prepare", step, rows))
        except ValueError as error:
            problem = f"step {step + 1}: {error} (rows {shown(self._indices(step, rows))} of the data set)"
            raise TrainingError(problem) from error

    def _random(self, purpose: str, step: int, rows: range) -> BatchRandom:
        """The draws of these rows for a purpose."""
        total = self.batches.batch_size
        return BatchRandom(self.seed, purpose, step, total=total, start=rows.start, stop=rows.stop, device=self.device)

    def _indices(self, step: int, rows: range) -> list[int]:
        return self.batches.batch(step)[rows.start : rows.stop]


def shown(indices: list[int], most: int = 32) -> str:
    """A list of rows, or the beginning of a long one."""
    more = f", … ({len(indices)} in all)" if len(indices) > most else ""
    return ", ".join(map(str, indices[:most])) + more
