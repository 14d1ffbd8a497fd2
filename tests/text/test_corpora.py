"""Corpora: every document once, in a fixed order, and what is no text is named."""

import gzip
import json
import re

import pytest

from dit_moe import config
from dit_moe.config import ConfigError
from dit_moe.text.corpora import CORPORA
from dit_moe.text.corpora.python_docs import is_held_out
from tests.text.tokens import corpus, texts, write_lines


def files(folder, count=25):
    folder.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(texts(count)):
        (folder / f"{number:03d}.txt").write_bytes(text.encode())
    return folder


def huggingface(folder, documents=None, column="text"):
    datasets = pytest.importorskip("datasets")
    folder.mkdir(parents=True, exist_ok=True)
    rows = datasets.Dataset.from_dict({column: texts(25) if documents is None else documents})
    rows.to_parquet(folder / "train-00000-of-00001.parquet")
    return folder


EXAMPLES = {  # a small one of every kind, that holds something out
    "files": lambda folder: corpus("files", path=str(files(folder)), heldout_every=4),
    "jsonl": lambda folder: corpus("jsonl", path=str(write_lines(folder / "a.jsonl", texts(25))), heldout_every=4),
    "huggingface": lambda folder: corpus("huggingface", id=str(huggingface(folder / "set")), heldout_every=4),
    "python_docs": lambda folder: corpus("python_docs"),
}


@pytest.fixture(params=CORPORA.names())
def made(request, tmp_path, monkeypatch):
    if request.param == "huggingface":
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return EXAMPLES[request.param](tmp_path)


def read(section, split="train", start=0):
    return list(CORPORA.build(section, split).documents(start))


def test_every_corpus_gives_the_same_documents_from_any_place_on(made):
    whole = read(made)
    assert len(whole) > 10 and all(isinstance(text, str) for text in whole)
    for start in (0, 1, 3, 7, len(whole) - 1, len(whole)):
        assert read(made, start=start) == whole[start:]


def test_a_link_that_leads_back_is_left_out_of_a_pattern(tmp_path, capsys):
    (files(tmp_path / "text", count=4) / "loop").symlink_to(".")
    for place in (tmp_path / "text", tmp_path / "text" / "**" / "*.txt"):
        assert len(read(corpus("files", path=str(place)))) == 4
    assert "text/loop leads back to" in capsys.readouterr().err


def test_every_corpus_holds_out_what_is_not_trained_on(made):
    train, heldout = read(made), read(made, "heldout")
    assert len(heldout) >= len(train) // 15 and not set(heldout) & set(train) - {""}
    for start in range(min(len(heldout), 6)):
        assert read(made, "heldout", start) == heldout[start:]
    with pytest.raises(ValueError, match=r"no split 'test'; .*known: train, heldout"):
        CORPORA.build(made, "test")


def test_every_corpus_comes_back_from_its_config_and_knows_itself_again(made):
    tree = {"name": CORPORA.name_of(made), **config.dump(made)}
    again = config.build(CORPORA.config_class(tree["name"]), {k: v for k, v in tree.items() if k != "name"})
    assert CORPORA.build(again, "train").fingerprint == CORPORA.build(made, "train").fingerprint


@pytest.mark.parametrize("every", [2, 3, 10])
def test_holding_out_shares_all_documents_between_the_splits(tmp_path, every):
    documents = [str(number) for number in range(35)]
    section = corpus("jsonl", path=str(write_lines(tmp_path / "a.jsonl", documents)), heldout_every=every)
    assert read(section, "heldout") == documents[every - 1 :: every]
    assert sorted(read(section) + read(section, "heldout"), key=int) == documents


@pytest.mark.parametrize("first", [1, 7, 12, 100])
def test_the_first_documents_of_a_source_are_those_of_both_splits(tmp_path, first):
    documents = texts(12)
    section = corpus("jsonl", path=str(write_lines(tmp_path / "a.jsonl", documents)), heldout_every=4, first=first)
    train, heldout = (list(CORPORA.build(section, split).documents()) for split in ("train", "heldout"))
    kept = documents[:first]
    assert train == [text for i, text in enumerate(kept) if i % 4 != 3] and heldout == kept[3::4]
    for start in range(len(train) + 1):
        assert list(CORPORA.build(section, "train").documents(start)) == train[start:]


