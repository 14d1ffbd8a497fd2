"""Packed rows: every token is predicted once, and what is damaged or does not fit is refused."""

import json
import pickle
import shutil
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from dit_moe.config import ConfigError
from dit_moe.data.batch_sampler import GlobalBatches, load_batches, micro_batches
from dit_moe.text.sequences import TokensConfig, TokenSequences
from dit_moe.text.token_shards import NoTokens, TokenManifest, TokenShard, TokenShards, require_held_out
from dit_moe.text.tokenization import TokenizeConfig
from dit_moe.text.tokenizer import TokenizerConfig, open_tokenizer
from tests.text.tokens import config, corpus, save_bpe, texts, tokenize, tokenized, write_lines

pytest.importorskip("transformers")

STREAM = [i for text in texts() for i in (256, *text.encode())]


@pytest.fixture
def folder(tmp_path):
    tokenized(tmp_path / "tokens")
    return tmp_path / "tokens"


def sequences(folder, split="train", **options):
    return TokenSequences(TokensConfig(path=str(folder), **options), split)


@pytest.mark.parametrize("length", [1, 7, 100, 2500, len(STREAM) - 1])
def test_rows_laid_end_to_end_are_the_documents(folder, length):
    rows = sequences(folder, length=length)
    assert len(rows) == (len(STREAM) - 1) // length
    tokens = rows.__getitems__(range(len(rows)))["tokens"]
    assert tokens.shape == (len(rows), length + 1) and tokens.dtype == torch.int64
    assert tokens[:, :-1].flatten().tolist() == STREAM[: len(rows) * length]
    assert tokens[:, 1:].flatten().tolist() == STREAM[1 : len(rows) * length + 1]


def test_rows_do_not_depend_on_their_order_and_document_numbers_change_at_every_end_of_text(folder):
    rows = sequences(folder, length=300, document_mask=True)
    all_rows, some = rows.__getitems__(range(len(rows))), [5, 0, len(rows) - 1, 5]
    for name, tensor in rows.__getitems__(some).items():
        assert torch.equal(tensor, all_rows[name][some])
    assert rows.__getitems__([])["tokens"].shape == (0, 301)
    assert all_rows["documents"].dtype == torch.int64
    for tokens, documents in zip(all_rows["tokens"], all_rows["documents"], strict=True):
        assert torch.equal(documents.diff(), (tokens[1:] == 256).long())
        assert documents[0] == (tokens[0] == 256)
    assert "documents" not in sequences(folder, length=300).__getitems__([0])


def test_batches_of_the_trainer_are_the_same_with_workers(folder):
    rows = pickle.loads(pickle.dumps(sequences(folder, length=40)))
    order = GlobalBatches(len(rows), 6, seed=0)
    batches = load_batches(rows, micro_batches(order, [range(6)], 0, 4), workers=2)
    for step, batch in enumerate(batches):
        assert torch.equal(batch["tokens"], rows.__getitems__(order.batch(step))["tokens"])


def test_the_folder_brings_its_tokenizer(tmp_path):
    name = str(save_bpe(tmp_path / "bpe"))
    tokenized(tmp_path / "tokens", tokenizer=name)
    rows = sequences(tmp_path / "tokens", length=10)
    assert rows.tokenizer().config == open_tokenizer(TokenizerConfig(name=name)).config
    assert rows.manifest.tokenizer["vocab_size"] == rows.tokenizer().vocab_size == 300


def test_the_fingerprint_is_of_the_tokens_wherever_they_lie(tmp_path, folder):
    first = sequences(folder, length=10).fingerprint
    tokenized(tmp_path / "again" / "tokens")
    tokenized(tmp_path / "other" / "tokens", texts(99))
    assert sequences(tmp_path / "again" / "tokens", length=10).fingerprint == first
    assert sequences(tmp_path / "other" / "tokens", length=10).fingerprint != first


