"""Where the experts of a language model go: by layer, position and kind of token, and along a passage of text."""

# B windows of a batch, S tokens of the longest, N = B·S, V kinds of token, W tokens of the passage, L MoE layers

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch

from dit_moe.analysis.collect import RoutingCounts, active_of_tokens, experts_of, run_facts, shape_of
from dit_moe.analysis.statistics import Passage, RoutingStats, TokenKinds
from dit_moe.config import ConfigError
from dit_moe.distributed import enough_memory
from dit_moe.experiments.run import TextRun
from dit_moe.moe.compute_budget import thresholds
from dit_moe.text.perplexity import Document, ScoringError, Window, require_in_vocabulary, rolling_windows
from dit_moe.text.tokenizer import BYTES, TextTokenizer

TOKENS = 65_536
KINDS, BINS, PASSAGE = 40, 64, 300
SHOWN = {" ": "␣", "\n": "↵", "\r": "␍", "\t": "⇥"}


def collect_text(
    run: TextRun,
    documents: Iterable[Document],
    *,
    tokens: int = TOKENS,
    on_progress: Callable[[int], object] = lambda count: None,
) -> RoutingStats:
    """Run the network over documents in the windows of `score`, and count the positions that predict.

    Args:
        run: by its sections `eval` and `sample` it is decided how documents are cut, which weights and precision.
        documents: read until there are enough tokens.
        tokens: predictions, at most, but for the rest of the last window.
        on_progress: called with the number of tokens that were counted since.

    Raises ValueError for a dense model or documents without tokens; ScoringError if memory does not suffice.
    """
    experts_of(run)
    if tokens < 1:
        raise ConfigError("tokens", f"={tokens} must be at least 1")
    shown = _TextWindows(run)
    windows, text = shown.windows(documents, tokens)
    kinds_V, count_V = _most_frequent(windows, run.experiment.model.vocab_size)
    group_of_id = np.full(run.experiment.model.vocab_size, len(kinds_V))  # all others are one group
    group_of_id[kinds_V] = np.arange(len(kinds_V))
    longest = max(len(window.inputs) for window in windows)
    width = -(-longest // BINS)
    bins = -(-longest // width)
    counts = RoutingCounts(run.model, {"position": bins, "token": len(kinds_V) + 1})
    size = run.experiment.eval.batch_size
    for start in range(0, len(windows), size):
        batch = windows[start : start + size]
        ids_BS, kept_BS = _padded(batch, shown.eos)
        position_BS = np.tile(np.arange(ids_BS.shape[1]) // width, (len(batch), 1))
        groups = {"position": shown.flat(position_BS), "token": shown.flat(group_of_id[ids_BS])}
        with counts.counting(groups, shown.flat(kept_BS)):
            shown.forward(ids_BS)
        on_progress(sum(len(window.targets) for window in batch))
    active_LV, load_LVE = (values_LV[:, : len(kinds_V)] for values_LV in counts.by("token"))
    facts = {"tokens counted": counts.tokens, "documents": 1 + windows[-1].document, "tokenizer": run.tokenizer.name}
    return RoutingStats(
        kind="text",
        facts=run_facts(run, thresholds(run.model)) | facts,
        **shape_of(run),
        **counts.overall(),
        active_LS=counts.by("position")[0],
        position_S=np.arange(bins) * width,
        tokens_S=counts.tokens_G["position"].cpu().numpy(),
        tokens=TokenKinds(
            tokens_V=[visible(spelt(run.tokenizer, token)) for token in kinds_V.tolist()],
            count_V=count_V,
            active_LV=active_LV,
            load_LVE=load_LVE,
        ),
        passage=shown.passage(text),
    )


def spelt(tokenizer: TextTokenizer, token: int) -> str:
    """The text of one token by itself; of a part of a letter its byte, "<C3>", or how the vocabulary writes it."""
    text = tokenizer.decode([token])
    if "\ufffd" not in text:
        return text
    return f"<{token:02X}>" if tokenizer.name == BYTES else str(tokenizer.hf.convert_ids_to_tokens(token))


def visible(text: str) -> str:
    """With signs for white space, and codes for what does not show at all."""
    shown = (SHOWN.get(letter, letter) for letter in text)
    return "".join(letter if letter.isprintable() else f"<U+{ord(letter):04X}>" for letter in shown)


def _most_frequent(windows: Sequence[Window], vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The ids of the most frequent tokens that predict, [V], and how often each does."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for window in windows:
        counts += np.bincount(window.inputs[-len(window.targets) :], minlength=vocab_size)
    order = np.argsort(-counts, kind="stable")[:KINDS]
    kinds_V = order[counts[order] > 0]
    return kinds_V, counts[kinds_V]


def _padded(batch: Sequence[Window], eos: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids [B, S], padded to the right where causal attention does not look, and which of them predict."""
    ids_BS = np.full((len(batch), max(len(window.inputs) for window in batch)), eos)
    kept_BS = np.zeros(ids_BS.shape, dtype=bool)
    for i, window in enumerate(batch):
        end = len(window.inputs)
        ids_BS[i, :end] = window.inputs
        kept_BS[i, end - len(window.targets) : end] = True
    return ids_BS, kept_BS


class _TextWindows:
    """A run's network, and the text that it is shown."""

    def __init__(self, run: TextRun) -> None:
        self.run, self.eos = run, run.tokenizer.eos
        self.length: int = run.experiment.data.length
        self.device = next(run.model.parameters()).device

    def windows(self, documents: Iterable[Document], tokens: int) -> tuple[list[Window], np.ndarray]:
        """Of documents in turn until they predict so many tokens; and one of those: long enough to show, if there is.

        ValueError if there is nothing to predict.
        """
        found: list[Window] = []
        shown = np.zeros(0, dtype=np.int64)
        left = tokens
        stride = self.run.experiment.eval.stride or self.length
        for number, (document, _) in enumerate(documents):
            ids = np.asarray(document, dtype=np.int64)
            require_in_vocabulary(ids, self.run.experiment.model.vocab_size, f"document {number + 1}")
            if len(shown) < min(PASSAGE, self.length) and len(ids) > len(shown):
                shown = ids
            for window in rolling_windows(number, ids, self.eos, self.length, stride):
                found.append(window)
                left -= len(window.targets)
                if left <= 0:
                    return found, shown
        if not found:
            raise ValueError("there are no tokens in the documents; name some that hold text")
        return found, shown

    def flat(self, values_BS: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values_BS.ravel()).to(self.device)

    def forward(self, ids_BS: np.ndarray) -> None:
        reduced = self.run.experiment.sample.precision == "bf16"
        enough = enough_memory(ScoringError, "lower eval.batch_size")
        with enough, torch.no_grad(), torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=reduced):
            self.run.model(torch.from_numpy(ids_BS).to(self.device), states=True)

    def passage(self, ids: np.ndarray) -> Passage:
        """The first tokens of a document, as many as the network sees at once."""
        inputs = np.concatenate([[self.eos], ids])[: min(1 + PASSAGE, self.length)]
        with active_of_tokens(self.run.model) as active:
            self.forward(inputs[None])
        texts = [spelt(self.run.tokenizer, token) for token in inputs[1:].tolist()]
        return Passage(tokens_W=texts, active_LW=torch.stack(active)[:, 1:].cpu().numpy())
