"""How an autoencoder is trained: the sections that `dit-moe train-autoencoder` and a run with one of its own share."""

from __future__ import annotations

from dataclasses import dataclass, field

from dit_moe.autoencoders.kl import KLConfig, KLLossConfig
from dit_moe.config import require
from dit_moe.training import TrainConfig


@dataclass(frozen=True, kw_only=True)
class AutoencoderSettings:
    """The network, its loss and its training, of whatever images."""

    autoencoder: KLConfig
    loss: KLLossConfig = field(default_factory=KLLossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**63, self, "seed", "must be a whole number from 0 to 2^63 − 1")
