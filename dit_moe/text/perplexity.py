"""What documents cost a language model, each by itself, in the windows of lm-evaluation-harness.

A document's number depends neither on the others nor, but for rounding, on the batch it is in. Batches are the same
however many processes share them, so that the numbers do not depend on that at all.
"""

# B windows of a batch, S tokens of the longest, R predicted tokens of all, D width, V vocabulary

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_moe.config import ConfigError
from dit_moe.distributed import join_processes, on_all
from dit_moe.models import LM
from dit_moe.moe import ActiveExperts, measure_layers, no_active_experts
from dit_moe.text.scores import Scores

BUCKET = 64  # batches whose windows are sorted by length together, and dealt out to the processes
CHUNK = 2**25  # logits that are held in fp32 at a time: 128 MB

Document = tuple[Sequence[int] | np.ndarray, int]
"""A document's token ids, without special ones, and its length in bytes of UTF-8."""


class ScoringError(RuntimeError):
    """Scoring that failed in the middle."""


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
    on_progress: Callable[[int], Any] | None = None,
) -> Scores:
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
    require_stride(stride, length)
    require_in_vocabulary(np.asarray([eos]), vocab_size, "the tokenizer")
    scoring = _Scoring(network.eval(), eos, vocab_size, batch_size, precision, on_progress or (lambda count: None))
    windows = scoring.windows(islice(documents, max_documents), length, stride or length)
    # What one process cannot read or compute is raised on all, a bucket later at most.
    while any(parts := on_all(lambda: scoring.share(list(islice(windows, BUCKET * batch_size))))):
        scoring.add(parts)
    return scoring.scores()


def require_stride(stride: int | None, length: int) -> None:
    """ConfigError unless windows of `length` tokens can advance by `stride`."""
    if stride is not None and not 1 <= stride <= length:
        problem = f"={stride} must lie in 1 … {length}, the tokens that the model sees"
        raise ConfigError("stride", f"{problem}; leave it out for {length}")


def require_in_vocabulary(ids: np.ndarray, vocab_size: int, whose: str) -> None:
    """ValueError, saying whose they are, unless all ids lie in 0 … vocab_size − 1."""
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if len(outside):
        problem = f"{whose} has the token id {outside[0]}, and the model's vocabulary ends at {vocab_size - 1}"
        raise ValueError(f"{problem}; use the tokenizer that it was trained with")


class Window(NamedTuple):
    """A document's tokens that the network sees, and the `targets` behind as many last ones of them."""

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


class Share(NamedTuple):
    """What one process made of a bucket: (document, nats) by the number of the window, and its experts."""

    costs: dict[int, tuple[int, float]]
    layers: list[ActiveExperts]


class _Scoring:
    """Sums over the documents so far, the same on every process: each reads all windows and scores its share."""

    def __init__(
        self,
        network: nn.Module,
        eos: int,
        vocab_size: int,
        batch_size: int,
        precision: str,
        on_progress: Callable[[int], Any],
    ) -> None:
        self.network, self.eos, self.vocab_size = network, eos, vocab_size
        self.batch_size, self.precision = batch_size, precision
        self.on_progress = on_progress
        self.device = next(network.parameters()).device
        self.nats: list[float] = []
        self.tokens: list[int] = []
        self.bytes: list[int] = []
        self.layers = no_active_experts(network)

    def windows(self, documents: Iterable[Document], length: int, stride: int) -> Iterator[Window]:
        """Of all documents in turn, which are noted as they come."""
        for number, (ids, size) in enumerate(documents):
            ids = np.asarray(ids, dtype=np.int64)
            require_in_vocabulary(ids, self.vocab_size, f"document {number + 1}")
            self.nats.append(0.0)
            self.tokens.append(len(ids))
            self.bytes.append(size)
            yield from rolling_windows(number, ids, self.eos, length, stride)

    def share(self, bucket: list[Window]) -> Share | None:
        """Score this process's batches of a bucket, the longest windows first; None for an empty one."""
        if not bucket:
            return None
        state, size = join_processes(), self.batch_size
        order = sorted(range(len(bucket)), key=lambda i: -len(bucket[i].inputs))
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        made = Share({}, no_active_experts(self.network))
        for i in range(state.process_index, len(batches), state.num_processes):
            batch = [bucket[number] for number in batches[i]]
            for number, window, nats in zip(batches[i], batch, self._nats(batch, made.layers), strict=True):
                made.costs[number] = window.document, nats
            if state.is_main_process:
                done = batches[i : i + state.num_processes]  # the others are about as far
                self.on_progress(sum(len(bucket[number].targets) for part in done for number in part))
        return made

    def add(self, parts: Sequence[Share | None]) -> None:
        """The shares of all processes, in the order of the windows: sums are the same whoever had which."""
        costs: dict[int, tuple[int, float]] = {}
        for part in filter(None, parts):
            costs |= part.costs
            for layer, own in zip(self.layers, part.layers, strict=True):
                layer.add(own)
        for number in sorted(costs):
            document, nats = costs[number]
            self.nats[document] += nats

    def _nats(self, batch: list[Window], layers: list[ActiveExperts]) -> list[float]:
        """Of each window, summed in float64. Padding stands to the right, where causal attention does not look."""
        ends = [len(window.inputs) for window in batch]
        tokens_BS = np.full((len(batch), max(ends)), self.eos)
        scored_BS = np.zeros(tokens_BS.shape, dtype=bool)
        for i, (window, end) in enumerate(zip(batch, ends, strict=True)):
            tokens_BS[i, :end] = window.inputs
            scored_BS[i, end - len(window.targets) : end] = True
        rows_R = torch.from_numpy(np.flatnonzero(scored_BS)).to(self.device)
        targets_R = torch.from_numpy(np.concatenate([window.targets for window in batch])).to(self.device)
        scored_N = torch.from_numpy(scored_BS.ravel()).to(self.device)
        try:
            with torch.no_grad(), self._autocast(), measure_layers(self.network, layers, scored_N):
                nats_R = self._cost(torch.from_numpy(tokens_BS).to(self.device), rows_R, targets_R)
        except torch.OutOfMemoryError as error:
            raise ScoringError("out of memory; lower batch_size") from error
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

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    def scores(self) -> Scores:
        """Of all documents. ValueError if there was nothing to predict, or it cannot be told what it costs."""
        if not sum(self.tokens):
            raise ValueError(f"{len(self.tokens)} documents without any tokens; name some that hold text")
        nats_N = np.array(self.nats)
        for number in np.flatnonzero(~np.isfinite(nats_N))[:1]:
            problem = f"document {number + 1} costs {nats_N[number]} nats: the network's outputs are not finite"
            raise ValueError(f"{problem}; take an earlier checkpoint")
        tokens_N, bytes_N = np.array(self.tokens), np.array(self.bytes)
        return Scores(nats_N=nats_N, tokens_N=tokens_N, bytes_N=bytes_N, layers=self.layers)
