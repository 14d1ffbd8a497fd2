"""Tokenising: always the same bytes, however often stopped, and nothing half-written or of something else is read."""

import json
from pathlib import Path

import numpy as np
import pytest

from dit_moe.text import tokenization as tokenizing
from dit_moe.text.token_shards import NoTokens, TokenShards, read_token_manifest
from dit_moe.text.tokenizer import TokenizerConfig, open_tokenizer
from tests.folders import contents
from tests.scripts import killed_five_times
from tests.text.tokens import save_bpe, texts, tokenization, tokenized, write_lines

pytest.importorskip("transformers")


def test_shards_hold_every_document_behind_an_end_of_text_and_the_manifest_says_what_they_are(tmp_path):
    seen = []
    manifest = tokenization(tmp_path / "tokens").run(seen.append)
    assert len(manifest.shards) > 5 and manifest.dtype == "uint16"
    stored = [np.fromfile(path, "<u2") for path in sorted((tmp_path / "tokens").glob("shards/*.tokens"))]
    assert np.concatenate(stored).tolist() == [i for text in texts() for i in (256, *text.encode())]
    for shard, tokens in zip(manifest.shards, stored, strict=True):  # cut behind the document that fills it
        assert len(tokens) == shard.tokens and (shard.tokens >= 1000 or shard is manifest.shards[-1])
        assert np.flatnonzero(tokens == 256)[-1] < 1000
    assert (
        (manifest.documents, manifest.bytes) == (100, sum(len(text.encode()) for text in texts())) == (100, sum(seen))
    )
    assert (manifest.tokens, manifest.largest) == (manifest.bytes + 100, 256)
    sha256 = open_tokenizer(TokenizerConfig()).config.sha256
    assert manifest.tokenizer == {"name": "bytes", "sha256": sha256, "vocab_size": 257, "eos": 256}
    assert read_token_manifest(tmp_path / "tokens") == manifest
    assert manifest.describe() == f"{manifest.tokens:,} tokens of 100 documents by bytes, 0.99 bytes a token"


@pytest.mark.parametrize("shard_tokens", [1, 700, 10**6])
def test_documents_come_back_as_they_were(tmp_path, shard_tokens):
    folder = tmp_path / "tokens"
    name = str(save_bpe(tmp_path / "bpe"))
    tokenized(folder, tokenizer=name, shard_tokens=shard_tokens)
    shards = TokenShards(folder)
    tokenizer, documents = shards.tokenizer(), list(shards.documents())
    assert [tokenizer.decode(ids) for ids, _ in documents] == texts()
    assert [count for _, count in documents] == [len(text.encode()) for text in texts()]
    assert [list(shards.documents(rank, step=3)) for rank in range(3)] == [documents[rank::3] for rank in range(3)]
    assert list(shards.documents(95)) == documents[95:] and list(shards.documents(3, 5)) == documents[3:5]
    shards.verify()


def whole_words(folder, vocabulary, **options):
    """A tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="low"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, **options).save_pretrained(folder)
    return str(folder)


def test_ids_beyond_two_bytes_are_kept_in_four(tmp_path):
    name = whole_words(tmp_path / "words", {"</s>": 0, "low": 1, "high": 70_000}, eos_token="</s>")
    manifest = tokenized(tmp_path / "tokens", ["low high", "low"], tokenizer=name)
    assert (manifest.dtype, manifest.largest, manifest.tokenizer["vocab_size"]) == ("uint32", 70_000, 70_001)
    assert [ids for ids, _ in TokenShards(tmp_path / "tokens").documents()] == [[1, 70_000], [1]]


def test_text_that_spells_the_end_of_text_is_ordinary_text_or_refused(tmp_path):
    spelt = "one<|endoftext|>two"
    for name in ("bytes", str(save_bpe(tmp_path / "bpe"))):
        folder = tmp_path / Path(name).name / "tokens"
        manifest = tokenized(folder, [spelt, "three"], tokenizer=name)
        shards = TokenShards(folder)
        assert [shards.tokenizer().decode(ids) for ids, _ in shards.documents()] == [spelt, "three"]
        tokens = np.empty(manifest.tokens, dtype=np.int64)
        shards.read(0, tokens)
        assert (tokens == shards.eos).sum() == 2
    name = whole_words(tmp_path / "words", {"end": 0, "low": 1}, eos_token="end")
    with pytest.raises(ValueError, match=r"document 1 of the split train spells the end of text, which .* cannot"):
        tokenized(tmp_path / "tokens", ["low", "low end"], tokenizer=name)


# ----------------------------------------------------------------------------------------------------------- resuming


def test_shards_that_are_lost_or_damaged_are_made_anew_with_the_same_bytes(tmp_path):
    tokenized(tmp_path / "tokens")
    before, shards = contents(tmp_path / "tokens"), tmp_path / "tokens" / "shards"
    (shards / "00000.tokens").write_bytes(b"short")
    (shards / "00002.documents").unlink()
    (shards / "00003.json").unlink()
    (shards / "00005.json").write_text('{"shard"')
    (tmp_path / "tokens" / "tokenizer" / "tokenizer.json").unlink()
    again = tokenization(tmp_path / "tokens")
    again.run()
    assert again.made == 4 and contents(tmp_path / "tokens") == before


def test_killed_five_times_and_resumed_it_is_the_same_to_the_byte(tmp_path):
    write_lines(tmp_path / "text.jsonl", texts(150))
    folder = tmp_path / "tokens"
    begun = tokenization(folder, shard_tokens=200)
    counts = killed_five_times(begun.run, lambda: len(list(folder.glob("shards/*.json"))))
    assert len(counts) == 5
    with pytest.raises(NoTokens, match=r"holds an unfinished tokenisation; run `dit-moe tokenize CONFIG`"):
        read_token_manifest(folder)
    manifest = tokenization(folder, shard_tokens=200).run()
    assert len(manifest.shards) > counts[-1] > 4
    resumed = contents(folder)
    folder.rename(tmp_path / "resumed")
    tokenization(folder, shard_tokens=200).run()
    assert contents(folder) == resumed


def test_how_many_documents_are_encoded_at_a_time_changes_nothing_but_how_far_is_read_ahead(tmp_path, monkeypatch):
    folder, read, ahead = tmp_path / "tokens", 0, []
    tokenized(folder, texts(200), shard_tokens=500)
    before = contents(folder)
    folder.rename(tmp_path / "before")
    monkeypatch.setattr(tokenizing, "BATCH_DOCUMENTS", 10)
    task = tokenization(folder, shard_tokens=500)
    documents = task.corpus.documents

    def counted(start=0):
        nonlocal read
        for text in documents(start):
            read += 1
            records = [json.loads(path.read_text()) for path in folder.glob("shards/*.json")]
            ahead.append(read - sum(record["shard"]["documents"] for record in records))
            yield text

    task.corpus.documents = counted
    task.run()
    assert read == 200 and max(ahead) < 60  # batches waiting, and an open shard
    assert contents(folder) == before
