"""Perplexity: how well a language model predicts documents, each by itself, in lm-evaluation-harness's windows.

A document's number depends neither on the others nor, but for rounding, on the batch it is in. Batches are the same
however many processes share them, so that the numbers do not depend on that at all.
"""

# N documents, B windows of a batch, S tokens of the longest, R predicted tokens of all, V vocabulary

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_moe.config import ConfigError, WorkFailed
from dit_moe.distributed import enough_memory, join_processes, on_all
from dit_moe.models import LM
from dit_moe.moe import ActiveExperts, measure_layers, no_active_experts
from dit_moe.text.tokenizer import Document

BUCKET = 64  # batches whose windows are sorted by length together, and dealt out to the processes
CHUNK = 2**25  # logits that are held in fp32 at a time: 128 MB
LARGEST = math.log(sys.float_info.max)


class ScoringError(WorkFailed):
    """Scoring that failed in the middle."""


@dataclass(frozen=True, kw_only=True)
class TextScores:
    """How well documents were predicted: the cost of each in nats, float64 [N], its tokens and UTF-8 bytes, int64 [N].

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
        """Per token; infinite for a loss above 709, where floats end."""
        return math.exp(self.loss) if self.loss < LARGEST else math.inf

    @property
    def perplexity_std_error(self) -> float | None:
        """To first order, from that of the loss."""
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
        """All numbers, ready for JSON: None for infinite ones."""
        names = ("bits_per_byte", "perplexity", "loss")
        numbers = {key: getattr(self, key) for name in names for key in (name, f"{name}_std_error")}
        numbers = {key: None if value == math.inf else value for key, value in numbers.items()}
        counts = {name: getattr(self, name) for name in ("tokens", "bytes", "documents")}
        active = {"active_experts": self.active.mean, "active_experts_by_layer": [layer.mean for layer in self.layers]}
        return numbers | counts | active


def score(
    network: nn.Module,
    documents: Iterable[Document],
    *,
    eos: int,
    length: int,
    vocab_size: int,
    stride: int | None = None,
    batch_size: int = 16,
    max_documents: int | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
    on_progress: Callable[[int], Any] = lambda count: None,
) -> TextScores:
    """Score documents. All processes call it together, with the same ones, and get the same result.

    Args:
        network: ``tokens [B, S] → logits [B, S, V]``, or what has them as ``.logits``; causal. It is put in evaluation
            mode. Of an `LM`, logits are made only where needed, and chunk by chunk.
        documents: one without tokens still counts with its bytes.
        eos: stands before each document as its first context; it is not predicted behind it.
        length: tokens that the network sees at a time, at most.
        vocab_size: V; ids lie below it.
        stride: tokens that each window after the first predicts, 1 … length: the fewer, the more context each has, and
            the more it costs. None: length, as lm-evaluation-harness does.
        batch_size: windows.
        max_documents: score the first so many; None: all.
        precision: of the network; the softmax is in fp32 anyway.
        on_progress: called on the main process with the number of tokens that all have scored since.

    Raises ValueError if there are no tokens at all, for one beyond the vocabulary, a stride beyond the length, and
    outputs that are not finite; ScoringError if memory does not suffice.
    """
    if stride is not None and not 1 <= stride <= length:
        problem = f"={stride} must lie in 1 … {length}, the tokens that the model sees"
        raise ConfigError("stride", f"{problem}; leave it out for {length}")
    require_in_vocabulary(np.asarray([eos]), vocab_size, "the tokenizer")
    scoring = _Scoring(network.eval(), eos, vocab_size, batch_size, precision)
    windows = scoring.windows(islice(documents, max_documents), length, stride or length)
    # An error of one process is raised on all, at the latest after the next bucket.
    while any(parts := on_all(lambda: scoring.share(list(islice(windows, BUCKET * batch_size)), on_progress))):
        scoring.add(parts)
    return scoring.scores()


def require_in_vocabulary(ids: np.ndarray, vocab_size: int, whose: str) -> None:
    """ValueError, naming `whose` ids they are, unless all lie in 0 … vocab_size − 1."""
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if len(outside):
        problem = f"{whose} has the token id {outside[0]}, and the model's vocabulary ends at {vocab_size - 1}"
        raise ValueError(f"{problem}; use the tokenizer that it was trained with")


class Window(NamedTuple):
    """A document's tokens that the network sees, and the `targets` that it predicts at as many last positions."""

    document: int
    inputs: np.ndarray
    targets: np.ndarray


def rolling_windows(document: int, ids: np.ndarray, eos: int, length: int, stride: int) -> Iterator[Window]:
    """Windows that together predict every token once: the first all that it holds, each other one `stride` more.

    Those of lm-evaluation-harness (`get_rolling_token_windows`, context_len = length − stride + 1): all but the first
    are `length` long, so the last one, which has fewer tokens to predict, sees more context.
    """
    seen = np.concatenate([[eos], ids])  # token i is predicted from seen[: i + 1]
    start, end = 0, min(length, len(ids))
    while start < end:
        yield Window(document, seen[max(0, end - length) : end], ids[start:end])
        start, end = end, min(end + stride, len(ids))


