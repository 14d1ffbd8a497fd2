"""Solving thresholds instead of steering them: so that given tokens use a wanted number of experts on average."""

# L steered routers, N tokens, E experts, K bins

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dit_moe.moe.router_update import Reduce, observe_routers, routers_of
from dit_moe.moe.routers.dtopp import DTopPRouter
from dit_moe.moe.routers.topp import TopPRouter
from dit_moe.moe.routing import LARGEST_U, Routing

BINS = 16_384  # of ln(1 + u), with u = −ln(1 − p): to 0.0003 of u near 0, and to 0.02 near LARGEST_U
LAST = math.log1p(LARGEST_U)
PASSES = 3  # a later layer's tokens depend on the thresholds before it


def starts_unsolved(model: nn.Module) -> bool:
    """Whether the model has thresholds whose start its config leaves to the first batch."""
    return any(router.config.controller.p0 is None for router in steered_routers(model))


def calibrate(
    model: nn.Module,
    run: Callable[[], object],
    target: float | None = None,
    reduce: Reduce = lambda sums: sums,
) -> list[float]:
    """Set the thresholds so that the tokens which `run()` feeds through the model use `target` experts on average.

    For the start of training (p_0 solved on the first batch). Controllers restart from the solution. Memory does not
    grow with the number of tokens. `moe.dial` solves for another compute budget after training.

    Args:
        run: forward passes without gradients over something representative; called a few times.
        target: mean active experts per token; None is what the model was built for.
        reduce: sums a tensor over ranks.

    Returns the thresholds, one per steered router; empty for a model without.
    """
    routers = steered_routers(model)
    for _ in range(PASSES if routers else 0):
        with torch.no_grad(), record_joining(routers) as histograms:
            run()
        targets = [router.target if target is None else target for router in routers]
        solved = solve_thresholds(reduce(torch.stack(histograms)), targets, routers[0].config.layerwise)
        for router, u in zip(routers, solved, strict=True):
            router.controller.restart(u)
    return [router.controller.p.item() for router in routers]


def steered_routers(model: nn.Module) -> list[DTopPRouter]:
    """The routers whose threshold a controller moves, in order of depth."""
    return [router for router in routers_of(model) if isinstance(router, DTopPRouter)]


@contextmanager
def record_joining(routers: Sequence[TopPRouter], when: Callable[[], bool] = lambda: True) -> Iterator[list[Tensor]]:
    """While entered, count at which u each pair would join, by router, with training's statistics and losses off.

    A histogram is [tokens, pairs that every threshold keeps, pairs per bin], float64. Nothing is counted while
    `when()` is false.
    """
    histograms = [torch.zeros(2 + BINS, dtype=torch.float64, device=router.weight.device) for router in routers]
    modes = [router.training for router in routers]

    def record(i: int, x_ND: Tensor, routing: Routing) -> None:
        if not when():
            return
        left_NE, _ = routers[i].ranked(routers[i].probabilities(x_ND)[1])
        u_NE = (-left_NE.clamp(min=0).log()).clamp(0, LARGEST_U)
        bin_NE = (u_NE.log1p() * (BINS / LAST)).long().clamp(max=BINS - 1) + 1
        bin_NE = torch.where(left_NE == torch.inf, 0, bin_NE)
        joins = bin_NE[left_NE > 0]  # what every threshold leaves out has no place
        histograms[i][0] += len(left_NE)
        histograms[i][1:] += torch.bincount(joins, minlength=BINS + 1)

    for router in routers:
        router.eval()
    try:
        with observe_routers(routers, record):
            yield histograms
    finally:
        for router, mode in zip(routers, modes, strict=True):
            router.train(mode)


def solve_thresholds(counts_LK: Tensor, targets_L: Sequence[float], layerwise: bool) -> list[float]:
    """Of histograms as `record_joining` makes them, the u of each layer with which the mean is its target.

    Not `layerwise`: one for all layers, with which the mean over them is.
    """
    if not layerwise:
        counts_LK = counts_LK.sum(0, keepdim=True).expand_as(counts_LK)
    return [_solve(counts_K, target) for counts_K, target in zip(counts_LK, targets_L, strict=True)]


def _solve(histogram: Tensor, target: float) -> float:
    """The u with `target` pairs a token, linear within a bin; the nearest end if no u has."""
    assert histogram[0] > 0, "nothing passed the routers"
    wanted = target * histogram[0]
    pairs_K = histogram[1:].cumsum(0)  # at the end of each bin; first those that are always kept
    k = int(torch.searchsorted(pairs_K, wanted))
    if k == 0:
        return 0.0
    if k > BINS:
        return LARGEST_U
    share = ((wanted - pairs_K[k - 1]) / (pairs_K[k] - pairs_K[k - 1])).item()
    return math.expm1((k - 1 + share) * LAST / BINS)
