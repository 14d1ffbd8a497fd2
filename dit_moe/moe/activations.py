"""The activations of feed-forwards, as functions and, for the engine on CPUs, into memory that is there."""

# F columns of the first matrix (H, or 2H for SwiGLU), H hidden width, R rows

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["gelu", "silu", "swiglu"]

MATRICES: dict[str, int] = {"gelu": 2, "silu": 2, "swiglu": 3}  # of a feed-forward with that activation


def swiglu(hidden_RF: Tensor) -> Tensor:
    """SiLU(gate) · up of rows that hold [gate | up]."""
    gate_RH, up_RH = hidden_RF.chunk(2, dim=-1)
    return F.silu(gate_RH) * up_RH


def gelu(hidden_RH: Tensor) -> Tensor:
    """The tanh form, as in the dense DiT."""
    return F.gelu(hidden_RH, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": gelu, "silu": F.silu, "swiglu": swiglu}


class InPlace(NamedTuple):
    """An activation and its gradient that fill the memory they are given."""

    forward: Callable[[Tensor, Tensor], Tensor]
    """(hidden [R, F], out [R, H]) → out."""
    again: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(hidden, out, grad_hidden [R, F]) → out, before `backward`, for which it may leave something in `grad_hidden`."""
    backward: Callable[[Tensor, Tensor, Tensor], object]
    """(grad [R, H], hidden, grad_hidden): fills `grad_hidden`, and overwrites `grad`."""


_aten = torch.ops.aten


def _gelu(hidden_RH: Tensor, out_RH: Tensor, *_: Tensor) -> Tensor:
    return _aten.gelu.out(hidden_RH, approximate="tanh", out=out_RH)


def _gelu_backward(grad_RH: Tensor, hidden_RH: Tensor, grad_hidden_RH: Tensor) -> None:
    _aten.gelu_backward.grad_input(grad_RH, hidden_RH, approximate="tanh", grad_input=grad_hidden_RH)


def _silu(hidden_RH: Tensor, out_RH: Tensor, *_: Tensor) -> Tensor:
    return _aten.silu.out(hidden_RH, out=out_RH)


def _silu_backward(grad_RH: Tensor, hidden_RH: Tensor, grad_hidden_RH: Tensor) -> None:
    _aten.silu_backward.grad_input(grad_RH, hidden_RH, grad_input=grad_hidden_RH)


def _swiglu(hidden_RF: Tensor, out_RH: Tensor) -> Tensor:
    gate_RH, up_RH = hidden_RF.chunk(2, dim=-1)
    return _silu(gate_RH, out_RH).mul_(up_RH)


def _swiglu_again(hidden_RF: Tensor, out_RH: Tensor, grad_hidden_RF: Tensor) -> Tensor:
    gate_RH, up_RH = hidden_RF.chunk(2, dim=-1)
    _, silu_RH = grad_hidden_RF.chunk(2, dim=-1)
    return torch.mul(_silu(gate_RH, silu_RH), up_RH, out=out_RH)


def _swiglu_backward(grad_RH: Tensor, hidden_RF: Tensor, grad_hidden_RF: Tensor) -> None:
    gate_RH, up_RH = hidden_RF.chunk(2, dim=-1)
    grad_gate_RH, silu_RH = grad_hidden_RF.chunk(2, dim=-1)
    silu_RH.mul_(grad_RH)  # and so the gradient of `up`
    _silu_backward(grad_RH.mul_(up_RH), gate_RH, grad_gate_RH)


IN_PLACE = {
    "gelu": InPlace(_gelu, _gelu, _gelu_backward),
    "silu": InPlace(_silu, _silu, _silu_backward),
    "swiglu": InPlace(_swiglu, _swiglu_again, _swiglu_backward),
}
