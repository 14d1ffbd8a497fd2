"""All processes sample together. The images are the same whatever their number."""

# N images of the run, C channels, H height, W width

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from dit_moe.generate import Generated, Generator
from dit_moe.moe import measure_active
from dit_moe.processes import join_processes, on_all


def generate_together(
    generator: Generator, labels_N: Tensor, on_step: Callable[..., Any] | None = None
) -> Generated | None:
    """What `generator.generate` returns, on the main process; None on the others.

    Every process makes the images at its own strided indices, and hands them over batch by batch: no one waits for
    another for longer than a batch takes. Raises on all processes what one of them raises.
    """
    state, count = join_processes(), len(labels_N)
    world, stride = state.num_processes, state.num_processes * generator.config.batch_size
    images_NCHW: Tensor | None = None
    with measure_active(generator.model) as active:
        batches = generator.batches(range(state.process_index, count, world), labels_N, on_step)
        for start in range(0, count, stride):
            for rank, part in enumerate(on_all(lambda: next(batches, None))):
                if part is not None and state.is_main_process:
                    if images_NCHW is None:
                        images_NCHW = part.new_empty(count, *part.shape[1:])
                    images_NCHW[start + rank : start + stride : world] = part
        counts = on_all(lambda: (active.pairs, active.tokens))
    if images_NCHW is None:
        return None
    active.pairs, active.tokens = map(sum, zip(*counts, strict=True))
    return Generated(images_NCHW, labels_N, active.mean)
