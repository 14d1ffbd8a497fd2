"""All routers of a model: observing what they do, and updating them after every optimizer step."""

# L MoE layers, N tokens, S sums of a layer's statistics

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dit_moe.moe.layer import MoELayer
from dit_moe.moe.router_stats import RouterStats
from dit_moe.moe.routers import Router
from dit_moe.moe.routing import Routing

Reduce = Callable[[Tensor], Tensor]  # sums a float64 tensor over all ranks
COLLAPSED = 0.7  # of the number of experts: a balance above it, which is that number if all tokens have one expert


def routers_of(model: nn.Module) -> list[Router]:
    """The routers of a model's MoE layers, in order of depth; empty for a dense model."""
    return [module.router for module in model.modules() if isinstance(module, MoELayer)]


# ---------------------------------------------------------------------------------------------------------- observing


@contextmanager
def observe_routers(routers: Sequence[Router], on_routing: Callable[[int, Tensor, Routing], object]) -> Iterator[None]:
    """While entered, call ``on_routing(i, x_ND, routing)`` after each forward pass of ``routers[i]``, in any mode.

    Nothing is compiled meanwhile where the routers would be, too: what is compiled calls no hooks that came later.
    """

    def hook(i: int) -> Callable[..., None]:
        def after_forward(router: nn.Module, args: tuple[Tensor, ...], routing: Routing) -> None:
            on_routing(i, args[0], routing.trimmed())

        return after_forward

    handles = [router.register_forward_hook(hook(i)) for i, router in enumerate(routers)]
    bounded = any(router.capacity_factor is not None for router in routers)
    try:
        with torch.compiler.set_stance("force_eager") if bounded else nullcontext():
            yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class ActiveExperts:
    """How many experts were active for how many tokens."""

    pairs: int = 0
    tokens: int = 0

    @property
    def mean(self) -> float | None:
        """Mean number of active experts per token; None if there were no tokens, as in a model without experts."""
        return self.pairs / self.tokens if self.tokens else None

    def add(self, other: ActiveExperts) -> None:
        self.pairs += other.pairs
        self.tokens += other.tokens

    @classmethod
    def total(cls, parts: Sequence[ActiveExperts]) -> ActiveExperts:
        """Of all parts together."""
        return cls(sum(part.pairs for part in parts), sum(part.tokens for part in parts))


def no_active_experts(model: nn.Module) -> list[ActiveExperts]:
    """One count for each MoE layer, of no tokens yet."""
    return [ActiveExperts() for _ in routers_of(model)]


@contextmanager
def measure_layers(
    model: nn.Module, layers: list[ActiveExperts] | None = None, counted_N: Tensor | None = None
) -> Iterator[list[ActiveExperts]]:
    """While entered, count the experts that each MoE layer computes, in any mode and beside the statistics of training.

    Args:
        layers: what to add to; None: new counts.
        counted_N: bool, the tokens to count in every forward pass; None: all.
    """
    counts = no_active_experts(model) if layers is None else layers

    def count(i: int, x_ND: Tensor, routing: Routing) -> None:
        if counted_N is None:
            counts[i].add(ActiveExperts(len(routing.token_R), len(x_ND)))
        else:
            counts[i].add(ActiveExperts(int(counted_N[routing.token_R].sum()), int(counted_N.sum())))

    with observe_routers(routers_of(model), count):
        yield counts


@contextmanager
def measure_active(model: nn.Module) -> Iterator[ActiveExperts]:
    """`measure_layers` with one count for all layers together."""
    total = ActiveExperts()
    with measure_layers(model, [total] * len(routers_of(model))):
        yield total


# ----------------------------------------------------------------------------------------------------------- updating


