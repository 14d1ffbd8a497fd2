"""Routers keep their precision in models of other libraries: a threshold in bf16 is up to 0.4 % off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dit_moe.moe import routers_of


class RoutersInFP32(nn.Module):
    """A model whose casts, as ``.to(torch.bfloat16)`` is one, leave its routers as they are."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        routers = [tensor for router in routers_of(self) for tensor in (*router.parameters(), *router.buffers())]
        kept = {id(each) for each in [*routers, *(tensor.grad for tensor in routers)]}

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if id(tensor) in kept and moved.dtype != tensor.dtype else moved

        return super()._apply(move, recurse)
