"""Numbers in full precision, whatever the rest of the program computes in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_precision(device: torch.device | str) -> Iterator[None]:
    """fp32 means fp32: no TF32 or bf16 within matrix products and convolutions, no autocast. And no gradients."""
    backends: Any = torch.backends
    settings = backends.cuda.matmul, backends.mkldnn.matmul, backends.cudnn.conv, backends.mkldnn.conv
    older, before = _older_switch(), [each.fp32_precision for each in settings]
    try:
        torch.set_float32_matmul_precision("highest")  # for torch refuses switches that contradict each other
        for each in settings:
            each.fp32_precision = "ieee"
        with torch.no_grad(), torch.autocast(torch.device(device).type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(older)
        for each, precision in zip(settings, before, strict=True):
            each.fp32_precision = precision


def _older_switch() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # the newer ones were set beside it, and so it was left at its default
        return "highest"
