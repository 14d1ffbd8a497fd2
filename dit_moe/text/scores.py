"""How well documents were predicted, whatever predicted them, and how far the numbers can be trusted."""

# N documents

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dit_moe.moe import ActiveExperts

LARGEST = math.log(sys.float_info.max)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Of each document: nats, float64 [N], that its tokens, int64 [N], of so many bytes in UTF-8, int64 [N], cost.

    The numbers are ratios of sums over all documents, so a long one counts for more. Their standard errors are those of
    ratio estimators (Cochran 1977, Eq. 6.13), over documents drawn independently of each other; None for a single one.
    """

    nats_N: np.ndarray
    tokens_N: np.ndarray
    bytes_N: np.ndarray
    layers: list[ActiveExperts] = field(default_factory=list)  # at the positions that predict, of each MoE layer

    @property
    def documents(self) -> int:
        return len(self.nats_N)

    @property
    def tokens(self) -> int:
        return int(self.tokens_N.sum())

    @property
    def bytes(self) -> int:
        return int(self.bytes_N.sum())

    @property
    def nats(self) -> float:
        return math.fsum(self.nats_N)

    @property
    def active(self) -> ActiveExperts:
        """Of all layers together."""
        return ActiveExperts.total(self.layers)

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def loss_std_error(self) -> float | None:
        return self._std_error(self.tokens_N)

    @property
    def perplexity(self) -> float:
        """Per token; infinite where floats end, at a loss of 710."""
        return math.exp(self.loss) if self.loss < LARGEST else math.inf

    @property
    def perplexity_std_error(self) -> float | None:
        """To first order in the loss's."""
        error = self.loss_std_error
        return None if error is None else self.perplexity * error

    @property
    def bits_per_byte(self) -> float:
        """What can be compared between models with different tokenizers."""
        return self.nats / self.bytes / math.log(2)

    @property
    def bits_per_byte_std_error(self) -> float | None:
        error = self._std_error(self.bytes_N)
        return None if error is None else error / math.log(2)

    def _std_error(self, sizes_N: np.ndarray) -> float | None:
        """Of nats per size."""
        n, size = self.documents, int(sizes_N.sum())
        if n < 2:
            return None
        residuals_N = self.nats_N - self.nats / size * sizes_N
        return math.sqrt(n / (n - 1) * math.fsum(residuals_N**2)) / size

    def report(self) -> dict[str, Any]:
        """All of it, ready for JSON: what is infinite is None."""
        names = ("bits_per_byte", "perplexity", "loss")
        numbers = {key: getattr(self, key) for name in names for key in (name, f"{name}_std_error")}
        numbers = {key: None if value == math.inf else value for key, value in numbers.items()}
        counts = {name: getattr(self, name) for name in ("tokens", "bytes", "documents")}
        active = {"active_experts": self.active.mean, "active_experts_by_layer": [layer.mean for layer in self.layers]}
        return numbers | counts | active
