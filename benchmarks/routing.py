"""How much of a MoE layer's time its router takes, from the states of tokens to the list of routed pairs.

    python -m benchmarks.routing [--shapes 384,64,8,192,4096] [--routers dtopp,topk] [--device cuda]
                                 [--dtypes fp32,bf16] [--turns 7]

A shape is width, experts, active experts, hidden width of an expert, tokens. Prints a JSON line for each shape, router
and dtype: milliseconds of the layer, and the router's share of it, forward alone and forward with backward. The router
computes in fp32 whatever the dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks._timing import DTYPES, show, take_turns
from benchmarks.moe_layer import build_layer, measure_all, passes


class Alone(nn.Module):
    """The router of a layer; its output is the weights of the routed pairs."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.router = router

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.router(x_ND).weight_R


def measure(shape: tuple[int, ...], router: str, dtype: str, device: torch.device, turns: int) -> None:
    layer, x = build_layer(shape, router, device, DTYPES[dtype])
    alone, x_ND = Alone(layer.router), x[0].detach().requires_grad_()
    upstream_R = torch.ones_like(alone(x_ND))
    facts: dict[str, object] = {}
    for name, backward in (("forward", False), ("forward_backward", True)):
        contestants = {
            "layer": passes(layer, x, torch.ones_like(x), backward),
            "router": passes(alone, x_ND, upstream_R, backward),
        }
        seconds = take_turns(contestants, turns, device)
        facts[f"{name}_layer_ms"] = 1e3 * seconds["layer"]
        facts[f"{name}_router_share"] = seconds["router"] / seconds["layer"]
    show("routing", device, shape=list(shape), router=router, dtype=dtype, **facts)


def main() -> None:
    measure_all(__doc__, measure)


if __name__ == "__main__":
    main()