Share = tuple[dict[int, tuple[int, float]], list[ActiveExperts]]
"""One process's part of a bucket: (document, nats) by the number of the window, and the active experts."""


class _Scoring:
    """Sums over the documents so far, the same on every process: each reads all windows and scores its share."""

    def __init__(self, network: nn.Module, eos: int, vocab_size: int, batch_size: int, precision: str) -> None:
        self.network, self.eos, self.vocab_size, self.batch_size = network, eos, vocab_size, batch_size
        self.device = next(network.parameters()).device
        self.autocast = torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
        self.nats: list[float] = []
        self.tokens: list[int] = []
        self.bytes: list[int] = []
        self.layers = no_active_experts(network)

    def windows(self, documents: Iterable[Document], length: int, stride: int) -> Iterator[Window]:
        """The windows of all documents in turn, whose sizes are kept."""
        for number, (ids, size) in enumerate(documents):
            ids = np.asarray(ids, dtype=np.int64)
            require_in_vocabulary(ids, self.vocab_size, f"document {number + 1}")
            self.nats.append(0.0)
            self.tokens.append(len(ids))
            self.bytes.append(size)
            yield from rolling_windows(number, ids, self.eos, length, stride)

    def share(self, bucket: list[Window], on_progress: Callable[[int], Any]) -> Share | None:
        """Score this process's batches of a bucket, the longest windows first; None for an empty one."""
        if not bucket:
            return None
        state, size = join_processes(), self.batch_size
        order = sorted(range(len(bucket)), key=lambda i: -len(bucket[i].inputs))
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        costs, layers = dict[int, tuple[int, float]](), no_active_experts(self.network)
        for i in range(state.process_index, len(batches), state.num_processes):
            batch = [bucket[number] for number in batches[i]]
            for number, window, nats in zip(batches[i], batch, self._nats(batch, layers), strict=True):
                costs[number] = window.document, nats
            if state.is_main_process:
                done = batches[i : i + state.num_processes]  # the others are about as far
                on_progress(sum(len(bucket[number].targets) for part in done for number in part))
        return costs, layers

    def add(self, parts: Sequence[Share | None]) -> None:
        """Add the shares of all processes in the order of the windows: sums do not depend on who scored which."""
        costs: dict[int, tuple[int, float]] = {}
        for found, layers in filter(None, parts):
            costs |= found
            for layer, own in zip(self.layers, layers, strict=True):
                layer.add(own)
        for _, (document, nats) in sorted(costs.items()):
            self.nats[document] += nats

    def _nats(self, batch: list[Window], layers: list[ActiveExperts]) -> list[float]:
        """The cost of each window, summed in float64. Padding is to the right, where causal attention does not look."""
        ends = [len(window.inputs) for window in batch]
        tokens_BS = np.full((len(batch), max(ends)), self.eos)
        scored_BS = np.zeros(tokens_BS.shape, dtype=bool)
        for i, (window, end) in enumerate(zip(batch, ends, strict=True)):
            tokens_BS[i, :end] = window.inputs
            scored_BS[i, end - len(window.targets) : end] = True
        rows_R = torch.from_numpy(np.flatnonzero(scored_BS)).to(self.device)
        targets_R = torch.from_numpy(np.concatenate([window.targets for window in batch])).to(self.device)
        scored_N = torch.from_numpy(scored_BS.ravel()).to(self.device)
        enough = enough_memory(ScoringError, "lower batch_size")
        with enough, torch.no_grad(), self.autocast, measure_layers(self.network, layers, scored_N):
            nats_R = self._cost(torch.from_numpy(tokens_BS).to(self.device), rows_R, targets_R)
        parts = nats_R.cpu().double().split([len(window.targets) for window in batch])
        return [part.sum().item() for part in parts]

    def _cost(self, tokens_BS: Tensor, rows_R: Tensor, targets_R: Tensor) -> Tensor:
        """−ln p of the targets behind the positions `rows_R` of the flattened batch, fp32 [R]."""
        project: Callable[[Tensor], Tensor] = nn.Identity()
        if isinstance(self.network, LM):
            states, project = self.network(tokens_BS, states=True), self.network.project
        else:
            states = self.network(tokens_BS)
            states = getattr(states, "logits", states)
        flat, size = states.flatten(0, 1), max(1, CHUNK // self.vocab_size)
        parts = zip(rows_R.split(size), targets_R.split(size), strict=True)
        return torch.cat([F.cross_entropy(project(flat[at]).float(), to, reduction="none") for at, to in parts])

    def scores(self) -> TextScores:
        """The scores of all documents. ValueError if there was nothing to predict, or a cost is not finite."""
        if not sum(self.tokens):
            raise ValueError(f"{len(self.tokens)} documents without any tokens; name some that hold text")
        nats_N = np.array(self.nats)
        for number in np.flatnonzero(~np.isfinite(nats_N))[:1]:
            problem = f"document {number + 1} costs {nats_N[number]} nats: the network's outputs are not finite"
            raise ValueError(f"{problem}; take an earlier checkpoint")
        tokens_N, bytes_N = np.array(self.tokens), np.array(self.bytes)
        return TextScores(nats_N=nats_N, tokens_N=tokens_N, bytes_N=bytes_N, layers=self.layers)