def test_what_is_held_out_is_said_once(tmp_path):
    path = str(write_lines(tmp_path / "a.jsonl", ["text"]))
    with pytest.raises(ConfigError, match=r"^heldout is missing; name held-out text, or set heldout_every"):
        read(corpus("jsonl", path=path), "heldout")
    with pytest.raises(ConfigError, match=r"^heldout_every=5 and heldout both say"):
        corpus("jsonl", path=path, heldout=path, heldout_every=5)
    with pytest.raises(ConfigError, match=r"^heldout_every=1 must be at least 2"):
        corpus("jsonl", path=path, heldout_every=1)


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("name", ["files", "jsonl"])
def test_a_file_of_both_splits_is_refused_by_whatever_name(tmp_path, name, split):
    path = write_lines(tmp_path / "all" / f"a.{'txt' if name == 'files' else 'jsonl'}", ["text"])
    (tmp_path / "link").symlink_to(path)
    for heldout in (path, path.parent, tmp_path / "link"):
        section = corpus(name, path=str(path.parent), heldout=str(heldout))
        with pytest.raises(ConfigError, match=r"^heldout=.* names .*/all/a\..*, which path=.*all names too; name text"):
            CORPORA.build(section, split)


def test_a_split_of_a_dataset_is_not_held_out_of_itself():
    with pytest.raises(ConfigError, match=r"^heldout=validation is trained on; name another split, or set"):
        corpus("huggingface", id="some/set", train="validation", heldout="validation")


# --------------------------------------------------------------------------------------------------------------- files


