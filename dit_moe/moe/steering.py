"""What happens to a model's routers between two optimizer steps: count, control, report; and solve a threshold."""

# L MoE layers, S sums of a layer's counters

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dit_moe.moe.counters import Counters
from dit_moe.moe.layer import MoELayer
from dit_moe.moe.routers import Router
from dit_moe.moe.routers.dtopp import DTopPRouter
from dit_moe.moe.routing import Routing

Reduce = Callable[[Tensor], Tensor]  # sums a float64 tensor over all ranks


def routers_of(model: nn.Module) -> list[Router]:
    """The routers of a model's MoE layers, in order of depth; empty for a dense model."""
    return [module.router for module in model.modules() if isinstance(module, MoELayer)]


def end_step(model: nn.Module, reduce: Reduce = lambda sums: sums, report: bool = True) -> dict[str, Any]:
    """Call once after every optimizer step: move the thresholds and return what the routers did in it.

    Counts of all micro-batches since the last call are summed over ranks by one `reduce`, so that every rank moves by
    the same error and holds the same p, bit for bit.

    Returns {} for a dense model or without `report` (which saves waiting for the device), else
    ``{"active", "p", "layers": {name: [one number per MoE layer]}}`` with `active` the mean number of active experts
    per token over all layers and `p` the new threshold (mean over layers; None for routers without).
    """
    routers = routers_of(model)
    if not routers:
        return {}
    counted = [router.counters.sums for router in routers if router.counters.sums is not None]
    assert len(counted) == len(routers), "end_step needs a training-mode forward pass since the last call"
    sums_LS = reduce(torch.stack(counted))
    total = Counters(routers[0].experts, sums_LS.sum(0))
    layers = [Counters(router.experts, sums_S) for router, sums_S in zip(routers, sums_LS, strict=True)]
    for router, own in zip(routers, layers, strict=True):
        router.after_step(own, total)
        router.counters.reset()
    return _report(routers, layers, total) if report else {}


def _report(routers: list[Router], layers: list[Counters], total: Counters) -> dict[str, Any]:
    columns = ("active", "active_std", "balance", "entropy")
    # One transfer for all numbers: each .item() by itself would wait for the device.
    table = torch.stack([torch.stack([getattr(own, name) for name in columns]) for own in [*layers, total]]).tolist()
    report: dict[str, list[float]] = {name: [row[i] for row in table[:-1]] for i, name in enumerate(columns)}
    thetas = [router.theta for router in routers if router.theta is not None]
    if thetas:
        report["theta"] = torch.stack([theta.detach().float() for theta in thetas]).tolist()
    steered = [router.controller.p for router in routers if isinstance(router, DTopPRouter)]
    if steered:
        report["p"] = torch.stack(steered).tolist()
    p = sum(report["p"]) / len(report["p"]) if steered else None
    return {"active": table[-1][0], "p": p, "layers": report}


@contextmanager
def measure_active(model: nn.Module) -> Iterator[Callable[[], float | None]]:
    """While entered, count the pairs and tokens of every routing, in any mode and without touching training's counters.

    Yields a function: the mean number of active experts per token so far, or None for a model without experts.
    """
    pairs = tokens = 0

    def count(router: nn.Module, args: tuple[Tensor, ...], routing: Routing) -> None:
        nonlocal pairs, tokens
        pairs, tokens = pairs + len(routing.token_R), tokens + len(args[0])

    handles = [router.register_forward_hook(count) for router in routers_of(model)]
    try:
        yield lambda: pairs / tokens if tokens else None
    finally:
        for handle in handles:
            handle.remove()


# ------------------------------------------------------------------------------------------------ solve a threshold


def starts_unsolved(model: nn.Module) -> bool:
    """Whether the model has thresholds whose start its config leaves to the first batch."""
    routers = [router for router in routers_of(model) if isinstance(router, DTopPRouter)]
    return any(router.config.controller.p0 is None for router in routers)


def calibrate(
    model: nn.Module,
    run: Callable[[], object],
    target: float | None = None,
    reduce: Reduce = lambda sums: sums,
    passes: int = 3,
) -> float | None:
    """Set the thresholds so that the tokens which `run()` feeds through the model use `target` experts on average.

    For the start of training (p_0 solved on the first batch), for EMA weights, whose activation may differ from the
    raw weights', and for another compute budget at sampling time. Every pass runs the model once: a later layer's
    tokens depend on the thresholds before it. Controllers restart from the solution.

    Args:
        run: one forward pass without gradients over a representative batch.
        target: mean active experts per token; None is what the model was built for.
        reduce: sums over ranks.

    Returns the mean number of active experts per token in the last pass, before its correction; None if the model has
    no threshold to solve.
    """
    routers = [router for router in routers_of(model) if isinstance(router, DTopPRouter)]
    active = None
    for _ in range(passes if routers else 0):
        with torch.no_grad(), _recorded_mass(routers) as records:
            run()
        groups = [[i] for i in range(len(routers))] if routers[0].config.layerwise else [list(range(len(routers)))]
        for group in groups:
            before = torch.cat([tokens_NE.flatten() for i in group for tokens_NE in records[i]])
            tokens = sum(len(tokens_NE) for i in group for tokens_NE in records[i])
            wanted = routers[group[0]].target if target is None else target
            p, active = _solve(before, tokens, wanted, routers[group[0]].controller.p, reduce)
            for i in group:
                routers[i].controller.restart(p)
    return active


@contextmanager
def _recorded_mass(routers: list[DTopPRouter]) -> Iterator[list[list[Tensor]]]:
    """Collect what stands before each expert in the tokens' prefixes, with training's counters and losses off."""
    records: list[list[Tensor]] = [[] for _ in routers]
    handles = []
    modes = [router.training for router in routers]

    def record(router: DTopPRouter, into: list[Tensor]) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: object) -> None:
            into.append(router.ranked(router.probabilities(args[0])[1])[0])

        return hook

    for router, into in zip(routers, records, strict=True):
        handles.append(router.register_forward_hook(record(router, into)))
        router.eval()
    try:
        yield records
    finally:
        for router, handle, mode in zip(routers, handles, modes, strict=True):
            handle.remove()
            router.train(mode)


def _solve(before: Tensor, tokens: int, target: float, current: Tensor, reduce: Reduce) -> tuple[float, float]:
    """The threshold with `target` pairs a token, by bisection on counts (sums are all that ranks can exchange).

    Also returns the mean at the `current` threshold."""

    def mean_active(p: float) -> float:
        counts = torch.tensor([(before < p).sum().item(), tokens], dtype=torch.float64, device=before.device)
        pairs, total = reduce(counts).tolist()
        return pairs / total

    low, high = 0.0, 1.0
    for _ in range(24):  # to fp32's resolution of a number in [0, 1]
        middle = (low + high) / 2
        low, high = (middle, high) if mean_active(middle) < target else (low, middle)
    return high, mean_active(current.item())
