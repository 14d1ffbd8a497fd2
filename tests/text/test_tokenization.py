"""Tokenising: always the same bytes, however often stopped, and nothing half-written or of something else is read."""

import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dit_moe.json_files import write_sealed
from dit_moe.text import tokenization as tokenizing
from dit_moe.text.corpora import CORPORA
from dit_moe.text.losses import TextLosses
from dit_moe.text.sequences import TokensConfig
from dit_moe.text.splits import tokenize_splits
from dit_moe.text.token_shards import NoTokens, TokenShards, read_token_manifest
from dit_moe.text.tokenization import TokenizeConfig
from dit_moe.text.tokenizer import TokenizerConfig, open_tokenizer
from tests.folders import contents
from tests.scripts import killed_five_times
from tests.text.tokens import config, save_bpe, texts, tokenization, tokenized, write_lines

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


def whole_words(folder, vocabulary, unk="low", **options):
    """A tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=unk))
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


# ----------------------------------------------------------------------------------- what is lost and left out


def normalized(folder, normalizer, **options):
    """The byte-pair tokenizer behind a normalizer of texts."""
    from tokenizers import Tokenizer

    path = save_bpe(folder, **options) / "tokenizer.json"
    backend = Tokenizer.from_file(str(path))
    backend.normalizer = normalizer
    backend.save(str(path))
    return str(folder)


@pytest.mark.parametrize(
    "kind, text, lost, unknown",
    [
        ("unknown", "low x high y", 4, 2),  # x, y and two spaces
        ("lower", "Low HIGH", 5, 0),
        ("accents", "naïve", 2, 0),
        ("nfkc", "ﬁne ²", 5, 0),
        ("stripped", " low ", 2, 0),
        ("spaces", "low  high", 1, 0),
        ("nothing", "Low  naïve ﬁ\n漢字\x00<|endoftext|>", 0, 0),
        ("bytes", "Low  naïve ﬁ\n漢字\x00<|endoftext|>", 0, 0),
    ],
)
def test_what_a_tokenizer_loses_is_counted_and_said(tmp_path, capsys, kind, text, lost, unknown):
    from tokenizers import Regex, normalizers

    normalizer = {
        "lower": normalizers.Lowercase(),
        "accents": normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
        "nfkc": normalizers.NFKC(),
        "stripped": normalizers.Strip(),
        "spaces": normalizers.Replace(Regex(" +"), " "),
        "nothing": None,
    }
    if kind == "unknown":
        vocabulary = {"</s>": 0, "[UNK]": 1, "low": 2, "high": 3}
        name = whole_words(tmp_path / "words", vocabulary, unk="[UNK]", eos_token="</s>", unk_token="[UNK]")
    else:
        name = kind if kind == "bytes" else normalized(tmp_path / "bpe", normalizer[kind])
    write_lines(tmp_path / "text.jsonl", ["low high", "low", text])
    summary = tokenize_splits(config(tmp_path / "text.jsonl", tokenizer=name), TokensConfig(path=str(tmp_path / "t")))
    losses = read_token_manifest(tmp_path / "t").losses
    size = len(f"low highlow{text}".encode())
    counts = {"checked": 3, "checked_bytes": size, "changed": int(lost > 0), "lost_bytes": lost}
    assert losses == TextLosses(unknown_tokens=unknown, **counts) and losses.lossy == (lost > 0)
    assert summary["train"]["losses"] == losses.dump()
    assert ("bits per byte of it cannot be compared" in capsys.readouterr().err) == losses.lossy


def test_counts_of_what_is_left_out_depend_on_no_interruption_and_add_up_to_what_is_on_disk(tmp_path, capsys):
    folder, source = tmp_path / "tokens", tmp_path / "text"
    source.mkdir()
    marked = [f"\ufeff{text}" if number % 9 == 4 else text for number, text in enumerate(["", "", *texts(40), "", ""])]
    for number, text in enumerate(marked):
        (source / f"{number:02d}.txt").write_bytes(text.encode())
    files = CORPORA.config_class("files")(path=str(source), skip_null=True)
    made = TokenizeConfig(corpus=files, shard_tokens=500)
    tokenize_splits(made, TokensConfig(path=str(folder)))
    assert "tokenising train: 5 documents without text and 5 byte-order marks are left out" in capsys.readouterr().err
    manifest, before = read_token_manifest(folder), contents(folder)
    assert manifest.documents + manifest.losses.without_text == len(marked)
    on_disk = sum(path.stat().st_size for path in source.iterdir())
    assert manifest.bytes + 3 * manifest.losses.byte_order_marks == on_disk
    for stem in ("00000", "00002", manifest.shards[-1].file):
        (folder / "shards" / f"{stem}.tokens").unlink()
    again = tokenizing.Tokenization(made, folder, "train")
    again.run()
    assert again.made == 3 and contents(folder) == before


def test_tokens_of_an_earlier_version_are_read_and_say_nothing_of_losses(tmp_path):
    folder = tmp_path / "tokens"
    tokenized(folder)
    for path in (*folder.glob("shards/*.json"), folder / "manifest.json"):
        body = json.loads(path.read_text())
        del body["losses"]
        body.pop("sha256", None)
        (write_sealed(path, body) if path.name == "manifest.json" else path.write_text(json.dumps(body)))
    again = tokenization(folder)
    assert read_token_manifest(folder).losses is None and again.run().losses is None and again.made == 0


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
    rows = task.corpus.rows

    def counted(start=0):
        nonlocal read
        for row in rows(start):
            read += 1
            records = [json.loads(path.read_text()) for path in folder.glob("shards/*.json")]
            ahead.append(read - sum(record["shard"]["documents"] for record in records))
            yield row

    task.corpus.rows = counted
    task.run()
    assert read == 1 + 200 and max(ahead) < 60  # one tells that there is text; batches waiting, and an open shard
    assert contents(folder) == before


def test_documents_that_nobody_takes_any_more_are_not_waited_for():
    given_up = threading.Event()

    def encode_batch(batch):
        given_up.wait(20 if batch == ["second"] else 0)
        return batch

    rows = [SimpleNamespace(text=text) for text in ("first", "second")]
    ahead = tokenizing._encoded_ahead(SimpleNamespace(encode_batch=encode_batch), iter([rows[:1], rows[1:]]))
    assert next(ahead)[1] == ["first"]
    start = time.perf_counter()
    ahead.close()
    taken = time.perf_counter() - start
    given_up.set()
    assert taken < 5
