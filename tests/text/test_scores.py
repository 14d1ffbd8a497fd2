"""What a text costs, from the nats of its documents: means, perplexity, bits per byte, and their standard errors."""

import json
import math

import numpy as np
import pytest

from dit_moe.text.perplexity import score
from dit_moe.text.scores import Scores
from tests.text.scoring import HOW, VOCAB, Uniform


def test_a_network_that_knows_nothing_costs_ln_v_per_token():
    made = score(Uniform(), [([1, 2, 3], 3), ([4] * 30, 60)], **HOW)
    assert made.loss == pytest.approx(math.log(VOCAB), rel=1e-6)
    assert made.perplexity == pytest.approx(VOCAB, rel=1e-5)
    assert made.bits_per_byte == pytest.approx(33 / 63 * math.log2(VOCAB), rel=1e-6)
    assert (made.tokens, made.bytes, made.documents) == (33, 63, 2)


def test_the_costs_of_tokens_are_summed_in_float64():
    one, many = (score(Uniform(), [([1] * count, 1)], **HOW | {"length": 5000}) for count in (1, 4999))
    assert many.nats == pytest.approx(4999 * one.nats, rel=1e-14)  # in fp32 it would be 1e-7


def test_a_document_without_tokens_counts_with_its_bytes():
    made = score(Uniform(), [([], 2), ([1], 1), ([], 0)], **HOW)
    assert (made.tokens, made.bytes, made.documents) == (1, 3, 3) and made.nats_N.tolist()[::2] == [0, 0]


def test_standard_errors_tell_how_estimates_from_other_documents_scatter():
    random = np.random.default_rng(0)

    def draw():
        bytes_N = random.geometric(1 / 50, 200)
        nats_N = bytes_N * random.gamma(40, 1 / 40, 200) + random.normal(0, 2, 200)
        return Scores(nats_N=nats_N, tokens_N=bytes_N // 4 + 1, bytes_N=bytes_N)

    drawn = [draw() for _ in range(2000)]
    for name in ("bits_per_byte", "loss", "perplexity"):
        scatter = np.std([getattr(each, name) for each in drawn])
        stated = np.mean([getattr(each, f"{name}_std_error") for each in drawn])
        assert stated == pytest.approx(scatter, rel=0.05)  # 2000 draws give the scatter to 1.6 %


def test_the_standard_error_of_a_mean_is_the_usual_one_where_all_documents_are_as_long():
    made = Scores(nats_N=np.array([1.0, 2.0, 6.0]), tokens_N=np.array([1, 1, 1]), bytes_N=np.array([2, 2, 2]))
    assert made.loss == 3 and made.loss_std_error == pytest.approx(math.sqrt(7 / 3), rel=1e-12)
    assert made.perplexity_std_error == pytest.approx(math.exp(3) * math.sqrt(7 / 3), rel=1e-12)
    assert made.bits_per_byte_std_error == pytest.approx(math.sqrt(7 / 3) / 2 / math.log(2), rel=1e-12)


def test_documents_that_are_all_alike_have_no_error_and_a_single_one_states_none():
    made = score(Uniform(), [([1, 2], 3)] * 5, **HOW)
    assert made.bits_per_byte_std_error == pytest.approx(0, abs=1e-12)
    report = score(Uniform(), [([1, 2], 3)], **HOW).report()
    assert report["loss_std_error"] is report["bits_per_byte_std_error"] is report["perplexity_std_error"] is None


def test_a_loss_too_large_for_a_perplexity_can_still_be_written():
    report = Scores(nats_N=np.array([1e6, 3e6]), tokens_N=np.array([1000, 1000]), bytes_N=np.array([9, 9])).report()
    assert report["loss"] == 2000 and report["perplexity"] is report["perplexity_std_error"] is None
    json.dumps(report, allow_nan=False)
