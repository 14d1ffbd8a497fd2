"""Scores are those of lm-evaluation-harness and depend on nothing else; their means and standard errors are right."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from dit_moe.moe import measure_active, routers_of
from dit_moe.text import perplexity
from dit_moe.text.perplexity import ScoringError, TextScores, rolling_windows, score
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


def test_a_document_costs_what_plain_calls_say_and_a_smaller_stride_gives_later_tokens_more_context(lm):
    ids = documents()[0][0][: 2 * LENGTH + 5]
    wanted = sum(alone(lm, ids[:LENGTH]))
    assert score(lm, [(ids[:LENGTH], 5)], **HOW).nats == pytest.approx(wanted, rel=1e-6)
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


def test_buckets_and_the_chunks_of_logits_in_fp32_change_nothing(lm, monkeypatch):
    plain = score(lm, documents(), batch_size=3, **HOW)
    monkeypatch.setattr(perplexity, "BUCKET", 2)
    monkeypatch.setattr(perplexity, "CHUNK", 5 * VOCAB)
    sizes, project = [], lm.project
    monkeypatch.setattr(lm, "project", lambda states: sizes.append(states.shape[:-1].numel()) or project(states))
    again = score(lm, documents(), batch_size=3, **HOW)
    assert again.nats_N == pytest.approx(plain.nats_N, rel=1e-6)
    assert again.tokens_N.tolist() == plain.tokens_N.tolist()
    assert max(sizes) == 5 and sum(sizes) == again.tokens  # and none for a context or for padding


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


# ------------------------------------------------------------------------------------------------------- active experts


def test_active_experts_are_counted_once_for_every_predicted_token(lm):
    ids = [ids for ids, _ in documents() if 0 < len(ids) <= LENGTH]
    with measure_active(lm) as wanted, torch.no_grad():
        for each in ids:  # one by one: no padding, and every position predicts
            lm(torch.tensor([[EOS, *each[:-1]]]))
    made = score(lm, [(each, len(each)) for each in ids], batch_size=5, **HOW)
    assert made.active == wanted
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


def test_no_more_documents_are_read_than_are_to_be_scored_and_progress_adds_up_to_their_tokens(lm):
    read, done = iter(documents()), []
    made = score(lm, read, max_documents=4, stride=5, batch_size=4, on_progress=done.append, **HOW)
    assert made.documents == 4 and len(list(read)) == len(documents()) - 4
    assert made.nats == pytest.approx(score(lm, documents()[:4], stride=5, batch_size=4, **HOW).nats, rel=1e-12)
    assert sum(done) == made.tokens and len(done) > 3


# ------------------------------------------------------------------------------------------- means and standard errors


def test_a_network_that_knows_nothing_costs_ln_v_per_token():
    made = score(Uniform(), [([1, 2, 3], 3), ([4] * 30, 60)], **HOW)
    assert made.loss == pytest.approx(math.log(VOCAB), rel=1e-6)
    assert made.perplexity == pytest.approx(VOCAB, rel=1e-5)
    assert made.bits_per_byte == pytest.approx(33 / 63 * math.log2(VOCAB), rel=1e-6)
    assert (made.tokens, made.bytes, made.documents) == (33, 63, 2)


def test_costs_are_summed_in_float64_and_a_document_without_tokens_counts_with_its_bytes():
    one, many = (score(Uniform(), [([1] * count, 1)], **HOW | {"length": 5000}) for count in (1, 4999))
    assert many.nats == pytest.approx(4999 * one.nats, rel=1e-14)  # in fp32 it would be 1e-7
    made = score(Uniform(), [([], 2), ([1], 1), ([], 0)], **HOW)
    assert (made.tokens, made.bytes, made.documents) == (1, 3, 3) and made.nats_N.tolist()[::2] == [0, 0]


def test_standard_errors_tell_how_estimates_from_other_documents_scatter():
    random = np.random.default_rng(0)

    def draw():
        bytes_N = random.geometric(1 / 50, 200)
        nats_N = bytes_N * random.gamma(40, 1 / 40, 200) + random.normal(0, 2, 200)
        return TextScores(nats_N=nats_N, tokens_N=bytes_N // 4 + 1, bytes_N=bytes_N)

    drawn = [draw() for _ in range(2000)]
    for name in ("bits_per_byte", "loss", "perplexity"):
        scatter = np.std([getattr(each, name) for each in drawn])
        stated = np.mean([getattr(each, f"{name}_std_error") for each in drawn])
        assert stated == pytest.approx(scatter, rel=0.05)  # 2000 draws give the scatter to 1.6 %


def test_the_standard_error_of_a_mean_is_the_usual_one_where_all_documents_are_as_long():
    made = TextScores(nats_N=np.array([1.0, 2.0, 6.0]), tokens_N=np.array([1, 1, 1]), bytes_N=np.array([2, 2, 2]))
    assert made.loss == 3 and made.loss_std_error == pytest.approx(math.sqrt(7 / 3), rel=1e-12)
    assert made.perplexity_std_error == pytest.approx(math.exp(3) * math.sqrt(7 / 3), rel=1e-12)
    assert made.bits_per_byte_std_error == pytest.approx(math.sqrt(7 / 3) / 2 / math.log(2), rel=1e-12)


def test_documents_that_are_all_alike_have_no_error_and_a_single_one_states_none():
    made = score(Uniform(), [([1, 2], 3)] * 5, **HOW)
    assert made.bits_per_byte_std_error == pytest.approx(0, abs=1e-12)
    report = score(Uniform(), [([1, 2], 3)], **HOW).report()
    assert report["loss_std_error"] is report["bits_per_byte_std_error"] is report["perplexity_std_error"] is None


def test_a_loss_too_large_for_a_perplexity_can_still_be_written():
    report = TextScores(nats_N=np.array([1e6, 3e6]), tokens_N=np.array([1000, 1000]), bytes_N=np.array([9, 9])).report()
    assert report["loss"] == 2000 and report["perplexity"] is report["perplexity_std_error"] is None
    json.dumps(report, allow_nan=False)


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


def test_outputs_that_are_not_finite_and_too_little_memory_are_errors_with_a_remedy():
    class Spoilt(Uniform):
        def forward(self, tokens):
            return super().forward(tokens) + torch.where(tokens == 7, math.nan, 0.0)[..., None]

    class Huge(Uniform):
        def forward(self, tokens):
            return torch.empty(2**48)  # 1 PiB

    with pytest.raises(ValueError, match=r"document 2 costs nan nats: .*not finite; take an earlier checkpoint"):
        score(Spoilt(), [([1, 2], 2), ([7, 1], 2), ([7, 2], 2)], **HOW)
    with pytest.raises(ScoringError, match="out of memory; lower batch_size"):
        score(Huge(), [([1], 1)], **HOW)
