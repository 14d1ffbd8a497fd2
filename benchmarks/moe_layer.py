"""A MoE feed-forward against a dense one of the same active FLOPs, and against other ways to compute it.

    python -m benchmarks.moe_layer [--shapes 384,64,8,192,4096] [--routers dtopp,topk] [--device cuda]
                                   [--dtypes fp32,bf16] [--turns 7]

A shape is width, experts, active experts, hidden width of an expert, tokens. All have SwiGLU and no biases. Prints a
JSON line for each shape, router and dtype: milliseconds of the dense feed-forward, and how many times as long the
others take, forward alone and forward with backward: our layer with its router (`ours`), the reference loop of its
experts (`reference`), a loop over boolean masks that indexes weights (`mask_loop`), and transformers' OLMoE block with
top-k (`olmoe_eager`, `olmoe_grouped_mm`). `active` is the measured mean of active experts of ours.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

from benchmarks._timing import DTYPES, add_machine_arguments, show, take_turns
from dit_moe.moe import ROUTERS, FeedForward, MoEConfig, MoELayer, calibrate, measure_active

SHAPES = "384,64,8,192,4096 1152,64,8,288,2048 768,16,2,1536,2048 384,16,2,768,4096"


class MaskLoop(nn.Module):
    """What the first implementations of DiTs with experts do: all experts in turn, each on the tokens of its mask."""

    def __init__(self, layer: MoELayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x_ND: Tensor) -> Tensor:
        routing, experts = self.layer.router(x_ND), self.layer.experts
        gate_NE = x_ND.new_zeros(len(x_ND), len(routing.counts_E))
        gate_NE[routing.token_R, routing.expert_R] = routing.weight_R.to(x_ND.dtype)
        out_ND = torch.zeros_like(x_ND)
        for e in range(gate_NE.shape[1]):
            mask_N = gate_NE[:, e] != 0
            if mask_N.any():
                gate_RH, up_RH = (x_ND[mask_N] @ experts.w_in[e].to(x_ND.dtype)).chunk(2, dim=-1)
                out_ND[mask_N] += gate_NE[mask_N, e, None] * (F.silu(gate_RH) * up_RH @ experts.w_out[e].to(x_ND.dtype))
        return out_ND


def olmoe(width: int, experts: int, active: int, hidden: int, way: str) -> nn.Module:
    config = OlmoeConfig(hidden_size=width, intermediate_size=hidden, num_experts=experts, num_experts_per_tok=active)
    config._experts_implementation = way
    block = OlmoeSparseMoeBlock(config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=width**-0.5)
    return block


def passes(module: nn.Module, x: Tensor, upstream: Tensor, backward: bool) -> Callable[[], None]:
    def forward() -> Tensor:
        out = module(x)
        return out[0] if isinstance(out, tuple) else out

    def both() -> None:
        forward().backward(upstream)
        module.zero_grad()
        x.grad = None

    def alone() -> None:
        with torch.no_grad():
            forward()

    return both if backward else alone


def build_layer(
    shape: tuple[int, ...], router: str, device: torch.device, dtype: torch.dtype
) -> tuple[MoELayer, Tensor]:
    """A layer in training, at its target on the tokens that come with it, [1, N, D]."""
    width, experts, active, hidden, tokens = shape
    torch.manual_seed(0)
    options = ROUTERS.config_class(router)(init_std=width**-0.5)
    config = MoEConfig(experts=experts, target=active, expert_hidden=hidden, activation="swiglu", router=options)
    layer = MoELayer(config, width, hidden * active).to(device, dtype)
    x = torch.randn(1, tokens, width, device=device, dtype=dtype, requires_grad=True)
    calibrate(layer, lambda: layer(x))
    return layer.train(), x


def measure(shape: tuple[int, ...], router: str, dtype: str, device: torch.device, turns: int) -> None:
    width, experts, active, hidden, _ = shape
    layer, x = build_layer(shape, router, device, DTYPES[dtype])
    slow = copy.deepcopy(layer)
    slow.experts.implementation = "reference"
    modules: dict[str, nn.Module] = {
        "dense": FeedForward(width, hidden * active, "swiglu"),
        "ours": layer,
        "reference": slow,
        "mask_loop": MaskLoop(layer),
        "olmoe_eager": olmoe(width, experts, active, hidden, "eager"),
        "olmoe_grouped_mm": olmoe(width, experts, active, hidden, "grouped_mm"),
    }
    upstream = torch.randn_like(x)
    with measure_active(layer) as seen, torch.no_grad():
        layer(x)
    facts: dict[str, object] = {"active": seen.mean}
    for name, backward in (("forward", False), ("forward_backward", True)):
        contestants = {
            key: passes(module.to(device, DTYPES[dtype]), _input(key, x), _input(key, upstream), backward)
            for key, module in modules.items()
        }
        seconds = take_turns(contestants, turns, device)
        facts[f"{name}_dense_ms"] = 1e3 * seconds["dense"]
        facts |= {f"{name}_{key}": each / seconds["dense"] for key, each in seconds.items() if key != "dense"}
    show("moe_layer", device, shape=list(shape), router=router, dtype=dtype, **facts)


def _input(contestant: str, x_BSD: Tensor) -> Tensor:
    return x_BSD[0].detach().requires_grad_() if contestant == "mask_loop" else x_BSD


def measure_all(
    description: str | None, measure: Callable[[tuple[int, ...], str, str, torch.device, int], None]
) -> None:
    """Call `measure` with each shape, router and dtype that the command line says."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES.split())
    parser.add_argument("--routers", default="dtopp,topk")
    add_machine_arguments(parser)
    args = parser.parse_args()
    for shape in args.shapes:
        sizes = tuple(int(size) for size in shape.split(","))
        for router in args.routers.split(","):
            for dtype in args.dtypes.split(","):
                measure(sizes, router, dtype, torch.device(args.device), args.turns)


def main() -> None:
    measure_all(__doc__, measure)


if __name__ == "__main__":
    main()
