"""`dit-moe tokenize`: makes both splits, says what it made, and refuses what it cannot use before it begins."""

import json

import pytest

from dit_moe.experiments.text import load_text_experiment
from dit_moe.text import splits, tokenization
from dit_moe.text.splits import tokenize_splits
from dit_moe.text.token_shards import read_token_manifest
from tests.cli.conftest import cli
from tests.folders import contents
from tests.scripts import in_use
from tests.text.tokens import save_bpe, texts, write_lines

pytest.importorskip("transformers")


@pytest.fixture
def config(tmp_path):
    write_lines(tmp_path / "text.jsonl", texts())
    (tmp_path / "lm.yaml").write_text(f"""
model: LM-tiny
data: {{path: {tmp_path}/train, heldout: {tmp_path}/heldout, length: 64}}
tokenize:
  corpus: {{name: jsonl, path: {tmp_path}/text.jsonl, heldout_every: 10}}
  shard_tokens: 1000
""")
    return tmp_path / "lm.yaml"


def test_both_splits_are_made_once_and_described(tmp_path, config, capsys):
    assert cli("tokenize", config) == 0
    said = capsys.readouterr()
    facts = json.loads(said.out)
    assert [facts[split]["documents"] for split in ("train", "heldout")] == [90, 10]
    for split in ("train", "heldout"):
        manifest = read_token_manifest(tmp_path / split)
        assert (facts[split]["tokens"], facts[split]["fingerprint"]) == (manifest.tokens, manifest.fingerprint)
        assert facts[split]["shards_made"] == len(manifest.shards) == facts[split]["shards"]
        assert f"tokenising {split}: " in said.err
    assert cli("tokenize", config) == 0
    again = json.loads(capsys.readouterr().out)
    for split in ("train", "heldout"):
        assert (again[split]["shards_made"], again[split]["already_there"]) == (0, True)
        assert again[split].items() > {key: facts[split][key] for key in ("folder", "tokens", "fingerprint")}.items()


def test_splits_are_made_if_they_have_a_folder_and_are_missing(tmp_path, config, monkeypatch):
    experiment = load_text_experiment(config, ["data.heldout=null"])
    assert set(tokenize_splits(experiment.tokenize, experiment.data)) == {"train"}
    assert not (tmp_path / "heldout").exists()
    assert cli("tokenize", config, "--split", "heldout") == 0
    for name in ("locked", "Tokenization"):
        monkeypatch.setattr(splits, name, None)  # would be called: finished tokens need no folder that can be written
    assert cli("tokenize", config) == 0


def test_a_held_out_split_that_cannot_be_made_is_refused_before_the_other_split_is_made(tmp_path, config, capsys):
    assert cli("tokenize", config, "--split", "heldout") == 0
    assert cli("tokenize", config, f"tokenize.tokenizer={{name: {save_bpe(tmp_path / 'bpe')}}}") == 2
    assert "tokenize.tokenizer.sha256=" in capsys.readouterr().err and not (tmp_path / "train").exists()
    write_lines(tmp_path / "text.jsonl", [*texts(19), "\ud800"])
    assert cli("tokenize", config, f"data.heldout={tmp_path / 'other'}") == 2
    assert "line 20, holds half a character" in capsys.readouterr().err and not (tmp_path / "train").exists()


def test_held_out_documents_that_are_trained_on_too_are_counted_and_said(tmp_path, config, capsys):
    documents = texts(40)
    documents[9], documents[19] = documents[5], documents[30]  # two of the four held-out ones
    write_lines(tmp_path / "text.jsonl", documents)
    assert cli("tokenize", config) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["heldout"]["also_trained_on"] == 2
    assert "2 of the 4 held-out documents are in the training text too: data.heldout=" in said.err