def test_a_folder_a_pattern_and_a_file_name_files_in_order(tmp_path):
    for name, text in {"b/2.txt": "two", "a/3.md": "three\r\n", "1.txt": "one", "no.json": "{}"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    assert read(corpus("files", path=str(tmp_path))) == ["one", "three\r\n", "two"]
    assert read(corpus("files", path=str(tmp_path / "**" / "*.txt"))) == ["one", "two"]
    assert read(corpus("files", path=str(tmp_path / "no.json"))) == ["{}"]
    below = corpus("files", path=str(tmp_path / "b"), heldout=str(tmp_path / "a"))
    assert read(below) == ["two"] and read(below, "heldout") == ["three\r\n"]


@pytest.mark.parametrize("name", ["files", "jsonl"])
def test_no_files_are_an_error_that_names_the_option(tmp_path, name):
    with pytest.raises(ConfigError, match=rf"^path={re.escape(str(tmp_path))} names no files of text; name a file"):
        read(corpus(name, path=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"^path= is empty; say where the text is"):
        read(corpus(name, path=""))
    with pytest.raises(ConfigError, match=r"^heldout=.*nowhere names no files of text"):
        read(corpus(name, path=str(tmp_path), heldout=str(tmp_path / "nowhere")), "heldout")


def test_a_file_that_is_not_utf8_is_named_with_the_byte(tmp_path):
    (tmp_path / "good.txt").write_text("naïve")
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.txt is not UTF-8: byte 0xef at position 2; convert it"):
        read(corpus("files", path=str(tmp_path)))


def test_the_fingerprint_tells_other_files_but_not_another_place(tmp_path):
    def fingerprint(folder):
        return CORPORA.build(corpus("files", path=str(folder)), "train").fingerprint

    first = fingerprint(files(tmp_path / "a"))
    assert fingerprint(files(tmp_path / "deep" / "b")) == first
    assert fingerprint(files(tmp_path / "c", 24)) != first


# --------------------------------------------------------------------------------------------------------------- jsonl


def test_lines_are_read_across_files_packed_or_not(tmp_path):
    documents = texts(25)
    lines = write_lines(tmp_path / "all", documents).read_bytes().splitlines(keepends=True)
    (tmp_path / "1.jsonl").write_bytes(b"".join(lines[:10]) + b"\n  \n")
    (tmp_path / "2.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[10:]).rstrip()))
    section = corpus("jsonl", path=str(tmp_path))
    assert [read(section, start=start) for start in (0, 9, 10, 24)] == [documents[i:] for i in (0, 9, 10, 24)]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"text": "cut', r"line 3, is not JSON: .*; mend or remove it"),
        (b'{"body": "x"}', r"line 3, has no field 'text'; known: body"),
        (b'{"texts": "x"}', r"line 3, has no field 'text'; did you mean 'texts'\?"),
        (b'{"text": 3}', r"line 3, has no text in the field 'text' but int"),
        (b'["x"]', r"line 3, is no JSON object but list"),
        (b"[" * 100_000, r"line 3, is not JSON.*; mend"),
        (b'{"text": "\xff"}', r"line 3, is not UTF-8: byte 0xff at position 38; convert it"),
        (rb'{"text": "a\ud83e"}', r"line 3, holds half a character \(the lone surrogate U\+D83E\) at letter 1"),
    ],
)
def test_a_line_that_is_no_document_is_named(tmp_path, line, problem):
    path = write_lines(tmp_path / "bad.jsonl", ["a", "b"])
    assert path.stat().st_size == 28
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(ValueError, match=rf"bad.jsonl, {problem}") as error:
        read(corpus("jsonl", path=str(path)))
    assert len(str(error.value)) < 300


def test_a_pair_of_surrogates_is_one_character(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(rb'{"text": "\ud83e\udd8a"}')
    assert read(corpus("jsonl", path=str(tmp_path))) == ["🦊"]


def test_a_packed_file_that_is_cut_off_is_named(tmp_path):
    whole = gzip.compress(json.dumps({"text": "x" * 1000}).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=r"a.jsonl.gz cannot be unpacked \(.*\); restore it"):
        read(corpus("jsonl", path=str(tmp_path)))


# --------------------------------------------------------------------------------------------------------- huggingface


@pytest.fixture
def cached(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.usefixtures("cached")
@pytest.mark.parametrize("streaming", [True, False])
def test_rows_are_documents_streamed_or_not(tmp_path, streaming):
    place = str(huggingface(tmp_path / "set", column="content"))
    section = corpus("huggingface", id=place, field="content", streaming=streaming)
    assert [read(section, start=start) for start in (0, 7)] == [texts(25), texts(25)[7:]]
    with pytest.raises(ConfigError, match=r"^field=text is no column of .*; .*known: content"):
        read(corpus("huggingface", id=place, streaming=streaming))
    with pytest.raises(ConfigError, match=r"^id=.* cannot be loaded, split test: "):
        read(corpus("huggingface", id=place, heldout="test", streaming=streaming), "heldout")


@pytest.mark.usefixtures("cached")
def test_a_row_without_text_is_named(tmp_path):
    place = str(huggingface(tmp_path / "set", ["a", None, "b"]))
    with pytest.raises(ValueError, match=r"set, train, row 1 has NoneType in the column 'text', not text; choose"):
        read(corpus("huggingface", id=place))


def test_a_dataset_that_cannot_be_reached_is_named_in_one_line(monkeypatch):
    datasets = pytest.importorskip("datasets")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"^id=some/set-not-here cannot be loaded, split train: .*; name a") as error:
        read(corpus("huggingface", id="some/set-not-here"))
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------------------- python_docs


def test_python_has_about_two_megabytes_of_english_of_which_a_tenth_is_held_out():
    section = corpus("python_docs")
    sizes = [sum(len(text.encode()) for text in read(section, split)) for split in ("train", "heldout")]
    assert 1e6 < sum(sizes) < 5e6 and 0.05 < sizes[1] / sum(sizes) < 0.2


def test_the_name_of_a_python_document_decides_its_split():
    splits = {split: CORPORA.build(corpus("python_docs"), split).texts for split in ("train", "heldout")}
    assert {name for texts in splits.values() for name in texts if is_held_out(name)} == set(splits["heldout"])
    assert "topic assert" in splits["train"] | splits["heldout"]
    assert (splits["train"] | splits["heldout"])["module textwrap"].startswith("textwrap\n\nText wrapping and filling")


def test_no_held_out_paragraph_stands_in_training():
    def paragraphs(split):
        found = CORPORA.build(corpus("python_docs"), split).texts.values()
        return [" ".join(each.split()) for text in found for each in text.split("\n\n")]

    train, heldout = set(paragraphs("train")), paragraphs("heldout")
    assert len(heldout) > 1000
    assert not [each for each in heldout if len(each) >= 60 and each in train]
