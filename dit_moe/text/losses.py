"""What of the text on disk is not in its tokens: what a corpus leaves out, and what a tokenizer loses.

Some tokenizers do not keep the text: they lower-case it, drop accents or spaces, or have one unknown token for all that
is not in their vocabulary. The loss in nats is then of what they keep, and a byte seems to cost less than it does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np

from dit_moe.formatting import rounded
from dit_moe.json_files import Count
from dit_moe.text.tokenizer import TextTokenizer

ALL_CHECKED, CHECKED_EVERY = 1000, 8  # the first so many documents are decoded again, and one of so many behind them


@dataclass(frozen=True, kw_only=True)
class TextLosses:
    """Counts of what is left out or lost; those of two parts of a text add up."""

    without_text: Count = 0  # documents that are null, missing or empty, left out by `skip_null`
    byte_order_marks: Count = 0  # left out: of 3 bytes each
    unknown_tokens: Count = 0  # each in place of any text that is not in the vocabulary
    checked: Count = 0  # documents that were decoded again
    checked_bytes: Count = 0
    changed: Count = 0  # of the checked ones: those that do not come back as they were
    lost_bytes: Count = 0  # of the checked ones: of letters that do not come back, at least one of a changed document

    def __add__(self, other: TextLosses) -> TextLosses:
        return TextLosses(**{each.name: getattr(self, each.name) + getattr(other, each.name) for each in fields(self)})

    def dump(self) -> dict[str, int]:
        return asdict(self)

    @property
    def lossy(self) -> bool:
        """Whether the tokenizer lost any text."""
        return bool(self.changed or self.unknown_tokens)

    def describe_tokenizer(self) -> str:
        """What the tokenizer lost, in a few words; empty if nothing."""
        if not self.lossy:
            return ""
        unknown = f", and has {self.unknown_tokens:,} unknown tokens" if self.unknown_tokens else ""
        percent = rounded(100 * self.lost_bytes / max(1, self.checked_bytes), 1)
        of = f"{self.changed:,} of the {self.checked:,} documents that were decoded again"
        return f"loses text ({percent} % of the bytes, in {of}){unknown}"

    def describe_left_out(self) -> str:
        """What the corpus left out, in a few words; empty if nothing."""
        counts = {"documents without text": self.without_text, "byte-order marks": self.byte_order_marks}
        return " and ".join(f"{count:,} {what}" for what, count in counts.items() if count)


NO_LOSSES = TextLosses()


def not_comparable(losses: TextLosses | None, tokenizer: str) -> list[str]:
    """Why bits per byte of a text may not stand beside those by other tokenizers; None: it was not checked."""
    if losses is None:
        return [f"whether the tokenizer {tokenizer} keeps all of the text was not checked when it was tokenised"]
    return [f"the tokenizer {tokenizer} {losses.describe_tokenizer()}"] if losses.lossy else []


def losses_of(
    tokenizer: TextTokenizer, texts: Sequence[str], ids: Sequence[np.ndarray], first: int = 0
) -> list[TextLosses]:
    """What each text loses by being encoded to `ids`; they are documents from number `first` on of their split."""
    chosen = [i for i in range(len(texts)) if first + i < ALL_CHECKED or (first + i) % CHECKED_EVERY == 0]
    found = [NO_LOSSES] * len(texts)
    for i, back in zip(chosen, tokenizer.decode_batch([ids[i] for i in chosen]), strict=True):
        size, changed = len(texts[i].encode()), texts[i] != back
        lost = max(1, _missing_bytes(texts[i], tokenizer.decode_plain(ids[i]))) if changed else 0
        found[i] = TextLosses(checked=1, checked_bytes=size, changed=int(changed), lost_bytes=min(lost, size))
    if tokenizer.unknown is not None:
        counts = [int((each == tokenizer.unknown).sum()) for each in ids]
        found = [each + TextLosses(unknown_tokens=n) if n else each for each, n in zip(found, counts, strict=True)]
    return found


def _missing_bytes(text: str, back: str) -> int:
    """UTF-8 bytes of the letters of `text` that `back` has fewer of, wherever they stand."""
    missing = Counter(text) - Counter(back)
    return sum(count * len(letter.encode()) for letter, count in missing.items())
