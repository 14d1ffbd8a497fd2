"""The batches of a run: each fetched and prepared while the device still works on the step before."""

# B rows of a micro-batch

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from accelerate.utils import send_to_device

from dit_moe.config import ConfigError
from dit_moe.data.batch_sampler import BatchOrder, MicroBatches, load_batches, own_rows
from dit_moe.distributed import join_processes
from dit_moe.randomness import BatchRandom
from dit_moe.training.config import TrainConfig
from dit_moe.training.errors import TrainingError
from dit_moe.training.loss import Batch

Prepare = Callable[[Batch, BatchRandom], Batch]


class Rows(Protocol):
    """A data set as the trainer needs it."""

    def __len__(self) -> int: ...

    def __getitems__(self, indices: list[int]) -> Batch: ...


class Feed:
    """This process's micro-batches of every step, in `ready` when their step begins.

    Raises ConfigError if the processes cannot share the batch equally.
    """

    def __init__(self, config: TrainConfig, dataset: Rows, prepare_batch: Prepare, seed: int) -> None:
        state = join_processes()
        self.dataset, self.prepare_batch, self.seed, self.device = dataset, prepare_batch, seed, state.device
        self.order = BatchOrder(len(dataset), config.batch_size, seed)
        try:
            self.parts = own_rows(config.batch_size, config.micro_batch, state.process_index, state.num_processes)
        except ConfigError as error:
            raise error.below("train") from None
        self.ready: list[tuple[range, Batch]] = []  # rows of the global batch, and what they hold
        self.problem: Exception | None = None
        self._workers = config.workers
        self._steps: Iterator[int] = iter(())
        self._loaded: Iterator[Any] = iter(())

    def start(self, step: int, stop: int) -> None:
        """Make the batch of `step` ready, and from then on, one by one, those before `stop`."""
        batches = MicroBatches(self.order, self.parts, step, stop)
        self._steps = iter(range(step, stop))
        self._loaded = load_batches(self.dataset, batches, self._workers, pin_memory=self.device.type == "cuda")
        self.advance()

    def close(self) -> None:
        """End the reading processes."""
        self._loaded, self.ready = iter(()), []

    def advance(self) -> None:
        """Make the next step's batch ready, if there is one. What goes wrong is kept for `check`, where all hear it."""
        self.ready = []
        step = next(self._steps, None)
        try:
            if step is not None:
                self.ready = [(rows, self._prepare(next(self._loaded), step, rows)) for rows in self.parts]
        except Exception as problem:
            self.problem = problem

    def check(self) -> None:
        """Raise what went wrong in making the next batch ready. TrainingError if the preparation refused its rows."""
        if self.problem is not None:
            raise self.problem

    def random(self, purpose: str, step: int, rows: range) -> BatchRandom:
        """The draws of these rows for a purpose."""
        total = self.order.batch_size
        return BatchRandom(self.seed, purpose, step, total=total, start=rows.start, stop=rows.stop, device=self.device)

    def tainted(self, step: int) -> list[int]:
        """The data set indices of this process's rows of a step that hold a number that is not finite."""
        found: list[int] = []
        for rows in self.parts:
            indices = self.order.batch(step)[rows.start : rows.stop]
            batch = self._prepare(self.dataset.__getitems__(indices), step, rows)
            bad_B = torch.zeros(len(rows), dtype=torch.bool, device=self.device)
            for tensor in batch.values():
                bad_B |= ~tensor.isfinite().reshape(len(rows), -1).all(1)
            found += [indices[i] for i in bad_B.nonzero().flatten().tolist()]
        return found

    def _prepare(self, raw: Batch, step: int, rows: range) -> Batch:
        raw = send_to_device(raw, self.device, non_blocking=True)
        try:
            with torch.no_grad():
                return self.prepare_batch(raw, self.random("prepare", step, rows))
        except ValueError as error:
            indices = self.order.batch(step)[rows.start : rows.stop]
            raise TrainingError(f"step {step + 1}: {error} (rows {shown(indices)} of the data set)") from error


def shown(indices: list[int], most: int = 32) -> str:
    """A list of rows, or the beginning of a long one."""
    more = f", … ({len(indices)} in all)" if len(indices) > most else ""
    return ", ".join(map(str, indices[:most])) + more