def test_a_length_beyond_the_data_and_a_split_without_tokens_are_refused(tmp_path, folder):
    longest = len(STREAM) - 1
    with pytest.raises(ConfigError, match=rf"^length={longest + 1} is longer than the data: .* at most {longest}"):
        sequences(folder, length=longest + 1)
    with pytest.raises(ConfigError, match=r"^length=0 must be at least 1"):
        sequences(folder, length=0)
    with pytest.raises(ConfigError, match=r"^heldout=None names no held-out tokens; say where they are"):
        sequences(folder, "heldout")
    with pytest.raises(ValueError, match=r"tokens have no split 'test'; .*known: train, heldout"):
        sequences(folder, "test")
    assert sequences("nowhere", "heldout", heldout=str(folder), length=10).shards.folder == folder
    with pytest.raises(NoTokens, match=r"nowhere holds no tokens; run `dit-moe tokenize CONFIG`, .* in data.path$"):
        sequences(tmp_path / "nowhere")
    with pytest.raises(NoTokens, match=r"nowhere holds no tokens; .*, or name another folder in data.heldout$"):
        sequences(folder, "heldout", heldout=str(tmp_path / "nowhere"))


@pytest.mark.parametrize("file", ["00001.tokens", "00002.documents"])
def test_shards_that_are_changed_truncated_or_missing_are_named(folder, file):
    TokenShards(folder).verify()
    path = folder / "shards" / file
    content = path.read_bytes()
    path.write_bytes(content[:20] + bytes([content[20] ^ 1]) + content[21:])
    with pytest.raises(ValueError, match=f"{file} was changed after it was written; restore it, or delete it and run"):
        TokenShards(folder).verify()
    path.write_bytes(content[:-2])
    sizes = r"has \d+ bytes where manifest.json says \d+; restore .* makes it anew"
    with pytest.raises(ValueError, match=f"{file} {sizes}"):
        sequences(folder)
    path.unlink()
    with pytest.raises(ValueError, match=f"{file} is missing; restore it"):
        sequences(folder)


def test_an_id_above_those_of_the_manifest_is_refused_when_it_is_read(folder):
    path = folder / "shards" / "00000.tokens"
    tokens = np.fromfile(path, "<u2")
    tokens[30] = 60_000
    tokens.tofile(path)
    rows = sequences(folder, length=20)
    rows.__getitems__([0])
    problem = "has the token 60000 where its manifest knows of none above 256; a shard was"
    with pytest.raises(ValueError, match=problem):
        rows.__getitems__([0, 1])


def test_a_manifest_that_was_changed_is_refused(folder):
    path = folder / "manifest.json"
    text = path.read_text()
    for changed, problem in (
        (text.replace('"eos": 256', '"eos": 255'), "was changed after it was written; .* or delete it and"),
        (text[:-200], "is truncated, or still being written"),
        (text.replace('"format": 1', '"format": 9'), "has format 9, this version reads 1"),
    ):
        path.write_text(changed)
        with pytest.raises(ValueError, match=f"manifest.json {problem}"):
            sequences(folder)


def test_a_changed_tokenizer_in_the_folder_is_refused(folder):
    path = folder / "tokenizer" / "tokenizer.json"
    whole = json.loads(path.read_text())
    whole["pre_tokenizer"]["add_prefix_space"] = True
    path.write_text(json.dumps(whole))
    where, remedy = f"^{folder}/tokenizer, the copy of the tokenizer bytes,", "restore it from a copy, or run `dit-moe"
    with pytest.raises(ValueError, match=rf"{where} has the sha256 .* where .* was recorded; {remedy}"):
        sequences(folder, length=10).tokenizer()
    path.write_text("{")
    with pytest.raises(
        ValueError, match=rf"{where} has tokenizer.json, which is truncated, or still being written; {remedy}"
    ):
        sequences(folder, length=10).tokenizer()
    (folder / "tokenizer").rename(folder / "gone")
    with pytest.raises(ValueError, match=rf"{where} is missing; {remedy}"):
        sequences(folder, length=10).tokenizer()


def test_a_folder_that_was_made_anew_is_read_anew(tmp_path):
    def rows():
        return sequences(tmp_path / "tokens", length=5).__getitems__([0])["tokens"][0].tolist()

    for text in ("one two", "two one"):
        tokenized(tmp_path / "tokens", [text])
        assert rows() == [256, *text.encode()[:5]]
        shutil.rmtree(tmp_path / "tokens")


