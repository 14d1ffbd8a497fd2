"""The trigram model is a proper distribution, and that of a slow one with dictionaries."""

import math
import time
from collections import Counter, defaultdict
from pydoc_data.topics import topics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_moe.text.ngram import START, TrigramModel

WORDS = [b"the cat sat on the mat", b"the dog", b"", b"t", b"\x00\xff\x00\xff", "naïve café".encode()]
small_texts = st.lists(st.binary(max_size=12) | st.text("ab", max_size=30).map(str.encode), max_size=5)


class Slow:
    """Witten–Bell as it is written in the books."""

    def __init__(self, documents):
        self.counts = defaultdict(Counter)
        for document in documents:
            symbols = (START, START, *document)
            for i in range(2, len(symbols)):
                for order in (0, 1, 2):
                    self.counts[symbols[i - order : i]][symbols[i]] += 1

    def probability(self, context, byte):
        followers = self.counts[context]
        lower = self.probability(context[1:], byte) if context else 1 / 256
        if not followers:
            return lower
        return (followers[byte] + len(followers) * lower) / (followers.total() + len(followers))

    def bits(self, document):
        symbols = (START, START, *document)
        return -sum(math.log2(self.probability(symbols[i - 2 : i], symbols[i])) for i in range(2, len(symbols)))


@settings(max_examples=30)
@given(small_texts.filter(any), small_texts.filter(any))
def test_it_costs_what_the_slow_reference_says(training, heldout):
    slow, fast = Slow(training), TrigramModel(training)
    scores = fast.score(heldout)
    assert scores.nats_N / math.log(2) == pytest.approx([slow.bits(document) for document in heldout], rel=1e-12)
    wanted = sum(map(slow.bits, heldout)) / sum(map(len, heldout))
    assert fast.score(heldout).bits_per_byte == scores.bits_per_byte == pytest.approx(wanted, rel=1e-12)


def distribution(model, before):
    """p of all 256 bytes behind the beginning of a document."""
    first, second = [START, START, *before][-2:]
    return model.probabilities(np.full(256, first * 257 + second), np.arange(256))


@pytest.mark.parametrize("before", [b"", b"t", b"th", b"xyz", b"\xff\x00", b"the", b"zt"])
def test_probabilities_are_positive_and_sum_to_one_behind_any_context(before):
    p, slow = distribution(TrigramModel(WORDS), before), Slow(WORDS)
    assert p.shape == (256,) and p.min() > 0
    assert p.sum() == pytest.approx(1, abs=1e-12)
    assert p == pytest.approx([slow.probability((START, START, *before)[-2:], byte) for byte in range(256)], rel=1e-12)


def test_documents_are_counted_and_scored_each_from_its_own_beginning():
    model = TrigramModel(WORDS)
    one, two = b"the mat", b"that"
    assert model.score([one, two]).nats_N.tolist() == [model.score([one]).nats, model.score([two]).nats]
    assert distribution(model, b"")[ord("t")] > distribution(model, b"\xff\x00")[ord("t")]
    apart, joined = TrigramModel([b"ab", b"cd"]), TrigramModel([b"abcd"])
    assert distribution(apart, b"ab")[ord("c")] < distribution(joined, b"ab")[ord("c")]


def test_nothing_to_count_or_to_score_is_an_error_and_bytes_never_seen_are_not():
    assert 8 < TrigramModel([b"a" * 1000]).score([b"\x00\x01"]).bits_per_byte < 32
    for training in ([], [b""]):
        with pytest.raises(ValueError, match="no text to count n-grams in"):
            TrigramModel(training)
    for heldout in ([], [b"", b""]):
        with pytest.raises(ValueError, match=f"{len(heldout)} documents without any bytes"):
            TrigramModel([b"a"]).score(heldout)


def test_two_megabytes_are_counted_in_seconds_and_english_is_learnt():
    documents = [text.encode() for _, text in sorted(topics.items())]
    training, heldout = documents[1:] * 5, documents[:1]
    start = time.process_time()
    model = TrigramModel(training)
    bits = model.score(heldout).bits_per_byte
    assert time.process_time() - start < 5  # takes 0.3
    assert sum(map(len, training)) > 2e6
    order_0 = np.bincount(np.frombuffer(heldout[0], np.uint8)) / len(heldout[0])
    assert 1.5 < bits < 0.8 * -sum(p * math.log2(p) for p in order_0 if p)
