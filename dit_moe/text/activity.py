"""The experts that the scored positions use: no padding, and no token twice because it is context again."""

# N tokens of a batch, one sequence after the other

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from dit_moe.moe import Routing, routers_of
from dit_moe.moe.steering import Activity


@contextmanager
def scored_activity(network: nn.Module, seen: Activity, scored_N: Tensor) -> Iterator[None]:
    """While entered, what passes the routers adds to `seen`, of the tokens only where `scored_N`, bool, is true.

    Unlike `measure_active`, which counts all.
    """

    def count(router: nn.Module, args: tuple[Tensor, ...], routing: Routing) -> None:
        seen.pairs += int(scored_N[routing.token_R].sum())
        seen.tokens += int(scored_N.sum())

    handles = [router.register_forward_hook(count) for router in routers_of(network)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
