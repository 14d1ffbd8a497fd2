"""The compute budget of a network: how many experts a token uses on average, and the thresholds that give it.

At the start of training `calibrate` solves the thresholds that their controllers begin with. A trained network can be
used with more, or fewer, experts than it was trained for: of routers with a threshold p is set, solved for a wanted
mean on what the network is about to do, or given; of top-k routers k is set. Weights and trained thresholds stay.
"""

# P equal parts of the way from noise to data, L MoE layers, N tokens, D width, E experts, K bins

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from dit_moe.config import ConfigError, require
from dit_moe.moe.layer import MoEConfig
from dit_moe.moe.router_update import Reduce, observe_routers, routers_of
from dit_moe.moe.routers.dtopp import DTopPRouter
from dit_moe.moe.routers.topp import TopPRouter
from dit_moe.moe.routing import LARGEST_U, Routing, threshold_p, threshold_u

Budgets = Sequence[Sequence[float]]  # [P, L]
BINS = 16_384  # of ln(1 + u), with u = −ln(1 − p): to 0.0003 of u near 0, and to 0.02 near LARGEST_U
LAST = math.log1p(LARGEST_U)
PASSES = 3  # a later layer's tokens depend on the thresholds before it
ROUNDING = 1e-5  # of a part: networks get times in fp32, and 1 − 0.9 falls short of a tenth


# ------------------------------------------------------------------------------------------------ solving thresholds


def needs_calibration(model: nn.Module) -> bool:
    """Whether the model has thresholds whose start its config leaves to the first batch."""
    return any(router.config.controller.p0 is None for router in controlled_routers(model))


def calibrate(
    model: nn.Module,
    run: Callable[[], object],
    target: float | None = None,
    reduce: Reduce = lambda sums: sums,
) -> list[float]:
    """Start the thresholds where the tokens that `run()` passes through the model use `target` experts on average.

    Controllers restart from the solution. Memory does not grow with the number of tokens.

    Args:
        run: forward passes over something representative; called a few times.
        target: mean active experts per token; None is what the model was built for.
        reduce: sums a tensor over ranks.

    Returns the thresholds, one per controlled router; empty for a model without.
    """
    routers = controlled_routers(model)
    for _ in range(PASSES if routers else 0):
        with threshold_histograms(routers, 1) as histograms_PLK:
            run()
        targets = [router.target if target is None else target for router in routers]
        solved = solve_thresholds(reduce(histograms_PLK[0]), targets, routers[0].config.layerwise)
        for router, u in zip(routers, solved, strict=True):
            router.controller.restart(u)
    return [router.controller.p.item() for router in routers]


def controlled_routers(model: nn.Module) -> list[DTopPRouter]:
    """The routers whose threshold a controller moves, in order of depth."""
    return [router for router in routers_of(model) if isinstance(router, DTopPRouter)]


@contextmanager
def threshold_histograms(
    routers: Sequence[TopPRouter], parts: int, part: Callable[[], int] = lambda: 0
) -> Iterator[Tensor]:
    """While entered, without gradients, count from which u on each (token, expert) pair is active.

    The statistics and losses of training are off meanwhile. Yields float64 [P, L, K]: a histogram is [tokens, pairs
    that are active at every threshold, pairs per bin of u]. `part()` is the one that a forward pass belongs to.
    """
    histograms_PLK = torch.zeros(parts, len(routers), 2 + BINS, dtype=torch.float64, device=routers[0].load_E.device)
    modes = [router.training for router in routers]

    def count(i: int, x_ND: Tensor, routing: Routing) -> None:
        assert routing.prob_NE is not None
        left_NE, _ = routers[i].ranked(routing.prob_NE)
        u_NE = (-left_NE.clamp(min=0).log()).clamp(0, LARGEST_U)
        bin_NE = (u_NE.log1p() * (BINS / LAST)).long().clamp(max=BINS - 1) + 1
        bin_NE = torch.where(left_NE == torch.inf, 0, bin_NE)
        joins = bin_NE[left_NE > 0]  # the others are active at no threshold
        histograms_PLK[part(), i, 0] += len(left_NE)
        histograms_PLK[part(), i, 1:] += torch.bincount(joins, minlength=BINS + 1)

    for router in routers:
        router.eval()
    try:
        with torch.no_grad(), observe_routers(routers, count):
            yield histograms_PLK
    finally:
        for router, mode in zip(routers, modes, strict=True):
            router.train(mode)