def update_routers(model: nn.Module, reduce: Reduce = lambda sums: sums, report: bool = True) -> dict[str, Any]:
    """Call once after every optimizer step: move the thresholds and return what the routers did in it.

    The statistics of all micro-batches since the last call are summed over ranks by one `reduce`, so that every rank
    moves by the same error and holds the same p, bit for bit. A step without tokens on any rank moves nothing and
    reports NaN.

    Returns {} for a dense model or without `report` (which saves waiting for the device), else
    ``{"active", "p", "layers": {name: [one number per MoE layer]}}`` with `active` the mean number of active experts
    per token over all layers and `p` the new threshold (mean over layers; None for routers without). `layers` has what
    was counted and the routers' `state_numbers`.
    """
    routers = routers_of(model)
    if not routers:
        return {}
    sums_LS = reduce(_sums_of(routers))
    shape = routers[0].experts, routers[0].observed
    total, layers = RouterStats(*shape, sums_LS.sum(0)), [RouterStats(*shape, sums_S) for sums_S in sums_LS]
    for router, own in zip(routers, layers, strict=True):
        router.after_step(own, total)
        router.stats.reset()
    return _report(routers, layers, total) if report else {}


def counted_active(model: nn.Module) -> Tensor | None:
    """Mean active experts of the tokens that this process has counted since the last update; None if dense."""
    total = _counted(routers_of(model))
    return None if total is None else total.active


def counted_dropped(model: nn.Module) -> Tensor | None:
    """Mean experts of these tokens that were dropped for want of room; None without a capacity factor, too."""
    routers = routers_of(model)
    total = _counted(routers)
    return None if total is None or routers[0].capacity_factor is None else total.dropped


def notes(model: nn.Module) -> list[str]:
    """What a user should know of the model's routers before training."""
    tokens = getattr(getattr(model, "config", None), "tokens", None)
    found = (router.config.note(router.target, router.experts, tokens) for router in routers_of(model))
    said = [note for note in found if note is not None]
    for router in routers_of(model):
        peak, factor = router.config.peak(router.experts, router.target) or router.target, router.capacity_factor
        if factor is not None and factor * router.target < peak:
            room = f"leaves room for {factor * router.target:g} experts per token, and training may use {peak:g}"
            said.append(f"model.moe.capacity_factor={factor:g} {room} on average; what has no room is dropped")
    return list(dict.fromkeys(said))


def collapsed(model: nn.Module, report: dict[str, Any]) -> str | None:
    """What a user should know after training of layers that nearly always use one expert; None: there are none.

    `report` is the last that `update_routers` returned.
    """
    if not report:
        return None
    routers, balances = routers_of(model), report["layers"]["balance"]
    found = [
        f"{layer} ({balance:.1f} of {router.experts})"
        for layer, (router, balance) in enumerate(zip(routers, balances, strict=True))
        if router.experts > 1 and balance > COLLAPSED * router.experts
    ]
    if not found:
        return None
    which = f"MoE layer{'s' if len(found) > 1 else ''} {', '.join(found)}"
    remedy = "with model.moe.router.balance_loss=1e-2 another run may use all (docs/routers.md, dtopp)"
    return f"note: nearly all tokens have the same expert, by balance, 1 if even, in {which}; {remedy}"


def _counted(routers: Sequence[Router]) -> RouterStats | None:
    """Of all layers together, by this process since the last update; None if there are none."""
    return RouterStats(routers[0].experts, sums=_sums_of(routers).sum(0)) if routers else None


def _sums_of(routers: Sequence[Router]) -> Tensor:
    """[L, S], of this process."""
    return torch.stack([router.stats.vector(router.load_E.device) for router in routers])


def _report(routers: Sequence[Router], layers: Sequence[RouterStats], total: RouterStats) -> dict[str, Any]:
    columns = ["active", "active_std", "balance", "entropy"]
    columns += ["dropped"] if routers[0].capacity_factor is not None else []
    # One transfer for all numbers: each .item() by itself would wait for the device.
    table = torch.stack([torch.stack([getattr(own, name) for name in columns]) for own in [*layers, total]]).tolist()
    report: dict[str, list[float]] = {name: [row[i] for row in table[:-1]] for i, name in enumerate(columns)}
    states = [router.state_numbers() for router in routers]
    for name in states[0]:
        report[name] = _whole(torch.stack([state[name].flatten() for state in states])).flatten().tolist()
    p = sum(report["p"]) / len(report["p"]) if "p" in report else None
    return {"active": table[-1][0], "p": p, "layers": report}


def _whole(tensor: Tensor) -> Tensor:
    """All of it, of parameters that sharded data parallelism has cut."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
