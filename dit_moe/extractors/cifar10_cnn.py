"""CIFAR-10's own feature space: a small CNN that learned from images which are reserved for it, of 32×32 in colour.

The network is that of `trained_cnn`, and is kept as one. Training is not bit-stable across machines, so the weights
are committed and their hash is checked. `eval/train_cifar10_cnn.py` made them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dit_moe.extractors.base import EXTRACTORS
from dit_moe.extractors.trained_cnn import TrainedCNNConfig, TrainedCNNExtractor

WEIGHTS = Path(__file__).parent / "weights" / "cifar10_cnn64"
SHA256 = "3739d85fd527c20674e7c3acbc4a3e11b287ffdda649583418b25a48f74d41f4"


@dataclass(frozen=True, kw_only=True)
class Cifar10CNNConfig:
    """No options: other weights would be another feature space, and need another name."""


@EXTRACTORS.register("cifar10_cnn64", Cifar10CNNConfig)
class Cifar10CNNExtractor(TrainedCNNExtractor):
    """The committed network. Raises ValueError if its weights are not the ones whose hash is recorded here."""

    included = True
    metrics = ("fd", "kid", "precision_recall", "class_accuracy", "nearest_neighbour")

    def __init__(self, config: Cifar10CNNConfig) -> None:
        super().__init__(TrainedCNNConfig(weights=str(WEIGHTS)))
        if self.sha256 != SHA256:
            problem = f"{WEIGHTS} has weights of the sha256 {self.sha256}, not {SHA256}"
            raise ValueError(f"{problem}: features of other weights cannot be compared; restore the folder")
        self.name = "cifar10_cnn64"
