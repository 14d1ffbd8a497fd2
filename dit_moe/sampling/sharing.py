"""All processes sample together. The images are the same whatever their number."""

# N images of the run, B images of a batch, C channels, H height, W width

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dit_moe.distributed import join_processes, on_all, on_main
from dit_moe.moe import measure_active
from dit_moe.sampling.generator import Generated, Generator


def stream_together(
    generator: Generator,
    labels_N: Tensor,
    take: Callable[[Tensor], object],
    on_step: Callable[..., Any] | None = None,
) -> float | None:
    """Sample an image for every label; ``take(images_BCHW)`` gets them on the main process, in order, as they come.

    Every process makes the images at its own strided indices, and hands them over batch by batch: no one waits for
    another for longer than a batch takes. Returns the mean experts that a token used, None for a model without. Raises
    on all processes what one of them raises, in `take` too.
    """
    state, count = join_processes(), len(labels_N)
    world, stride = state.num_processes, state.num_processes * generator.config.batch_size
    with measure_active(generator.model) as active:
        batches = generator.batches(range(state.process_index, count, world), labels_N, on_step)
        for _ in range(0, count, stride):
            parts = [part for part in on_all(lambda: next(batches, None)) if part is not None]
            on_main(partial(_hand_over, parts, take))
        counts = on_all(lambda: (active.pairs, active.tokens))
    active.pairs, active.tokens = map(sum, zip(*counts, strict=True))
    return active.mean


def _hand_over(parts: Sequence[Tensor], take: Callable[[Tensor], object]) -> None:
    """The strided parts of the processes that had any left, as one batch in order."""
    images_BCHW = parts[0].new_empty(sum(map(len, parts)), *parts[0].shape[1:])
    for rank, part in enumerate(parts):
        images_BCHW[rank :: len(parts)] = part
    take(images_BCHW)


def generate_together(
    generator: Generator, labels_N: Tensor, on_step: Callable[..., Any] | None = None
) -> Generated | None:
    """What `generator.generate` returns, in memory, on the main process; None on the others."""
    batches: list[Tensor] = []
    active_experts = stream_together(generator, labels_N, batches.append, on_step)
    return Generated(torch.cat(batches), labels_N, active_experts) if batches else None