def test_verifying_reads_what_is_there(tmp_path, config, capsys):
    assert cli("tokenize", config, "--verify") == 2
    assert "train holds no tokens; run `dit-moe tokenize CONFIG`" in capsys.readouterr().err
    assert cli("tokenize", config) == 0
    capsys.readouterr()
    assert cli("tokenize", config, "--verify") == 0
    assert json.loads(capsys.readouterr().out)["heldout"]["verified"] is True
    path = tmp_path / "heldout" / "shards" / "00000.tokens"
    path.write_bytes(path.read_bytes()[:-2] + b"xx")
    assert cli("tokenize", config, "--verify") == 2
    assert "00000.tokens was changed after it was written" in capsys.readouterr().err


def test_what_cannot_be_used_is_refused_in_one_line(tmp_path, config, capsys):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"na\xefve")
    cases = {
        "tokenize=null": "tokenize is missing; say which text",
        "tokenize.corpus.path=nowhere": "tokenize.corpus.path=nowhere names no files of text",
        f"tokenize.corpus.path={tmp_path}/empty.jsonl": "tokenize.corpus is empty",
        f"tokenize.corpus={{name: files, path: {tmp_path}/latin.txt}}": "latin.txt is not UTF-8: byte 0xef",
        "tokenize.corpus.field=body": "text.jsonl, line 1, has no field 'body'",
        f"tokenize.tokenizer={{name: {tmp_path}}}": "holds no tokenizer",
        "tokenize.corpus.name=jsonlines": "tokenize.corpus.name=jsonlines: unknown corpus",
    }
    for override, problem in cases.items():
        assert cli("tokenize", config, override, "--split", "train") == 2, override
        said = capsys.readouterr().err
        assert problem in said and said.count("error: ") == 1, said
    assert cli("tokenize", config, "data.heldout=null", "--split", "heldout") == 2
    assert "data.heldout=None names no held-out tokens; say where" in capsys.readouterr().err
    (tmp_path / "train").mkdir(exist_ok=True)
    with in_use(tmp_path / "train"):
        assert cli("tokenize", config, "--split", "train") == 2
    assert "train is in use by another process; wait for it" in capsys.readouterr().err
    assert cli("tokenize", config, f"data.heldout={tmp_path}/train") == 2
    assert "tokenize.split=heldout differs from the tokens in" in capsys.readouterr().err


def test_what_is_refused_leaves_nothing_and_what_fails_later_says_so(tmp_path, config, capsys, monkeypatch):
    lines = (tmp_path / "text.jsonl").read_text().splitlines()
    for content in ("", "no json", '{"text": ""}\n', "\n".join([*lines[:50], "no json"])):
        (tmp_path / "text.jsonl").write_text(content)
        assert cli("tokenize", config, f"data.path={tmp_path}/new/train") == 2
        assert not (tmp_path / "new").exists()
    monkeypatch.setattr(tokenization, "BATCH_DOCUMENTS", 10)
    assert cli("tokenize", config, "--split", "train", f"data.path={tmp_path}/new/train") == 1
    told = capsys.readouterr().err
    assert "line 51, is not valid JSON" in told and f"then delete {tmp_path}/new/train, for its tokens are of" in told


def test_nothing_of_a_user_s_is_replaced_by_tokens_or_their_tokenizer(tmp_path, config, capsys):
    bpe = save_bpe(tmp_path / "train" / "tokenizer")
    (bpe / "notes.txt").write_text("mine")
    before = contents(tmp_path / "train")
    for name in (bpe, "bytes"):
        assert cli("tokenize", config, f"tokenize.tokenizer.name={name}", "--split", "train") == 2
        told = f"{tmp_path}/train/tokenizer is there already, and nothing says that dit-moe wrote it; move it away, or"
        assert told in capsys.readouterr().err
        assert contents(tmp_path / "train") == before
    assert cli("tokenize", config, f"tokenize.tokenizer.name={bpe}", "--split", "heldout") == 0
    copy = tmp_path / "heldout" / "tokenizer"  # of which more tokens may be made, in its own folder, too
    kept = contents(copy)
    (tmp_path / "heldout" / "manifest.json").unlink()
    assert cli("tokenize", config, f"tokenize.tokenizer.name={copy}", "--split", "heldout") == 0
    assert contents(copy) == kept
