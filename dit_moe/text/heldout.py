"""Held-out documents scored every so many steps of training: enough to see a run overfit, or fail."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch import nn

from dit_moe.distributed import join_processes
from dit_moe.text.perplexity import Document, ScoringError, require_stride, score


class HeldoutLoss:
    """A hook of the trainer: loss, bits per byte and active experts on some documents, which it keeps in memory.

    Args as of `score`. ValueError at once for a stride that the length does not allow, or for no documents.
    """

    def __init__(self, documents: Iterable[Document], *, length: int, stride: int | None = None, **how: Any) -> None:
        require_stride(stride, length)
        self.documents, self.how = list(documents), {"length": length, "stride": stride, **how}
        if not any(len(ids) for ids, _ in self.documents):
            raise ValueError("there is no held-out text to score; name some, or do not ask for its loss")

    def __call__(self, step: int, network: nn.Module) -> dict[str, Any] | None:
        """The numbers, on the main process; None, and a warning, if there are none: they are not worth a run."""
        main = join_processes().is_main_process
        try:
            scores = score(network, self.documents, **self.how)
        except (ValueError, ScoringError) as error:
            if main:
                print(f"warning: no held-out loss at step {step}: {error}", file=sys.stderr)
            return None
        numbers = {"loss": scores.loss, "bits_per_byte": scores.bits_per_byte, "active_experts": scores.active.mean}
        return {f"heldout_{name}": value for name, value in numbers.items()} if main else None
