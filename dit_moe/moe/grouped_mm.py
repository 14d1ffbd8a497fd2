"""Grouped matrix products of a list of rows that has more room than is used, as one operator.

torch's own leaves behind the last group what was in memory, and torch.compile knows it in 16 bits alone.
"""

# R rows, X and Y columns, E groups

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op("dit_moe::grouped_mm", mutates_args=(), schema="(Tensor a, Tensor b, Tensor ends_E) -> Tensor")
def _grouped_mm(a: Tensor, b: Tensor, ends_E: Tensor) -> Tensor:
    out = F.grouped_mm(a, b, offs=ends_E)
    if b.ndim == 3:
        out.masked_fill_(torch.arange(len(out), device=out.device)[:, None] >= ends_E[-1], 0)
    return out


@_grouped_mm.register_fake
def _(a: Tensor, b: Tensor, ends_E: Tensor) -> Tensor:
    groups = [len(ends_E)] if b.ndim == 2 else []
    return a.new_empty(*groups, a.shape[0], b.shape[-1])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_RY: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    rows_RX, weight_EXY, ends_E = ctx.saved_tensors
    grad_RY, (rows, weight, _) = grad_RY.contiguous(), ctx.needs_input_grad
    grad_rows_RX = _grouped_mm(grad_RY, weight_EXY.transpose(1, 2), ends_E) if rows else None
    return grad_rows_RX, _grouped_mm(rows_RX.t(), grad_RY, ends_E) if weight else None, None


_grouped_mm.register_autograd(_backward, setup_context=_keep)


def grouped_mm(rows_RX: Tensor, weight_EXY: Tensor, *, offs: Tensor) -> Tensor:
    """`F.grouped_mm`, [R, Y], whose rows behind the last of the offsets [E] are zeros and get gradients of zero."""
    out_RY: Tensor = _grouped_mm(rows_RX, weight_EXY, offs)
    return out_RY
