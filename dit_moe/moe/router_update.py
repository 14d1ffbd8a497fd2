"""What happens to a model's routers between two optimizer steps: count, control, report."""

# L MoE layers, S sums of a layer's counters

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dit_moe.moe.layer import MoELayer
from dit_moe.moe.router_stats import Counters
from dit_moe.moe.routers import Router
from dit_moe.moe.routers.dtopp import DTopPRouter
from dit_moe.moe.routing import Routing

Reduce = Callable[[Tensor], Tensor]  # sums a float64 tensor over all ranks


def routers_of(model: nn.Module) -> list[Router]:
    """The routers of a model's MoE layers, in order of depth; empty for a dense model."""
    return [module.router for module in model.modules() if isinstance(module, MoELayer)]


def update_routers(model: nn.Module, reduce: Reduce = lambda sums: sums, report: bool = True) -> dict[str, Any]:
    """Call once after every optimizer step: move the thresholds and return what the routers did in it.

    Counts of all micro-batches since the last call are summed over ranks by one `reduce`, so that every rank moves by
    the same error and holds the same p, bit for bit. A step without tokens on any rank moves nothing and reports NaN.

    Returns {} for a dense model or without `report` (which saves waiting for the device), else
    ``{"active", "p", "layers": {name: [one number per MoE layer]}}`` with `active` the mean number of active experts
    per token over all layers and `p` the new threshold (mean over layers; None for routers without).
    """
    routers = routers_of(model)
    if not routers:
        return {}
    sums_LS = reduce(torch.stack([router.counters.vector(router.load_E.device) for router in routers]))
    total = Counters(routers[0].experts, sums_LS.sum(0))
    layers = [Counters(router.experts, sums_S) for router, sums_S in zip(routers, sums_LS, strict=True)]
    for router, own in zip(routers, layers, strict=True):
        router.after_step(own, total)
        router.counters.reset()
    return _report(routers, layers, total) if report else {}


def counted_active(model: nn.Module) -> Tensor | None:
    """Mean active experts of the tokens that this process has counted since the last step; None if dense."""
    counted = [router.counters.vector(router.load_E.device) for router in routers_of(model)]
    return Counters(routers_of(model)[0].experts, torch.stack(counted).sum(0)).active if counted else None


def notes(model: nn.Module) -> list[str]:
    """What a user should know of the model's routers before training."""
    said = (router.config.note(router.target) for router in routers_of(model))
    return list(dict.fromkeys(note for note in said if note is not None))


def _report(routers: list[Router], layers: list[Counters], total: Counters) -> dict[str, Any]:
    columns = ("active", "active_std", "balance", "entropy")
    # One transfer for all numbers: each .item() by itself would wait for the device.
    table = torch.stack([torch.stack([getattr(own, name) for name in columns]) for own in [*layers, total]]).tolist()
    report: dict[str, list[float]] = {name: [row[i] for row in table[:-1]] for i, name in enumerate(columns)}
    thetas = [router.theta for router in routers if router.theta is not None]
    if thetas:
        theta_L1 = torch.stack([theta.detach().float() for theta in thetas])
        report["theta"] = (theta_L1.full_tensor() if isinstance(theta_L1, DTensor) else theta_L1).flatten().tolist()
    steered = [router.controller.p for router in routers if isinstance(router, DTopPRouter)]
    if steered:
        report["p"] = torch.stack(steered).tolist()
    p = sum(report["p"]) / len(report["p"]) if steered else None
    return {"active": table[-1][0], "p": p, "layers": report}


@dataclass
class Activity:
    """What passed the routers of a model."""

    pairs: int = 0
    tokens: int = 0

    @property
    def mean(self) -> float | None:
        """Mean number of active experts per token; None if there were no tokens, as in a model without experts."""
        return self.pairs / self.tokens if self.tokens else None

    def add(self, other: Activity) -> None:
        self.pairs += other.pairs
        self.tokens += other.tokens

    @classmethod
    def total(cls, parts: Iterable[Activity]) -> Activity:
        """Of all parts together."""
        whole = cls()
        for part in parts:
            whole.add(part)
        return whole


def activities(model: nn.Module) -> list[Activity]:
    """One for each MoE layer, in which nothing was counted yet."""
    return [Activity() for _ in routers_of(model)]


@contextmanager
def measure_active(model: nn.Module) -> Iterator[Activity]:
    """While entered, count every routing, in any mode and without touching training's counters."""
    seen = Activity()
    with _counting(model, lambda layer: seen):
        yield seen


@contextmanager
def measure_layers(model: nn.Module) -> Iterator[list[Activity]]:
    """`measure_active` for each MoE layer by itself, in order of depth."""
    layers = activities(model)
    with _counting(model, layers.__getitem__):
        yield layers


@contextmanager
def _counting(model: nn.Module, seen_by: Callable[[int], Activity]) -> Iterator[None]:
    def counter(seen: Activity) -> Callable[..., None]:
        def count(router: nn.Module, args: tuple[Tensor, ...], routing: Routing) -> None:
            seen.pairs += len(routing.token_R)
            seen.tokens += len(args[0])

        return count

    routers = enumerate(routers_of(model))
    handles = [router.register_forward_hook(counter(seen_by(layer))) for layer, router in routers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
