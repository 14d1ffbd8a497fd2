"""What objectives and samplers share: their registries, what a network is to them, label dropout."""

# B batch, C channels, H height, W width

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dit_moe.config import require
from dit_moe.randomness import BatchRandom
from dit_moe.registry import Registry

OBJECTIVES = Registry("objective")
SAMPLERS = Registry("sampler")

Network = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(noisy latents [B,C,H,W], the network's own time [B], labels [B]) → [B, C or 2C, H, W]."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Options of every objective."""

    label_dropout: float = 0.1
    """Probability of training an image under the null label, which guidance needs."""

    def __post_init__(self) -> None:
        require(0 <= self.label_dropout <= 1, self, "label_dropout", "must lie in [0, 1]")


class Objective(ABC):
    """A training loss: ``objective(model, {"latents": …, "labels": …}, random) → {"loss": …, other scalars}``."""

    name: ClassVar[str]
    default_sampler: ClassVar[str]
    """Name of the sampler to use when a config names none."""
    config: ObjectiveConfig
    learns_sigma: bool
    """Whether the network must give 2C channels, of which the second C parametrise the variance."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.null_label = num_classes  # stands for no label: the one after the last class

    def place(self, network_time: float) -> float:
        """Where on the way from data, 0, to noise, 1, a time is that the network is told; ValueError if it cannot say.

        Only what changes on that way needs it (sample.vary=time).
        """
        raise ValueError(f"sample.vary=time needs an objective that has the method `place`, and {self.name} has none")

    def noisy_at(self, x0: Tensor, eps: Tensor, place: float) -> tuple[Tensor, Tensor]:
        """What the network is shown at a place: `x0` with the noise `eps`, [B,C,H,W], and the time it is told, [B].

        An objective of discrete levels takes the nearest one. ValueError if it cannot say; only `dit-moe routing` asks.
        """
        raise ValueError(f"dit-moe routing needs an objective that has the method `noisy_at`, and {self.name} has none")

    def check(self, latent_shape: tuple[int, int, int]) -> None:  # noqa: B027 (most take any shape)
        """ConfigError, naming the option, if latents of this shape (C,H,W) cannot be trained with the options given."""

    @abstractmethod
    def __call__(self, model: Network, batch: Mapping[str, Tensor], random: BatchRandom) -> dict[str, Tensor]:
        """Mean losses over the batch: "loss" carries the gradient, the other scalars are detached.

        `batch` holds "latents" [B,C,H,W] and "labels" int64 [B]. Whatever the network's dtype, losses are fp32.
        """

    def drop_labels(self, labels_B: Tensor, random: BatchRandom) -> Tensor:
        """Replace each label by the null label with probability `label_dropout`."""
        dropped_B = (random.uniform() < self.config.label_dropout).to(labels_B.device)
        return torch.where(dropped_B, self.null_label, labels_B)


def predict(model: Network, x: Tensor, t_B: Tensor, labels_B: Tensor, target: Tensor) -> Tensor:
    """``model(x, t_B, labels_B)``; a network that has `wants_target` and says so is told the training target, too."""
    if getattr(model, "wants_target", False):
        return model(x, t_B, labels_B, target=target)  # type: ignore[call-arg]
    return model(x, t_B, labels_B)


def batch_mean(terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scalars from per-image terms [B]; only "loss" keeps its gradient."""
    return {name: term_B.mean() if name == "loss" else term_B.detach().mean() for name, term_B in terms.items()}


def image_mean(x_BCHW: Tensor) -> Tensor:
    """Mean over everything but the batch, [B]."""
    return x_BCHW.flatten(1).mean(1)


def like_images(values_B: Tensor, x_BCHW: Tensor) -> Tensor:
    """One value per image as [B,1,1,1] in the dtype and on the device of `x_BCHW`, to be broadcast over it."""
    return values_B.to(x_BCHW.device, x_BCHW.dtype).view(-1, *[1] * (x_BCHW.ndim - 1))
