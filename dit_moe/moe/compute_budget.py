"""The compute dial: a trained network at work with more, or fewer, experts a token than it was trained for.

Of routers with a threshold it sets p, solved for a wanted mean on what the network is about to do, or given; of top-k
routers it sets k. The weights and the trained thresholds stay as they are.
"""

# P parts of the way from noise to data, L MoE layers

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import nn

from dit_moe.config import ConfigError, require
from dit_moe.moe.calibrate import PASSES, record_joining, solve_thresholds
from dit_moe.moe.layer import MoEConfig
from dit_moe.moe.router_update import routers_of
from dit_moe.moe.routers.dtopp import DTopPRouter
from dit_moe.moe.routers.topp import TopPRouter
from dit_moe.moe.routing import threshold_p, threshold_u

Settings = Sequence[Sequence[float]]  # [P, L], what `Router.setting` takes
ROUNDING = 1e-5  # of a part: networks are told times in fp32, and 1 − 0.9 falls short of a tenth


@dataclass(frozen=True, kw_only=True)
class DialConfig:
    """How many experts a token uses, other than as trained. Part of every section `sample`.

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
        for field, values in (("target", _listed(self.target)), ("p", _listed(self.p))):
            fits = all(value > 0 for value in values) if field == "target" else all(0 <= value <= 1 for value in values)
            require(fits, self, field, "must be above 0" if field == "target" else "must lie in [0, 1]")

    @property
    def asked(self) -> tuple[Literal["target", "p"], float | tuple[float, ...]] | None:
        """The field that is given, and its value; None: as trained."""
        if self.target is not None:
            return "target", self.target
        return None if self.p is None else ("p", self.p)

    def check(self, moe: MoEConfig | None, layers: int) -> None:
        """ConfigError unless a model with `layers` layers like `moe` can be run like this."""
        if self.asked is None:
            return
        (field, value), turns = self.asked, None if moe is None else moe.router.DIAL
        shown = _shown(value)
        if moe is None or turns is None:
            wanted = "needs a model whose routers have a threshold, or k, to set"
            raise ConfigError(field, f"={shown} {wanted}; drop the line")
        if field == "p" and turns == "k":
            raise ConfigError("p", f"={shown} needs routers with a threshold, and these have k; set target")
        if isinstance(value, tuple) and self.vary == "layer" and len(value) != layers:
            remedy = f"give {layers}, or a single number"
            raise ConfigError(field, f"={shown} has {len(value)} values for {layers} MoE layers; {remedy}")
        for target in _listed(self.target):
            moe.router.check(moe.experts, target)

    def describe(self) -> str | None:
        """In words, for what is said of samples; None: as trained."""
        if self.asked is None:
            return None
        field, value = self.asked
        return f"{field}={_shown(value)}" + (f" by {self.vary}" if isinstance(value, tuple) else "")

    def table(self, layers: int) -> list[list[float]]:
        """The targets, or p, asked for by part and layer; empty: as trained."""
        values = list(_listed(self.target) or _listed(self.p))
        if isinstance(self.target or self.p, tuple) and self.vary == "layer":
            return [values]
        return [[value] * layers for value in values]


def _shown(value: float | tuple[float, ...]) -> str:
    return f"[{', '.join(f'{one:g}' for one in value)}]" if isinstance(value, tuple) else f"{value:g}"


def _listed(value: float | tuple[float, ...] | None) -> tuple[float, ...]:
    return () if value is None else value if isinstance(value, tuple) else (value,)


class Dial:
    """Settings of a model's routers that are in effect where `at` or `keep` says so.

    Args:
        model: with routers.
        settings_PL: thresholds as `threshold_u` has them, or k, by part of the way, the first at the noise, and by MoE
            layer.
    """

    def __init__(self, model: nn.Module, settings_PL: Settings) -> None:
        self.routers, self.settings_PL = routers_of(model), settings_PL
        self.part = 0  # in which the network was used last

    @contextmanager
    def at(self, time: float = 1.0) -> Iterator[None]:
        """While entered, the model's routers work as is set for `time`, from 1, noise, to 0, data."""
        self.part = part_of(time, len(self.settings_PL))
        before = [router.setting for router in self.routers]
        self._set(self.settings_PL[self.part])
        try:
            yield
        finally:
            self._set(before)

    @property
    def thresholds_PL(self) -> Settings:
        """The p of routers that have a threshold, by part and layer; empty if they have k."""
        if not isinstance(self.routers[0], TopPRouter):
            return []
        return [[threshold_p(u) for u in settings_L] for settings_L in self.settings_PL]

    def keep(self) -> None:
        """Let the model work like this from now on; for settings that do not change on the way."""
        assert len(self.settings_PL) == 1
        self._set(self.settings_PL[0])

    def _set(self, settings_L: Sequence[float | None]) -> None:
        for router, setting in zip(self.routers, settings_L, strict=True):
            router.setting = setting


