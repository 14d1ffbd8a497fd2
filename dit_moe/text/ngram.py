"""A trigram model over bytes: a baseline for language models, computed in a second.

Interpolated Witten–Bell smoothing (Witten and Bell 1991, method C; Chen and Goodman 1998, Eq. 16): behind a context h
that was met c(h) times, and followed by T(h) different bytes,

    p(w | h) = (c(h, w) + T(h) · p(w | h without its first)) / (c(h) + T(h)),

down to the empty context, below which p is uniform. Every document begins in the same context, a symbol beyond the
bytes, twice, as a language model begins with its end-of-document token.
"""

# N bytes of a text, U different n-grams

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from dit_moe.text.perplexity import TextScores

BYTES = 256
START = 256  # the symbol before a document
SYMBOLS = BYTES + 1
ORDERS = (0, 1, 2)  # bytes of context


class TrigramModel:
    """Counts of the n-grams of documents. ValueError if these hold no bytes at all."""

    def __init__(self, documents: Iterable[bytes]) -> None:
        contexts_N, bytes_N = _positions(list(documents))
        if not len(bytes_N):
            raise ValueError("there is no text to count n-grams in; name documents that are not empty")
        self._tables = [_Table(contexts_N % SYMBOLS**order, bytes_N, SYMBOLS**order) for order in ORDERS]

    def probabilities(self, contexts_N: np.ndarray, bytes_N: np.ndarray) -> np.ndarray:
        """p of each byte behind each context (the two symbols before it, a number in base SYMBOLS), float64 [N]."""
        p_N = np.full(len(bytes_N), 1 / BYTES)
        for order, table in zip(ORDERS, self._tables, strict=True):
            p_N = table.refine(p_N, contexts_N % SYMBOLS**order, bytes_N)
        return p_N

    def score(self, documents: Iterable[bytes]) -> TextScores:
        """What documents cost, with each byte as a token. ValueError if they hold none."""
        documents = list(documents)
        lengths_N = np.array([len(document) for document in documents], dtype=np.int64)
        if not lengths_N.sum():
            raise ValueError(f"{len(documents)} documents without any bytes; name some that hold text")
        costs = -np.log(self.probabilities(*_positions(documents)))
        parts = np.split(costs, np.cumsum(lengths_N)[:-1])
        nats_N = np.array([math.fsum(part) for part in parts])
        return TextScores(nats_N=nats_N, tokens_N=lengths_N, bytes_N=lengths_N)


class _Table:
    """Counts of what follows each context of one order; sparse in the pairs, dense in the contexts."""

    def __init__(self, contexts_N: np.ndarray, bytes_N: np.ndarray, contexts: int) -> None:
        self.pairs_U, self.counts_U = np.unique(contexts_N * BYTES + bytes_N, return_counts=True)
        self.totals = np.bincount(contexts_N, minlength=contexts)  # c(h)
        self.kinds = np.bincount(self.pairs_U // BYTES, minlength=contexts)  # T(h)

    def refine(self, lower_N: np.ndarray, contexts_N: np.ndarray, bytes_N: np.ndarray) -> np.ndarray:
        """p of bytes behind contexts, given p behind the shorter ones; the same if the context was never met."""
        pairs_N = contexts_N * BYTES + bytes_N
        at_N = np.minimum(np.searchsorted(self.pairs_U, pairs_N), len(self.pairs_U) - 1)
        counts_N = np.where(self.pairs_U[at_N] == pairs_N, self.counts_U[at_N], 0)
        totals_N, kinds_N = self.totals[contexts_N], self.kinds[contexts_N]
        met_N = totals_N > 0
        return np.where(met_N, (counts_N + kinds_N * lower_N) / np.maximum(totals_N + kinds_N, 1), lower_N)


def _positions(documents: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Context and byte of every position of all documents, in order: int64 [N] each."""
    padded = [np.concatenate([[START, START], np.frombuffer(document, np.uint8)]) for document in documents]
    symbols = np.concatenate([np.empty(0, dtype=np.int64), *padded])
    bytes_at = np.flatnonzero(symbols != START)
    return symbols[bytes_at - 2] * SYMBOLS + symbols[bytes_at - 1], symbols[bytes_at]
