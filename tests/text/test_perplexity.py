"""Scores are those of lm-evaluation-harness, and depend on nothing that they should not depend on."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from dit_moe.moe import measure_active, routers_of
from dit_moe.text import perplexity
from dit_moe.text.perplexity import ScoringError, rolling_windows, score
from tests.scripts import said
from tests.text import scoring_script
from tests.text.scoring import EOS, HOW, LENGTH, VOCAB, Uniform, documents, network


@pytest.fixture(scope="module")
def lm():
    return network()


def alone(lm, ids):
    """Nats of each token of a document that fits into the length, in float64, from one plain call."""
    with torch.no_grad():
        log_p_SV = lm(torch.tensor([[EOS, *ids[:-1]]]))[0].double().log_softmax(-1)
    return [-log_p_SV[i, token].item() for i, token in enumerate(ids)]


# -------------------------------------------------------------------------------------------------------------- windows


@pytest.mark.parametrize("stride", [1, 3, 7, 8])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 15, 16, 17, 40])
def test_windows_are_those_of_lm_evaluation_harness(count, stride):
    utils = pytest.importorskip("lm_eval.utils")
    ids = list(range(100, 100 + count))
    wanted = list(utils.get_rolling_token_windows(ids, prefix_token=9, max_seq_len=8, context_len=8 - stride + 1))
    made = [(w.inputs.tolist(), w.targets.tolist()) for w in rolling_windows(0, np.array(ids), 9, 8, stride)]
    assert made == wanted
    assert [token for _, targets in made for token in targets] == ids


def test_nats_are_those_of_lm_evaluation_harness():
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance
    from transformers import OlmoeConfig, OlmoeForCausalLM

    from dit_moe.text.tokenizer import TokenizerConfig, open_tokenizer

    tokenizer = open_tokenizer(TokenizerConfig(name="bytes"))
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = OlmoeConfig(vocab_size=VOCAB, num_experts=4, num_experts_per_tok=2, initializer_range=0.3, **sizes)
    torch.manual_seed(0)
    model = OlmoeForCausalLM(config).eval()
    texts = ["a", "Sphinx of black quartz.", "naïve — " * 9, "x" * LENGTH, "y" * (LENGTH + 1), "judge my vow " * 7]
    harness = huggingface.HFLM(pretrained=model, tokenizer=tokenizer.hf, max_length=LENGTH, batch_size=3, device="cpu")
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    wanted = [-each for each in harness.loglikelihood_rolling(requests, disable_tqdm=True)]
    read = [(tokenizer.encode(text), len(text.encode())) for text in texts]
    made = score(model, read, eos=tokenizer.eos, length=LENGTH, vocab_size=VOCAB, batch_size=4)
    assert made.nats_N == pytest.approx(wanted, rel=1e-6)  # sums of fp32 there, in other batches
    assert made.tokens_N.tolist() == made.bytes_N.tolist() == [len(text.encode()) for text in texts]


def test_a_document_costs_what_a_plain_call_says(lm):
    ids = documents()[3][0][: LENGTH - 1]
    assert score(lm, [(ids, 5)], **HOW).nats == pytest.approx(sum(alone(lm, ids)), rel=1e-6)


def test_a_smaller_stride_gives_every_later_token_more_context(lm):
    ids = documents()[0][0][: 2 * LENGTH + 5]
    wanted = sum(alone(lm, ids[:LENGTH]))
    with torch.no_grad():
        for i in range(LENGTH, len(ids)):  # one token at a time, behind all that fit in
            wanted -= lm(torch.tensor([ids[i - LENGTH : i]]))[0, -1].double().log_softmax(-1)[ids[i]].item()
    made = score(lm, [(ids, 5)], stride=1, **HOW)
    assert made.nats == pytest.approx(wanted, rel=1e-6)
    assert made.tokens == len(ids)
    assert made.nats != pytest.approx(score(lm, [(ids, 5)], **HOW).nats, rel=1e-6)


# ----------------------------------------------------------------------------------------- what must make no difference


@pytest.mark.parametrize("stride", [None, 5])
def test_neither_padding_nor_the_other_documents_nor_the_batch_change_a_document(lm, stride):
    together = score(lm, documents(), batch_size=7, stride=stride, **HOW)
    for number in (0, 1, 4, 17):
        by_itself = score(lm, [documents()[number]], batch_size=1, stride=stride, **HOW)
        assert together.nats_N[number] == pytest.approx(by_itself.nats, rel=1e-6)  # fp32, products of other shapes


def test_padding_is_not_seen_at_all(lm, monkeypatch):
    plain = score(lm, documents(), batch_size=7, **HOW)
    fill = np.full  # what the batch is before the windows are written into it
    monkeypatch.setattr(perplexity.np, "full", lambda shape, value: fill(shape, value - 1))
    other = score(lm, documents(), batch_size=7, **HOW)
    assert np.array_equal(plain.nats_N, other.nats_N)
    assert plain.active == other.active


def test_buckets_and_the_chunks_of_the_softmax_change_nothing(lm, monkeypatch):
    plain = score(lm, documents(), batch_size=3, **HOW)
    monkeypatch.setattr(perplexity, "BUCKET", 2)
    monkeypatch.setattr(perplexity, "CHUNK", 5 * VOCAB)
    again = score(lm, documents(), batch_size=3, **HOW)
    assert again.nats_N == pytest.approx(plain.nats_N, rel=1e-6)
    assert again.tokens_N.tolist() == plain.tokens_N.tolist()


def test_no_more_logits_are_made_in_fp32_at_a_time_than_said(lm, monkeypatch):
    monkeypatch.setattr(perplexity, "CHUNK", 5 * VOCAB)
    sizes, project = [], lm.project
    monkeypatch.setattr(lm, "project", lambda states: sizes.append(states.shape[:-1].numel()) or project(states))
    made = score(lm, documents(), **HOW)
    assert max(sizes) == 5 and sum(sizes) == made.tokens  # and none for a context or for padding


def test_a_network_that_only_returns_logits_gets_the_same_scores(lm):
    class Bare(nn.Module):
        def __init__(self, wrap):
            super().__init__()
            self.lm, self.wrap = lm, wrap

        def forward(self, tokens):
            return self.wrap(self.lm(tokens))

    class Output:
        def __init__(self, logits):
            self.logits = logits

    wanted = score(lm, documents(), **HOW)
    for wrap in (lambda logits: logits, Output):
        made = score(Bare(wrap), documents(), **HOW)
        assert made.nats_N == pytest.approx(wanted.nats_N, rel=1e-6)
        assert made.active == wanted.active


def test_two_processes_share_the_work_and_get_the_same_bytes_as_one(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each of several has: with more, a matrix product may round otherwise
    scoring_script.main(tmp_path / "alone")
    torch.set_num_threads(threads)
    said(scoring_script.__file__, tmp_path / "shared", processes=2)
    alone = (tmp_path / "alone" / "rank_0.json").read_bytes()
    assert json.loads(alone)["documents"] == len(documents())
    assert all((tmp_path / "shared" / f"rank_{rank}.json").read_bytes() == alone for rank in range(2))
    calls = [int((tmp_path / "shared" / f"rank_{rank}.calls").read_text()) for rank in range(2)]
    assert sum(calls) == int((tmp_path / "alone" / "rank_0.calls").read_text()) and max(calls) - min(calls) <= 1


# ------------------------------------------------------------------------------------------------------- active experts


def test_active_experts_are_counted_once_for_every_predicted_token(lm):
    ids = [ids for ids, _ in documents() if 0 < len(ids) <= LENGTH]
    with measure_active(lm) as wanted, torch.no_grad():
        for each in ids:  # one by one: no padding, and every position predicts
            lm(torch.tensor([[EOS, *each[:-1]]]))
    made = score(lm, [(each, len(each)) for each in ids], batch_size=5, **HOW)
    assert made.active == wanted
    assert made.active.tokens == made.tokens * len(routers_of(lm))
    long = score(lm, documents(), stride=3, **HOW)
    assert long.active.tokens == long.tokens * len(routers_of(lm))  # however often they are context


def test_scoring_leaves_counters_and_thresholds_and_takes_a_dense_network(lm):
    before = {name: value.clone() for name, value in lm.state_dict().items()}
    score(lm.train(), documents(), **HOW)
    assert not lm.training
    assert all(torch.equal(value, before[name]) for name, value in lm.state_dict().items())
    assert all(router.stats.sums is None for router in routers_of(lm))
    assert score(network(dense=True), documents(), **HOW).active.mean is None


# -------------------------------------------------------------------------------------------------------------- reading


def test_only_the_first_documents_are_scored_if_so_many_are_wanted_and_no_more_are_read(lm):
    read = []

    def reading():
        for number, document in enumerate(documents()):
            read.append(number)
            yield document

    made = score(lm, reading(), max_documents=4, **HOW)
    assert made.documents == 4 and read == [0, 1, 2, 3]
    assert made.nats == pytest.approx(score(lm, documents()[:4], **HOW).nats, rel=1e-12)


def test_progress_adds_up_to_all_tokens(lm):
    done = []
    made = score(lm, documents(), stride=5, batch_size=4, on_progress=done.append, **HOW)
    assert sum(done) == made.tokens and len(done) > 5


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "change, message",
    [
        ({"stride": LENGTH + 1}, rf"^stride={LENGTH + 1} must lie in 1 … {LENGTH}, .*leave it out"),
        ({"stride": 0}, "^stride=0 must lie in 1"),
        ({"vocab_size": EOS}, f"^the tokenizer has the token id {EOS}, and the model's vocabulary ends at {EOS - 1}"),
        ({"vocab_size": 260, "documents": [([1], 1), ([2, 300], 2)]}, "^document 2 has the token id 300, .* at 259;"),
        ({"documents": [([-1], 1)]}, "^document 1 has the token id -1"),
        ({"documents": []}, "^0 documents without any tokens; name some"),
        ({"documents": [([], 0)]}, "^1 documents without any tokens; name some"),
    ],
)
def test_bad_input_is_one_clear_message(change, message):
    options = {"documents": [([1], 1)], **HOW, **change}
    with pytest.raises(ValueError, match=message):
        score(Uniform(), options.pop("documents"), **options)


def test_outputs_that_are_not_finite_name_their_document():
    class Spoilt(Uniform):
        def forward(self, tokens):
            return super().forward(tokens) + torch.where(tokens == 7, math.nan, 0.0)[..., None]

    with pytest.raises(ValueError, match=r"document 2 costs nan nats: .*not finite; take an earlier checkpoint"):
        score(Spoilt(), [([1, 2], 2), ([7, 1], 2), ([7, 2], 2)], **HOW)


def test_too_little_memory_is_said_with_the_remedy():
    class Huge(Uniform):
        def forward(self, tokens):
            raise torch.OutOfMemoryError("…")

    with pytest.raises(ScoringError, match="out of memory; lower batch_size"):
        score(Huge(), [([1], 1)], **HOW)