# ------------------------------------------------------------------------------------------------- held out, or trained


def of_corpus(folder, split, **options):
    """The manifest of a split of a corpus of JSON lines."""
    return tokenize(config(folder.parent / "text.jsonl", **options), folder, split)


def test_what_was_held_out_together_is_held_out(tmp_path):
    write_lines(tmp_path / "text.jsonl", texts())
    train = of_corpus(tmp_path / "train", "train", heldout_every=5, first=50)
    for every, first in ((5, 50), (5, None), (10, None)):
        heldout = of_corpus(tmp_path / f"heldout {every} {first}", "heldout", heldout_every=every, first=first)
        require_held_out(train.origin, heldout)


@pytest.mark.parametrize("name", ["jsonl", "python_docs", "files"])
def test_other_text_is_held_out_also_by_name_and_in_files_of_equal_names_and_sizes(tmp_path, name, monkeypatch):
    few = {f"module {number}": text for number, text in enumerate(texts(60))}
    monkeypatch.setattr("dit_moe.text.corpora.python_docs._all", lambda: few)
    for folder, text in (("a", "one text"), ("b", "another!")):
        write_lines(tmp_path / folder / "0.jsonl", [text])
        (tmp_path / folder / "0.txt").write_text(text)
    places = {} if name == "python_docs" else {"path": str(tmp_path / "a"), "heldout": str(tmp_path / "b")}
    made = TokenizeConfig(corpus=corpus(name, **places))
    train, heldout = (tokenize(made, tmp_path / split, split) for split in ("train", "heldout"))
    require_held_out(train.origin, heldout)


@pytest.mark.parametrize("trained", [None, 3, 10])
def test_text_that_was_held_out_of_other_training_is_refused(tmp_path, trained):
    write_lines(tmp_path / "text.jsonl", texts())
    train = of_corpus(tmp_path / "train", "train", heldout_every=trained)
    heldout = of_corpus(tmp_path / "heldout", "heldout", heldout_every=5)
    with pytest.raises(ConfigError, match=rf"^data.heldout has .* trained on: .*_every={trained}, .*heldout_every=5;"):
        require_held_out(train.origin, heldout)


def test_the_text_that_was_trained_on_is_not_held_out(tmp_path):
    write_lines(tmp_path / "text.jsonl", texts())
    train = of_corpus(tmp_path / "train", "train")
    with pytest.raises(ConfigError, match=r"^data.heldout is the same text as data.path; name held-out text"):
        require_held_out(train.origin, train)
    theirs = tokenize(config(write_lines(tmp_path / "other.jsonl", texts(30))), tmp_path / "theirs", "train")
    same = of_corpus(tmp_path / "same", "heldout", heldout=str(tmp_path / "other.jsonl"))
    with pytest.raises(ConfigError, match=r"^data.heldout is the same text"):
        require_held_out(theirs.origin, same)
    require_held_out(train.origin, theirs)  # another corpus, whatever its split is called
    write_lines(tmp_path / "text.jsonl", ["one more, before all the others", *texts()])  # which shifts the numbers
    held_out_now = of_corpus(tmp_path / "shifted", "heldout", heldout_every=5)
    before = train.origin | {"encoding": train.encoding | {"corpus": train.encoding["corpus"] | {"heldout_every": 5}}}
    with pytest.raises(ConfigError, match=r"the source has changed in between; tokenise both anew"):
        require_held_out(before, held_out_now)


@pytest.mark.parametrize(("heldout", "known"), [("validation", True), ("train", False)])
def test_a_stream_is_told_by_the_name_of_its_split(heldout, known):
    """Its fingerprint is None."""

    def manifest(split, **options):
        whole = {"name": "huggingface", "id": "some/set", "subset": None, "train": "train", "fingerprint": None}
        encoding = {"split": split, "corpus": whole | {"heldout": None, "heldout_every": None} | options}
        return TokenManifest({"sha256": ""}, "uint16", encoding, (TokenShard("0", 1, 1, 1, 1, split, ""),))

    with nullcontext() if known else pytest.raises(ConfigError, match=r"^data.heldout has documents that are trained"):
        require_held_out(manifest("train").origin, manifest("heldout", train="other", heldout=heldout))
