"""What each of several processes does for test_streaming.py."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from dit_moe.distributed import join_processes
from dit_moe.sampling.generator import Generator, stream_together


def numbered(indices, labels, on_step=None):
    """Batches of 3; image i is filled with i."""
    for start in range(0, len(indices), 3):
        yield torch.tensor(indices[start : start + 3], dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)


def ending(take) -> str:
    try:
        stream_together(GENERATOR, torch.zeros(20), take)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "finished"


GENERATOR = SimpleNamespace(model=nn.Identity(), config=SimpleNamespace(batch_size=3), batches=numbered)


def streaming(folder: Path) -> None:
    """Leaves what it saw in folder/rank_<i>.json."""
    state, seen = join_processes(), {}
    for count in (1, 2, 7, 20):
        took: list[list[int]] = []
        stream_together(GENERATOR, torch.zeros(count), lambda images: took.append(images[:, 0, 0, 0].tolist()))  # noqa: B023
        seen[f"took_{count}"] = took
    made = Generator.generate(GENERATOR, torch.zeros(7))
    seen["together"] = made and made.images[:, 0, 0, 0].tolist()

    def full(images):
        if images.max() > 3:
            raise OSError("no space left")

    seen["full"] = ending(full)
    (folder / f"rank_{state.process_index}.json").write_text(json.dumps(seen))
