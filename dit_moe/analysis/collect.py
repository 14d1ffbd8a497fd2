"""Counting what the routers of a network do, by groups of tokens, and what the report says of the run itself.

All counts are whole numbers, so they do not depend on batches; memory does not grow with the number of tokens.
"""

# L MoE layers, D width, E experts, N tokens of a batch, K of them that count, G groups

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dit_moe import config
from dit_moe.analysis.statistics import Target
from dit_moe.experiments.run import Run
from dit_moe.moe import ROUTERS, MoEConfig, Routing, observe_routers, routers_of

Groups = Mapping[str, Tensor]
"""Ways to group tokens by name: the group of every token, int64 [N]."""


class RoutingCounts:
    """Counts of the tokens that pass the routers of `model` while `counting`.

    Args:
        groups: how many groups each way of grouping tokens has.
    """

    def __init__(self, model: nn.Module, groups: Mapping[str, int]) -> None:
        self.model, routers = model, routers_of(model)
        layers, experts, device = len(routers), routers[0].experts, routers[0].load_E.device

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.int64, device=device)

        self.with_LE = zeros(layers, experts)  # tokens with 1, 2, …, E active experts; the others have none
        self.together_LEE = zeros(layers, experts, experts)  # tokens that use both experts
        self.tokens_G = {name: zeros(count) for name, count in groups.items()}
        self.pairs_LGE = {name: zeros(layers, count, experts) for name, count in groups.items()}

    @contextmanager
    def counting(self, groups: Groups, kept_N: Tensor | None = None) -> Iterator[None]:
        """While entered, for one forward pass, count its tokens; with `kept_N`, bool, only those where it is true."""
        groups_K = {name: group_N if kept_N is None else group_N[kept_N] for name, group_N in groups.items()}
        for name, group_K in groups_K.items():
            self.tokens_G[name] += group_K.bincount(minlength=len(self.tokens_G[name]))

        def count(layer: int, x_ND: Tensor, routing: Routing) -> None:
            mask_KE = mask_of(routing, len(x_ND)) if kept_N is None else mask_of(routing, len(x_ND))[kept_N]
            experts = mask_KE.shape[1]
            self.with_LE[layer] += mask_KE.sum(1).bincount(minlength=experts + 1)[1:]
            with torch.autocast(mask_KE.device.type, enabled=False):
                used_KE = mask_KE.float()  # sums stay exact to 2^24 tokens of a batch
                self.together_LEE[layer] += (used_KE.T @ used_KE).long()
            for name, group_K in groups_K.items():
                self.pairs_LGE[name][layer].index_add_(0, group_K, mask_KE.long())

        with observe_routers(routers_of(self.model), count):
            yield

    @property
    def tokens(self) -> int:
        """How many were counted."""
        return int(next(iter(self.tokens_G.values())).sum())

    def overall(self) -> dict[str, Any]:
        """The fields of `RoutingStats` that are about all tokens."""
        with_LE = _numpy(self.with_LE)
        share_LE, none_L = with_LE / self.tokens, 1 - with_LE.sum(1) / self.tokens
        together_LEE = _numpy(self.together_LEE)
        pairs_LE = together_LEE.diagonal(axis1=1, axis2=2)
        count_E = np.arange(1, share_LE.shape[1] + 1)
        active_L = share_LE @ count_E
        with np.errstate(invalid="ignore"):  # of a layer whose experts no token uses
            load_LE = pairs_LE / pairs_LE.sum(1, keepdims=True)
        return {
            "active_L": active_L,
            "active_std_L": np.sqrt((share_LE * (count_E - active_L[:, None]) ** 2).sum(1) + none_L * active_L**2),
            "share_LE": share_LE,
            "load_LE": load_LE,
            "together_LEE": together_LEE / self.tokens,
        }

    def by(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Mean active experts [L, G], and shares of each group's pairs that the experts got [L, G, E].

        NaN for a group without tokens; the shares also for one without pairs.
        """
        pairs_LGE, tokens_G = _numpy(self.pairs_LGE[name]), _numpy(self.tokens_G[name])
        pairs_LG = pairs_LGE.sum(2)
        with np.errstate(invalid="ignore"):
            return pairs_LG / tokens_G, pairs_LGE / pairs_LG[:, :, None]


def _numpy(counts: Tensor) -> np.ndarray:
    return counts.cpu().numpy().astype(np.float64)


def mask_of(routing: Routing, tokens: int) -> Tensor:
    """Bool [N, E]: the experts of each of so many tokens."""
    mask_NE = torch.zeros(tokens, len(routing.counts_E), dtype=torch.bool, device=routing.token_R.device)
    mask_NE[routing.token_R, routing.expert_R] = True
    return mask_NE


@contextmanager
def active_of_tokens(model: nn.Module) -> Iterator[list[Tensor]]:
    """While entered, for one forward pass, the active experts of every token, int64 [N], layer by layer."""
    found: list[Tensor] = []

    def keep(layer: int, x_ND: Tensor, routing: Routing) -> None:
        found.append(mask_of(routing, len(x_ND)).sum(1))

    with observe_routers(routers_of(model), keep):
        yield found


def spaced(size: int, wanted: int) -> list[int]:
    """At most `wanted` of `size` places, evenly spaced."""
    count = min(size, wanted)
    return [i * size // count for i in range(count)]


# ------------------------------------------------------------------------------------------------------------- the run


def experts_of(run: Run) -> MoEConfig:
    """The section `model.moe` of a run; ValueError if its model is dense."""
    moe: MoEConfig | None = run.experiment.model.moe
    if moe is None:
        problem = f"{run.folder} is of the dense model {run.experiment.model.name}, in which nothing is routed"
        raise ValueError(f"{problem}; name a run with experts")
    return moe


def shape_of(run: Run) -> dict[str, Any]:
    """The fields of `RoutingStats` that follow from the config."""
    model, moe, sample = run.experiment.model, experts_of(run), run.experiment.sample
    target = trained = Target(moe.target, held=moe.router.held)
    if sample.requested is not None:  # p asked for holds no number of experts
        target = Target(moe.target, held=False) if sample.target is None else Target(float(np.mean(sample.target)))
    layers = [block for block in range(model.depth) if model.has_experts(block)]
    return {
        "layers_L": layers,
        "experts": moe.experts,
        "target": target,
        "trained_target": trained,
        "adjustable": moe.router.ADJUSTABLE is not None,
        "remark": moe.router.remark(moe.experts),
    }


def run_facts(run: Run, thresholds: Sequence[Any]) -> dict[str, Any]:
    """What a reader wants to know of the network, and of the thresholds in effect, by names to be shown."""
    model, moe, footprint = run.experiment.model, experts_of(run), run.experiment.model.footprint()
    facts = {
        "run": str(run.folder),
        "step": run.step,
        "weights": run.experiment.sample.weights,
        "weights sha256": run.sha256,
        "model": model.name,
        "router": _router(moe),
        "shared experts": moe.shared_experts,
        "parameters": footprint.total_params,
        "active parameters at the trained target": round(footprint.active_params),
    }
    sample = run.experiment.sample
    if sample.requested is not None:
        name, value = sample.requested
        how = f" by {sample.vary}" if isinstance(value, tuple) else ""
        facts |= {"trained target": moe.target, "asked for": f"{name}={value}{how}"}
    if thresholds:
        facts["thresholds"] = list(thresholds)
    return facts


def _router(moe: MoEConfig) -> str:
    """Its name and the options that are not its defaults."""
    router, default = moe.router, type(moe.router)().resolved(moe.experts, moe.target)
    changed = config.differences(config.dump(default), config.dump(router))
    return ", ".join([ROUTERS.name_of(router), *sorted(f"{name}={value}" for name, (_, value) in changed)])