def solve_thresholds(histograms_LK: Tensor, targets_L: Sequence[float], layerwise: bool) -> list[float]:
    """The u of each layer with which its mean number of active experts is its target.

    Not `layerwise`: one u for all layers, with which the mean over them is.
    """
    if not layerwise:
        histograms_LK = histograms_LK.sum(0, keepdim=True).expand_as(histograms_LK)
    return [_solve(histogram_K, target) for histogram_K, target in zip(histograms_LK, targets_L, strict=True)]


def _solve(histogram_K: Tensor, target: float) -> float:
    """The u with `target` pairs a token, linear within a bin; the nearest end if no u has."""
    assert histogram_K[0] > 0, "nothing passed the routers"
    wanted = target * histogram_K[0]
    pairs_K = histogram_K[1:].cumsum(0)  # at the end of each bin; first those that are always active
    k = int(torch.searchsorted(pairs_K, wanted))
    if k == 0:
        return 0.0
    if k > BINS:
        return LARGEST_U
    share = ((wanted - pairs_K[k - 1]) / (pairs_K[k] - pairs_K[k - 1])).item()
    return math.expm1((k - 1 + share) * LAST / BINS)


# ---------------------------------------------------------------------------------- another budget than trained for


@dataclass(frozen=True, kw_only=True)
class ComputeBudgetConfig:
    """How many experts a token uses, if other than as trained. Part of every section `sample`.

    Several values are one for each MoE layer, or one for each of so many equal parts of the way from noise to data.
    """

    target: float | tuple[float, ...] | None = None  # mean active experts; of top-k: k. None: as trained
    p: float | tuple[float, ...] | None = None  # the threshold itself, in place of `target`
    vary: Literal["layer", "time"] = "layer"  # what several values are for

    def __post_init__(self) -> None:
        for name in ("target", "p"):
            require(getattr(self, name) != (), self, name, "is empty; give a number, or several")
        both = self.target is not None and self.p is not None
        require(not both, self, "p", "and target exclude each other; drop one")
        require(all(value > 0 for value in _listed(self.target)), self, "target", "must be above 0")
        require(all(0 <= value <= 1 for value in _listed(self.p)), self, "p", "must lie in [0, 1]")

    @property
    def requested(self) -> tuple[Literal["target", "p"], float | tuple[float, ...]] | None:
        """The field that is given, and its value; None: as trained."""
        if self.target is not None:
            return "target", self.target
        return None if self.p is None else ("p", self.p)

    def check(self, moe: MoEConfig | None, layers: int) -> None:
        """ConfigError unless a model with `layers` layers like `moe` can be run like this."""
        if self.requested is None:
            return
        (field, value), adjustable = self.requested, None if moe is None else moe.router.ADJUSTABLE
        shown = _shown(value)
        if moe is None or adjustable is None:
            wanted = "needs a model whose routers have a threshold, or k, to set"
            raise ConfigError(field, f"={shown} {wanted}; drop the line")
        if field == "p" and adjustable == "k":
            raise ConfigError("p", f"={shown} needs routers with a threshold, and these have k; set target")
        if isinstance(value, tuple) and self.vary == "layer" and len(value) != layers:
            remedy = f"give {layers}, or a single number"
            raise ConfigError(field, f"={shown} has {len(value)} values for {layers} MoE layers; {remedy}")
        for target in _listed(self.target):
            moe.router.check(moe.experts, target)

    def describe(self) -> str | None:
        """In words, for reports on samples; None: as trained."""
        if self.requested is None:
            return None
        field, value = self.requested
        return f"{field}={_shown(value)}" + (f" by {self.vary}" if isinstance(value, tuple) else "")

    def by_part_and_layer(self, layers: int) -> Budgets:
        """The requested targets, or p, by part and layer; empty: as trained."""
        values = list(_listed(self.target) or _listed(self.p))
        if isinstance(self.target or self.p, tuple) and self.vary == "layer":
            return [values]
        return [[value] * layers for value in values]


def _shown(value: float | tuple[float, ...]) -> str:
    return f"[{', '.join(f'{one:g}' for one in value)}]" if isinstance(value, tuple) else f"{value:g}"


def _listed(value: float | tuple[float, ...] | None) -> tuple[float, ...]:
    return () if value is None else value if isinstance(value, tuple) else (value,)