def part_of(time: float, parts: int) -> int:
    """The number of the part, of so many equal ones, that a time lies in; from 1, noise, in the first, to 0, data."""
    return max(0, min(int((1 - time) * parts + ROUNDING), parts - 1))


def turn(
    config: DialConfig, model: nn.Module, run: Callable[[Dial], object], times: Sequence[float] = (1.0,)
) -> Dial | None:
    """The dial of a model as a checked config asks; None: as trained.

    Args:
        run: what thresholds are solved on: forward passes within `Dial.at`, over something representative; called a
            few times, as later tokens depend on the thresholds before them. Not called if nothing is to be solved.
        times: at which the network is going to be used.

    Raises ConfigError for a part of the way without any of `times`, and for routers whose config promises a threshold
    that they do not have.
    """
    routers = routers_of(model)
    table_PL = config.table(len(routers))
    if not table_PL or config.asked is None:
        return None
    field, value = config.asked
    steered = [router for router in routers if isinstance(router, TopPRouter)]
    for router in routers:
        if router.config.DIAL == "p" and not isinstance(router, TopPRouter):
            problem = (
                f"={_shown(value)} needs thresholds, and {type(router).__name__} is no TopPRouter, for all its DIAL"
            )
            raise ConfigError(field, f"{problem}; derive it from that, or drop the line")
    idle = set(range(len(table_PL))) - {part_of(time, len(table_PL)) for time in times}
    if idle:
        problem = f"={_shown(value)} has {len(table_PL)} values, and no step of the sampler is in part {min(idle) + 1}"
        raise ConfigError(field, f"{problem} of the way; give fewer values, or sampler.steps more")
    if config.target is None:
        return Dial(model, [[threshold_u(p) for p in p_L] for p_L in table_PL])
    if not steered:
        return Dial(model, table_PL)
    assert len(steered) == len(routers), "all layers have routers of one kind"
    apart = config.vary == "layer" and isinstance(config.target, tuple)
    apart = apart or any(isinstance(router, DTopPRouter) and router.config.layerwise for router in steered)
    trained_L = [router.trained_u() if router.setting is None else router.setting for router in steered]
    dial = Dial(model, [trained_L] * len(table_PL))
    for _ in range(PASSES):
        with torch.no_grad(), ExitStack() as stack:
            recordings = [record_joining(steered, partial(_is_at, dial, part)) for part in range(len(table_PL))]
            joining_PL = [stack.enter_context(recording) for recording in recordings]
            run(dial)
        dial.settings_PL = [
            solve_thresholds(torch.stack(joining_L), targets_L, apart)
            for joining_L, targets_L in zip(joining_PL, table_PL, strict=True)
        ]
    return dial


def _is_at(dial: Dial, part: int) -> bool:
    return dial.part == part


def thresholds(model: nn.Module) -> list[float]:
    """The p in effect of each router that has one, in order of depth."""
    return [router.threshold() for router in routers_of(model) if isinstance(router, TopPRouter)]


def absorb(model: nn.Module) -> None:
    """Make what `Dial.keep` set a part of the weights, which are saved; ConfigError for routers that cannot hold it."""
    for router in routers_of(model):
        if router.setting is None:
            continue
        if not isinstance(router, DTopPRouter):
            raise ConfigError("sample", " has target or p, which only the weights of dtopp routers can hold; drop it")
        bounds, controller = router.config.controller, router.controller
        if not controller.lowest <= router.setting <= controller.highest:
            kept = f"which its controller keeps in [{bounds.p_min}, {bounds.p_max}]"
            problem = f" asks for p={router.threshold():.6g}, {kept}"
            raise ConfigError("sample", f"{problem}; choose another target, or p")
        router.controller.restart(router.setting)
        router.setting = None
