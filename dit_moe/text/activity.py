"""The experts that the scored positions use: no padding, and no token twice because it is context again."""

# N tokens of a batch, one sequence after the other

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from dit_moe.moe import Routing, routers_of
from dit_moe.moe.router_update import Activity


@contextmanager
def scored_activity(network: nn.Module, layers: Sequence[Activity], scored_N: Tensor) -> Iterator[None]:
    """While entered, what passes each router adds to its entry of `layers`, of tokens where `scored_N`, bool, is true.

    Unlike `measure_layers`, which counts all.
    """

    def counter(seen: Activity) -> Callable[..., None]:
        def count(router: nn.Module, args: tuple[Tensor, ...], routing: Routing) -> None:
            seen.pairs += int(scored_N[routing.token_R].sum())
            seen.tokens += int(scored_N.sum())

        return count

    routers = zip(routers_of(network), layers, strict=True)
    handles = [router.register_forward_hook(counter(seen)) for router, seen in routers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
