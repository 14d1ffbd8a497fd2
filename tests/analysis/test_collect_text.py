"""What is counted of a language model's routing is what its routers do at the positions that predict."""

import numpy as np
import pytest

from dit_moe.analysis.collect_text import PASSAGE, collect_text, spelt, visible
from dit_moe.config import ConfigError
from dit_moe.moe import ROUTERS
from dit_moe.text.perplexity import score
from dit_moe.text.tokenizer import TokenizerConfig, open_tokenizer
from tests.analysis.runs import LENGTH, text_run
from tests.text.tokens import save_bpe, texts


def documents(count=20):
    """Of some 200 bytes each, and one that is empty."""
    return [(list(text.encode()), len(text.encode())) for text in texts(count)]


def scored(run, given, **options):
    how = {"eos": 256, "length": LENGTH, "vocab_size": 320, "batch_size": run.experiment.eval.batch_size}
    return score(run.model, given, **how | options)


OPTIONS = {name: ROUTERS.config_class(name)() for name in ROUTERS.names()}
TEXT = [name for name, options in OPTIONS.items() if options.sees == "token" and not options.NEEDS_LABELS]


@pytest.mark.parametrize("router", TEXT)
@pytest.mark.parametrize("stride", [None, 5])
def test_active_experts_are_those_that_perplexity_counts_layer_by_layer(router, stride):
    run = text_run(f"model.moe={{router: {router}, every: 2}}", f"eval.stride={stride or 'null'}", "eval.batch_size=3")
    stats = collect_text(run, documents(8))
    wanted = scored(run, documents(8), stride=stride)
    assert stats.layers_L == [0, 2] and stats.kind == "text"
    assert stats.facts["tokens counted"] == wanted.tokens and stats.facts["documents"] == 8
    np.testing.assert_allclose(stats.active_L, [each.mean for each in wanted.layers], atol=1e-3)  # of other batches
    assert stats.active == pytest.approx(wanted.active.mean, abs=1e-3)
    assert (stats.share_LE.sum(1) <= 1 + 1e-12).all()  # the rest have no expert
    for shares in (stats.load_LE, stats.tokens.load_LVE):
        np.testing.assert_allclose(shares.sum(-1), 1)


def test_kinds_are_the_tokens_that_are_read_most_frequent_first():
    run = text_run()
    stats = collect_text(run, documents())
    read = [256, *[byte for ids, _ in documents() for byte in ids[:-1]]]  # the last byte is only predicted
    read += [256] * (sum(bool(ids) for ids, _ in documents()) - 1)
    counts = np.bincount(read, minlength=257)
    assert stats.tokens.count_V.tolist() == sorted(counts[counts > 0].tolist(), reverse=True)[:40]
    assert stats.tokens.tokens_V[:2] == ["␣", "e"] and "t" in stats.tokens.tokens_V
    assert all(name.isprintable() and name.strip() for name in stats.tokens.tokens_V)
    few = collect_text(run, [(list(b"abcabcaab" * 30), 270)])  # kinds that make up the whole
    assert few.tokens.tokens_V == ["a", "b", "c", "<|endoftext|>"]
    np.testing.assert_allclose(few.tokens.active_LV @ (few.tokens.count_V / few.tokens.count_V.sum()), few.active_L)


def test_positions_are_those_in_the_window_and_padding_is_not_counted():
    both, single = (
        collect_text(text_run(f"eval.batch_size={size}"), [(list(b"ab"), 2), (list(b"The router keeps an exp"), 23)])
        for size in (2, 1)
    )
    assert both.facts["tokens counted"] == 25 and both.tokens_S[:3].tolist() == [2, 2, 1]
    np.testing.assert_allclose(both.active_LS, single.active_LS, atol=1e-9)
    np.testing.assert_allclose(both.together_LEE, single.together_LEE, atol=1e-9)
    ids = documents()[0][0][: LENGTH - 2]
    stats = collect_text(text_run(), [(ids, LENGTH)] * 3)
    assert stats.position_S.tolist() == list(range(LENGTH - 2)) and stats.tokens_S.tolist() == [3] * (LENGTH - 2)
    np.testing.assert_array_equal(stats.active_LS[:, 1:], stats.passage.active_LW[:, : LENGTH - 3])
    assert collect_text(text_run(), [(list(b"a"), 1)]).active_LS[:, 0].tolist() == stats.active_LS[:, 0].tolist()


def test_many_positions_are_binned():
    ids = documents()[0][0][:150]
    fine, wide = (collect_text(text_run(f"data.length={length}"), [(ids[:length], length)]) for length in (50, 150))
    assert len(ids) == 150 and wide.position_S.tolist() == list(range(0, 150, 3))
    means_LS = fine.active_LS[:, :48].reshape(3, 16, 3).mean(2)
    np.testing.assert_allclose(wide.active_LS[:, :16], means_LS, atol=0.05)  # the same tokens in a shorter window
    np.testing.assert_allclose(wide.active_LS.mean(1), wide.active_L)


def test_tokens_are_enough_and_no_window_more():
    done = []
    stats = collect_text(text_run(), documents(), tokens=100, on_progress=done.append)
    assert 100 <= stats.facts["tokens counted"] < 100 + LENGTH and sum(done) == stats.facts["tokens counted"]
    assert stats.facts["documents"] < 20


def test_the_passage_begins_the_first_document_that_is_long_enough():
    given = [(list(b"short"), 5), (list("naïve\n words, and more of them by far".encode()), 39), (list(b"x" * 99), 99)]
    passage = collect_text(text_run(), given).passage
    assert "".join(passage.tokens_W) == "na<C3><AF>ve\n words, and more of them b"[: len("".join(passage.tokens_W))]
    assert len(passage.tokens_W) == LENGTH - 1 and passage.active_LW.shape == (3, LENGTH - 1)
    run = text_run("data.length=400")
    passage = collect_text(run, [(list(b"ab" * 100), 200), (list(b"cd" * 300), 600)]).passage
    assert "".join(passage.tokens_W) == "cd" * (PASSAGE // 2)
    seen = collect_text(run, [(list(b"cd" * 150), 300)])
    np.testing.assert_allclose(passage.active_LW[:, :-1].mean(1), seen.active_L, atol=0.05)


def test_a_letter_is_spelt_as_it_is_and_part_of_one_as_its_byte(tmp_path):
    tokenizer = open_tokenizer(TokenizerConfig())
    assert [spelt(tokenizer, token) for token in (97, 10, 0xC3, 256)] == ["a", "\n", "<C3>", "<|endoftext|>"]
    learnt = open_tokenizer(TokenizerConfig(name=str(save_bpe(tmp_path / "bpe"))))
    ids = learnt.encode("the router")
    assert "".join(spelt(learnt, token) for token in ids) == "the router"
    part = next(i for i in range(learnt.vocab_size) if "\ufffd" in learnt.decode([i]))
    assert "\ufffd" not in spelt(learnt, part) and spelt(learnt, part)
    assert visible(" a\tb\n\x00") == "␣a⇥b↵<U+0000>"


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match="tokens=0 must be at least 1"):
        collect_text(text_run(), documents(), tokens=0)
    with pytest.raises(ValueError, match="no tokens in the documents"):
        collect_text(text_run(), [([], 0)])
    with pytest.raises(ValueError, match="document 2 has the token id 320"):
        collect_text(text_run(), [([1], 1), ([320], 1)])
    with pytest.raises(ValueError, match="dense model LM-custom"):
        collect_text(text_run("model.moe=null", name="LM-custom"), documents())
