"""The training objective on images that were not trained on, at fixed noise and times.

Every network gets the same images under the same draws (common random numbers), so that two numbers differ only by the
networks, and differences of 0.1 % show with few seeds.
"""

# B images of a batch

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dit_moe.autoencoders import FirstStage
from dit_moe.autoencoders.base import Moments
from dit_moe.config import require
from dit_moe.data import Dataset
from dit_moe.diffusion import OBJECTIVES, Objective
from dit_moe.moe import ActiveExperts, measure_layers
from dit_moe.randomness import BatchRandom


@dataclass(frozen=True, kw_only=True)
class HeldoutConfig:
    """What a held-out loss is a mean over. Only numbers with equal settings can be compared."""

    draws: int = 8  # of noise and time for each image
    images: int | None = None  # so many, evenly spaced; None: all
    batch_size: int = 256  # that share a stratification of times, if the objective stratifies
    seed: int = 0  # of the draws; has nothing to do with the seeds of runs

    def __post_init__(self) -> None:
        for name in ("draws", "batch_size"):
            require(getattr(self, name) >= 1, self, name, "must be at least 1")
        require(self.images is None or self.images >= 1, self, "images", "must be at least 1, or null for all")
        require(0 <= self.seed < 2**63, self, "seed", "must be a whole number from 0 to 2^63 − 1")


@dataclass(frozen=True, kw_only=True)
class HeldoutLoss:
    """Means over images and draws: the objective's `terms` by name, "loss" among them, and what the routers did."""

    terms: dict[str, float]
    layers: list[ActiveExperts]  # of each MoE layer; none in a dense model
    images: int

    @property
    def loss(self) -> float:
        return self.terms["loss"]

    @property
    def active(self) -> float | None:
        """Mean active experts a token over all layers."""
        return ActiveExperts.total(self.layers).mean


def heldout_loss(
    model: nn.Module,
    objective: Objective,
    stage: FirstStage,
    dataset: Dataset,
    config: HeldoutConfig = HeldoutConfig(),
    on_batch: Callable[[], object] = lambda: None,
) -> HeldoutLoss:
    """The loss of `model` on `dataset`, given each image's label: labels are not dropped. In fp32.

    Args:
        model: in evaluation mode, on its device; routers are counted beside the statistics of training.
        on_batch: called after each batch of each draw.

    Raises ValueError if the loss is not finite.
    """
    device = next(model.parameters()).device
    labelled: Any = replace(objective.config, label_dropout=0.0)
    without_dropout: Objective = OBJECTIVES.build(labelled, num_classes=objective.num_classes)
    count = len(dataset) if config.images is None else min(len(dataset), config.images)
    rows = [i * len(dataset) // count for i in range(count)]  # evenly spaced
    sums: dict[str, float] = defaultdict(float)
    with torch.no_grad(), measure_layers(model) as layers:
        for start in range(0, len(rows), config.batch_size):
            part = rows[start : start + config.batch_size]
            batch = {name: value.to(device) for name, value in dataset.__getitems__(part).items()}
            moments = stage.moments_of(batch)
            for draw in range(config.draws):
                random = BatchRandom(config.seed, "heldout", draw, start, total=len(part))
                latents = _sample(moments, random)
                terms = without_dropout(model, {"latents": latents, "labels": batch["labels"]}, random)
                for name, mean in terms.items():
                    sums[name] += mean.item() * len(part)
                on_batch()
    means = {name: total / (count * config.draws) for name, total in sums.items()}
    if not math.isfinite(means["loss"]):
        raise ValueError(f"the held-out loss is {means['loss']}: the network's outputs are not finite")
    return HeldoutLoss(terms=means, layers=layers, images=count)


def _sample(moments: Moments, random: BatchRandom) -> Tensor:
    return moments.sample(lambda like: random.normal(*like.shape[1:]).to(like.device))
