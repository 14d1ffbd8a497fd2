"""Held-out text is scored while a model trains."""

import math

import pytest

from dit_moe.evaluation.text import HeldoutTextHook
from dit_moe.text.perplexity import score
from tests.text.scoring import HOW, Uniform, documents, network


def test_the_hook_gives_the_numbers_of_scoring_the_same_each_time():
    lm = network()
    hook = HeldoutTextHook(iter(documents()[:5]), **HOW)
    wanted = score(lm, documents()[:5], **HOW)
    for step in (10, 20):
        assert hook(step, lm) == {
            "heldout_loss": wanted.loss,
            "heldout_bits_per_byte": wanted.bits_per_byte,
            "heldout_active_experts": wanted.active.mean,
        }


def test_a_network_that_cannot_be_scored_is_a_warning_and_no_end_of_a_run(capsys):
    class Broken(Uniform):
        def forward(self, tokens):
            return super().forward(tokens) * math.nan

    assert HeldoutTextHook([([1], 1)], **HOW)(30, Broken()) is None
    assert "warning: no held-out loss at step 30: document 1" in capsys.readouterr().err


def test_the_hook_refuses_at_once_what_could_never_be_scored():
    with pytest.raises(ValueError, match="no held-out text"):
        HeldoutTextHook([], **HOW)