class ComputeBudget:
    """What stands in for the trained threshold, or k, of a model's routers, where `at` or `apply` says so.

    Args:
        model: with routers.
        overrides_PL: thresholds as `threshold_u` has them, or k, by part of the way, the first at the noise, and layer.
    """

    def __init__(self, model: nn.Module, overrides_PL: Budgets) -> None:
        self.routers, self.overrides_PL = routers_of(model), overrides_PL
        self.part = 0  # in which the network was used last

    @contextmanager
    def at(self, time: float = 1.0) -> Iterator[None]:
        """While entered, the model's routers work with the budget of `time`, from 1, noise, to 0, data."""
        self.part = part_of(time, len(self.overrides_PL))
        before = [router.override for router in self.routers]
        self._set(self.overrides_PL[self.part])
        try:
            yield
        finally:
            self._set(before)

    @property
    def thresholds_PL(self) -> Budgets:
        """The p of routers that have a threshold, by part and layer; empty if they have k."""
        if not isinstance(self.routers[0], TopPRouter):
            return []
        return [[threshold_p(u) for u in overrides_L] for overrides_L in self.overrides_PL]

    def apply(self) -> None:
        """Let the model work like this from now on; for a budget that does not change on the way."""
        assert len(self.overrides_PL) == 1
        self._set(self.overrides_PL[0])

    def _set(self, overrides_L: Sequence[float | None]) -> None:
        for router, override in zip(self.routers, overrides_L, strict=True):
            router.override = override


def part_of(time: float, parts: int) -> int:
    """The number of the part, of so many equal ones, that a time lies in; from 1, noise, in the first, to 0, data."""
    return max(0, min(int((1 - time) * parts + ROUNDING), parts - 1))


def solve_budget(
    config: ComputeBudgetConfig,
    model: nn.Module,
    run: Callable[[ComputeBudget], object],
    times: Sequence[float] = (1.0,),
) -> ComputeBudget | None:
    """The compute budget of a model that a checked config requests; None: as trained.

    Args:
        run: what thresholds are solved on: forward passes within `ComputeBudget.at`, over something representative;
            called a few times. Not called if nothing is to be solved.
        times: at which the network is going to be used.

    Raises ConfigError for a part of the way without any of `times`, and for routers whose config promises a threshold
    that they do not have.
    """
    routers = routers_of(model)
    table_PL = config.by_part_and_layer(len(routers))
    if not table_PL or config.requested is None:
        return None
    field, shown = config.requested[0], _shown(config.requested[1])
    with_threshold = [router for router in routers if isinstance(router, TopPRouter)]
    for router in routers:
        if router.config.ADJUSTABLE == "p" and not isinstance(router, TopPRouter):
            problem = f"={shown} needs thresholds, and {type(router).__name__}, whose config says it has one, has none"
            raise ConfigError(field, f"{problem}; derive it from TopPRouter, or drop the line")
    unused = set(range(len(table_PL))) - {part_of(time, len(table_PL)) for time in times}
    if unused:
        problem = f"={shown} has {len(table_PL)} values, and no step of the sampler is in part {min(unused) + 1}"
        raise ConfigError(field, f"{problem} of the way; give fewer values, or sampler.steps more")
    if config.target is None:
        return ComputeBudget(model, [[threshold_u(p) for p in p_L] for p_L in table_PL])
    if not with_threshold:
        return ComputeBudget(model, table_PL)
    assert len(with_threshold) == len(routers), "all layers have routers of one kind"
    layerwise = config.vary == "layer" and isinstance(config.target, tuple)
    layerwise = layerwise or any(isinstance(router, DTopPRouter) and router.config.layerwise for router in routers)
    trained_L = [router.trained_u() if router.override is None else router.override for router in with_threshold]
    budget = ComputeBudget(model, [trained_L] * len(table_PL))
    for _ in range(PASSES):
        with threshold_histograms(with_threshold, len(table_PL), lambda: budget.part) as histograms_PLK:
            run(budget)
        budget.overrides_PL = [
            solve_thresholds(histograms_LK, targets_L, layerwise)
            for histograms_LK, targets_L in zip(histograms_PLK, table_PL, strict=True)
        ]
    return budget


def thresholds(model: nn.Module) -> list[float]:
    """The p in effect of each router that has one, in order of depth."""
    return [router.threshold() for router in routers_of(model) if isinstance(router, TopPRouter)]


def store_in_weights(model: nn.Module) -> None:
    """Make an applied budget part of the weights, which are saved; ConfigError for routers that cannot hold it."""
    for router in routers_of(model):
        if router.override is None:
            continue
        if not isinstance(router, DTopPRouter):
            raise ConfigError("sample", " has target or p, which only the weights of dtopp routers can hold; drop it")
        bounds, controller = router.config.controller, router.controller
        if not controller.lowest <= router.override <= controller.highest:
            kept = f"which its controller keeps in [{bounds.p_min}, {bounds.p_max}]"
            problem = f" asks for p={router.threshold():.6g}, {kept}"
            raise ConfigError("sample", f"{problem}; choose another target, or p")
        router.controller.restart(router.override)
        router.override = None
