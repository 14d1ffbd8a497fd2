"""Existing tokens: finished ones are left alone, and others go on only as they were begun."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from dit_moe.config import ConfigError
from dit_moe.text.token_shards import TokenShards
from dit_moe.text.tokenization import Tokenization, TokenizeConfig, finished
from dit_moe.text.tokenizer import TokenizerConfig
from tests.folders import contents
from tests.text.tokens import config, corpus, save_bpe, texts, tokenize, tokenized, write_lines

pytest.importorskip("transformers")


@pytest.mark.parametrize("suffixes", [("tokens", "documents"), ("tokens",)])
def test_exchanged_shards_are_refused_when_they_are_read(tmp_path, suffixes):
    manifest = tokenized(tmp_path / "tokens", ["aaaa", "bbbbbb", "cccccc", "dddd"], shard_tokens=12)
    assert [(shard.documents, shard.tokens) for shard in manifest.shards] == [(2, 12), (2, 12)]
    for suffix in suffixes:
        one, other = (tmp_path / "tokens" / "shards" / f"{number:05d}.{suffix}" for number in (0, 1))
        content = one.read_bytes()
        one.write_bytes(other.read_bytes())
        other.write_bytes(content)
    for look in (lambda shards: shards.read(0, np.empty(3)), lambda shards: next(shards.documents())):
        with pytest.raises(ValueError, match=rf"00000.{suffixes[-1]} is not the file that was written here.*tokenize"):
            look(TokenShards(tmp_path / "tokens"))


class Rows:
    """A split of a dataset on the Hub that says nothing of its size unless told."""

    column_names = ("text",)

    def __init__(self, size=None):
        known = {split: SimpleNamespace(num_examples=size, num_bytes=None) for split in ("train", "other")}
        self.info = SimpleNamespace(splits=known)

    def skip(self, start):
        return ({"text": text} for text in texts(30)[start:])


def test_finished_tokens_are_found_without_the_network(tmp_path, monkeypatch):
    """Neither the dataset nor the tokenizer is asked for again."""
    import transformers

    copy, bpe = tmp_path / "tokens" / "tokenizer", save_bpe(tmp_path / "bpe")
    load, asked = transformers.AutoTokenizer.from_pretrained, []

    def from_hub(place, **how):
        asked.append(str(place))
        return load(bpe if place == "some/tokenizer" else place, **how)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_hub)
    monkeypatch.setattr("dit_moe.text.corpora.huggingface.load_split", lambda *where: asked.append("set") or Rows())
    section = corpus("huggingface", id="some/set")
    config = TokenizeConfig(corpus=section, tokenizer=TokenizerConfig(name="some/tokenizer"))
    made = tokenize(config, tmp_path / "tokens", "train")
    assert {"some/tokenizer", "set"} <= set(asked)
    asked.clear()
    assert finished(config, tmp_path / "tokens", "train") == tokenize(config, tmp_path / "tokens", "train") == made
    assert set(asked) == {str(copy)}
    others = [
        replace(config, shard_tokens=5),
        replace(config, corpus=replace(section, train="other")),
        replace(config, tokenizer=TokenizerConfig(name="another/tokenizer")),
    ]
    assert not any(finished(other, tmp_path / "tokens", "train") for other in others)


def test_tokens_are_finished_only_while_they_are_whole_and_of_the_text_and_tokenizer_that_are_there(tmp_path):
    def is_finished():
        return finished(made, folder, "train") is not None

    folder, bpe = tmp_path / "tokens", save_bpe(tmp_path / "bpe")
    made = config(write_lines(tmp_path / "text.jsonl", texts()), tokenizer=str(bpe))
    assert not is_finished() and not folder.exists()
    tokenize(made, folder, "train")
    assert is_finished()
    write_lines(tmp_path / "text.jsonl", texts(99))
    assert not is_finished()
    write_lines(tmp_path / "text.jsonl", texts())
    save_bpe(bpe, 301)
    assert not is_finished()
    save_bpe(bpe)
    assert is_finished()
    for file in ("shards/00001.tokens", "tokenizer/tokenizer.json", "manifest.json"):
        (folder / file).unlink()
        assert not is_finished()
        tokenize(made, folder, "train")
        assert is_finished()


# ---------------------------------------------------------------------------------------------- other text or tokenizer


def test_a_folder_goes_on_only_with_the_text_and_tokenizer_it_was_begun_with(tmp_path):
    folder = tmp_path / "tokens"
    tokenized(folder)
    before = contents(folder)
    otherwise = "tokenise into another folder, or delete that one"
    cases = {
        "corpus.fingerprint": lambda: tokenized(folder, texts(99)),
        "corpus.heldout_every": lambda: tokenized(folder, texts(), heldout_every=5),
        "tokenizer.sha256": lambda: tokenized(folder, texts(), tokenizer=str(save_bpe(tmp_path / "bpe"))),
        "shard_tokens": lambda: tokenized(folder, texts(), shard_tokens=999),
        "split": lambda: tokenize(
            config(tmp_path / "text.jsonl", heldout=str(write_lines(tmp_path / "other.jsonl", texts()))),
            folder,
            "heldout",
        ),
    }
    for key, call in cases.items():
        recorded = key in ("corpus.fingerprint", "tokenizer.sha256")
        remedy = "restore the text and the tokenizer that it is of" if recorded else "take that value"
        problem = rf"^tokenize.{key}=.* differs from the tokens in .*; {remedy}, {otherwise}"
        with pytest.raises(ConfigError, match=problem):
            call()
    moved = write_lines(tmp_path / "elsewhere" / "text.jsonl", texts())
    again = Tokenization(config(moved), folder, "train")
    again.corpus.rows = None  # would be called
    again.run()
    assert again.made == 0 and contents(folder / "shards") == {
        name.removeprefix("shards/"): sha256 for name, sha256 in before.items() if name.startswith("shards/")
    }


def test_a_folder_does_not_mix_two_splits_of_a_dataset_of_which_nothing_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr("dit_moe.text.corpora.huggingface.load_split", lambda *where: Rows())
    monkeypatch.setattr("tests.text.tokens.finished", lambda *what: None)

    def make(split="train", **options):
        section = corpus("huggingface", id="some/set", **options)
        return tokenize(TokenizeConfig(corpus=section, shard_tokens=1000), tmp_path / split, split)

    make(), make("heldout", heldout="test")
    with pytest.raises(ConfigError, match=r"^tokenize.corpus.train=other differs from .*, which has train; take that"):
        make(train="other")
    with pytest.raises(ConfigError, match=r"^tokenize.corpus.heldout=other differs from .*, which has test; take that"):
        make("heldout", heldout="other")
    make(heldout="test"), make("heldout", train="other", heldout="test")  # not of this split's text
    monkeypatch.setattr("dit_moe.text.corpora.huggingface.load_split", lambda *where: Rows(30))
    make(streaming=False)  # more is known of the same rows now


def test_until_the_first_shard_is_made_everything_may_change(tmp_path):
    folder = tmp_path / "tokens"
    path = tmp_path / "text.jsonl"
    cases = (("no json\n", "line 1, is not valid JSON"), ("", "^tokenize.corpus is empty: the split train"))
    for content, problem in cases:
        path.write_text(content)
        with pytest.raises(ValueError, match=problem):
            tokenize(config(path), folder, "train")
    assert not (folder / "encoding.json").exists()
    tokenized(folder, texts(), shard_tokens=500)


@pytest.mark.parametrize("shard_tokens", [1, 1000])
def test_a_corpus_of_empty_documents_is_refused(tmp_path, shard_tokens):
    with pytest.raises(ValueError, match=r"^tokenize.corpus is empty: the split train has no text; name some"):
        tokenized(tmp_path / "tokens", [""] * 5, shard_tokens=shard_tokens)
