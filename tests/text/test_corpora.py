"""Corpora: every document once, in a fixed order, and what is no text is named."""

import bz2
import gzip
import importlib.util
import json
import lzma
import re

import pytest

from dit_moe import config
from dit_moe.config import ConfigError
from dit_moe.text.corpora import CORPORA, Row
from dit_moe.text.corpora import files as reading
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


def test_every_corpus_gives_each_split_from_any_place_on_and_holds_out_what_is_not_trained_on(made):
    corpora = {split: CORPORA.build(made, split) for split in ("train", "heldout")}
    train, heldout = (list(each.documents(0)) for each in corpora.values())
    assert len(train) > 10 and len(heldout) >= len(train) // 15 and not set(heldout) & set(train) - {""}
    for split, whole in (("train", train), ("heldout", heldout)):
        for start in (0, 1, 3, 7, len(whole) - 1, len(whole)):
            assert list(corpora[split].documents(start)) == whole[start:]
    with pytest.raises(ValueError, match=r"no split 'test'; .*known: train, heldout"):
        CORPORA.build(made, "test")


def test_links_that_lead_back_are_left_out_of_a_pattern_however_many_there_are(tmp_path, capsys):
    for name in ("a", "b"):  # glob would follow both in turn, 2 ** 40 times
        (files(tmp_path / "text", count=4) / name).symlink_to(".")
    for place in (tmp_path / "text", tmp_path / "text" / "**" / "*.txt", tmp_path / "t*" / "**" / "*.txt"):
        assert len(read(corpus("files", path=str(place)))) == 4
    assert "passed over are links to folders that are listed already (2: a, …)" in capsys.readouterr().err


def test_every_corpus_comes_back_from_its_config_and_knows_itself_again(made):
    tree = {"name": CORPORA.name_of(made), **config.dump(made)}
    again = config.build(CORPORA.config_class(tree["name"]), {k: v for k, v in tree.items() if k != "name"})
    assert CORPORA.build(again, "train").fingerprint == CORPORA.build(made, "train").fingerprint


@pytest.mark.parametrize("every, first", [(2, None), (3, None), (10, None), (4, 1), (4, 7), (4, 12), (4, 100)])
def test_every_nth_of_the_first_documents_is_held_out_and_the_others_are_trained_on(tmp_path, every, first):
    path = str(write_lines(tmp_path / "a.jsonl", [str(number) for number in range(35)]))
    section = corpus("jsonl", path=path, heldout_every=every, first=first)
    kept = [str(number) for number in range(35)][:first]
    assert read(section, "heldout") == kept[every - 1 :: every]
    train = [text for number, text in enumerate(kept) if number % every != every - 1]
    for start in range(len(train) + 1):
        assert read(section, start=start) == train[start:]


def test_what_is_held_out_is_stated_once(tmp_path):
    path = str(write_lines(tmp_path / "a.jsonl", ["text"]))
    with pytest.raises(ConfigError, match=r"^heldout is missing; name held-out text, or set heldout_every"):
        read(corpus("jsonl", path=path), "heldout")
    with pytest.raises(ConfigError, match=r"^heldout_every=5 and heldout both say"):
        corpus("jsonl", path=path, heldout=path, heldout_every=5)
    with pytest.raises(ConfigError, match=r"^heldout_every=1 must be at least 2"):
        corpus("jsonl", path=path, heldout_every=1)
    with pytest.raises(ConfigError, match=r"^heldout=validation is trained on; name another split, or set"):
        corpus("huggingface", id="some/set", train="validation", heldout="validation")


@pytest.mark.parametrize("name, suffix", [("files", "txt"), ("jsonl", "jsonl")])
def test_a_file_of_both_splits_is_refused_by_whatever_name(tmp_path, name, suffix):
    path = write_lines(tmp_path / "all" / f"a.{suffix}", ["text"])
    (tmp_path / "link").symlink_to(path)
    for heldout, split in ((path, "train"), (path.parent, "heldout"), (tmp_path / "link", "train")):
        section = corpus(name, path=str(path.parent), heldout=str(heldout))
        with pytest.raises(ConfigError, match=r"^heldout=.* names .*/all/a\..*, which path=.*all names too; name text"):
            CORPORA.build(section, split)


# --------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    "pattern, named",
    [
        ("**/en/**/*.txt", ["a/b/en/c/4", "a/en/2", "a/en/c/3", "en/1", "text/en/5"]),
        ("**/en/**", ["a/b/en/c/4", "a/en/2", "a/en/c/3", "en/1", "text/en/5"]),
        ("**/en/*.txt", ["a/en/2", "en/1", "text/en/5"]),
        ("**/text/**", ["text/en/5", "text/6"]),  # not what is called so above the place
        ("*/**/c/*", ["a/b/en/c/4", "a/en/c/3"]),
        ("**/[ab]/*/**/[1-3].txt", ["a/en/2", "a/en/c/3"]),
    ],
)
def test_any_number_of_folders_may_stand_wherever_a_pattern_has_two_stars(tmp_path, pattern, named):
    for name in ("en/1", "a/en/2", "a/en/c/3", "a/b/en/c/4", "text/en/5", "text/6"):
        path = tmp_path / "text" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    assert read(corpus("files", path=str(tmp_path / "text" / pattern))) == sorted(named)


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
    (tmp_path / "3.jsonl").write_bytes(rb'{"text": "\ud83e\udd8a"}')  # a pair of surrogates is one character
    section = corpus("jsonl", path=str(tmp_path))
    assert [read(section, start=start) for start in (0, 9, 10, 24)] == [[*documents[i:], "🦊"] for i in (0, 9, 10, 24)]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"text": "cut', r"line 3, is truncated, or still being written; mend or remove it"),
        (b'{"text": "first", "text": "second"}', r"line 3, has the key text twice; mend or remove it"),
        (b'{"body": "x"}', r"line 3, has no field 'text'; known: body"),
        (b'{"texts": "x"}', r"line 3, has no field 'text'; did you mean 'texts'\?"),
        (b'{"text": 3}', r"line 3, has no text in the field 'text' but int"),
        (b'{"text": null}', r"line 3, has null in the field 'text'; mend or remove it, or set .*skip_null=true"),
        (b'{"n": ' + b"9" * 100_000 + b"}", r"line 3, has the number 9+… .*, which is too long; mend"),
        (b'{"text": "a"}\r{"text": "b"}', r"line 3, has line ends of CR alone; convert them"),
        (
            b'{"text": "a\0"}',
            r"line 3, has a zero byte at position 39, which is in no text; convert it if it is UTF-16",
        ),
        (b'{"text": "' + b"a" * 1001 + b'"}', r"line 3, has more than 0 MB; each line is one document: cut it"),
        (b'["x"]', r"line 3, is not a JSON object but list; convert it, for instance with jq -c"),
        (b"[", r"line 3, is not JSON by itself: the file is one JSON document, wanted one object per line; convert it"),
        (b"[" * 100_000, r"line 3, has more than 100 levels .*; mend"),
        (b'{"text": "\xff"}', r"line 3, is not UTF-8: byte 0xff at position 38; convert it"),
        (rb'{"text": "a\ud83e"}', r"line 3, holds half a character \(the lone surrogate U\+D83E\) at letter 1"),
    ],
)
def test_a_line_that_is_not_a_document_is_named(tmp_path, line, problem, monkeypatch):
    if b"aaa" in line:
        monkeypatch.setattr(reading, "LONGEST_LINE", 1000)
    path = write_lines(tmp_path / "bad.jsonl", ["a", "b"])
    assert path.stat().st_size == 28
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(ValueError, match=rf"bad.jsonl, {problem}") as error:
        read(corpus("jsonl", path=str(path)))
    assert len(str(error.value)) < 300


def zstd(content):
    return pytest.importorskip("pyarrow").compress(content, codec="zstd", asbytes=True)


PACKERS = {"gz": gzip.compress, "zst": zstd, "xz": lzma.compress, "bz2": bz2.compress}


@pytest.mark.parametrize("ending", PACKERS)
def test_packed_files_are_known_by_their_first_bytes_and_damaged_ones_are_named(tmp_path, ending):
    packed = PACKERS[ending](write_lines(tmp_path / "plain", texts(25)).read_bytes())
    for name in (f"a.jsonl.{ending}", "a.jsonl"):
        path = tmp_path / "set" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(packed)
        assert read(corpus("jsonl", path=str(tmp_path / "set"))) == texts(25)
        path.unlink()
    (tmp_path / "plain").rename(tmp_path / f"plain.jsonl.{ending}")
    assert read(corpus("jsonl", path=str(tmp_path / f"plain.jsonl.{ending}"))) == texts(25)
    path.write_bytes(packed[:-10])
    with pytest.raises(ValueError, match=rf"{name} cannot be unpacked \(.*\); restore it"):
        read(corpus("jsonl", path=str(path)))
    text = tmp_path / "text.txt"
    text.write_bytes(PACKERS[ending](b"a text"))
    assert read(corpus("files", path=str(text))) == ["a text"]


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_text_that_is_too_large_to_be_one_document_is_refused_before_it_is_in_memory(tmp_path, monkeypatch, pack):
    monkeypatch.setattr(reading, "LARGEST_TEXT", 1000)
    monkeypatch.setattr(reading, "LONGEST_LINE", 1000)
    (tmp_path / "a.txt").write_bytes(pack(b"a" * 1001))
    with pytest.raises(ValueError, match=r"a.txt has more than 0 MB, and is read as one document; cut it into"):
        read(corpus("files", path=str(tmp_path)))


@pytest.mark.parametrize(
    "content, problem",
    [
        ("naïve".encode("latin-1"), r"is not UTF-8: byte 0xef at position 2; convert it"),
        ("naïve".encode("utf-16"), r"is UTF-16; convert it, for instance with iconv -f UTF-16 -t UTF-8"),
        (
            "naive".encode("utf-16-be"),
            r"has a zero byte at position 0, which is in no text; convert it if it is UTF-16",
        ),
        (b"PK\x03\x04\x14", "is a zip archive; unpack it"),
        (b"PAR1\x15\x04", "is of Parquet; name its folder in tokenize.corpus=.name: huggingface, id: "),
    ],
)
def test_a_file_that_is_not_utf8_is_named_with_the_remedy(tmp_path, content, problem):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a.txt {problem}"):
        read(corpus("files", path=str(tmp_path)))
    with pytest.raises(ValueError, match=rf"a.txt, line 1, {problem}"):
        read(corpus("jsonl", path=str(tmp_path / "a.txt")))


# --------------------------------------------------------------------------------------------- what is left out


@pytest.mark.usefixtures("cached")
@pytest.mark.parametrize("name", ["files", "jsonl", "huggingface"])
def test_documents_without_text_are_left_out_on_request_and_counted_wherever_one_begins(tmp_path, name):
    texts = ["", None, "a", "", "b", None, "c", None]
    source = {"path": str(tmp_path / "set")}
    if name == "files":
        (tmp_path / "set").mkdir()
        for number, text in enumerate(texts):
            (tmp_path / "set" / f"{number}.txt").write_text(text or "")
    elif name == "jsonl":
        lines = [json.dumps({"text": text} if number != 1 else {}) for number, text in enumerate(texts)]
        source["path"] += ".jsonl"
        (tmp_path / "set.jsonl").write_text("\n".join(lines))
    else:
        source = {"id": str(huggingface(tmp_path / "set", texts))}
    if name != "files":
        with pytest.raises(
            ValueError, match=r"(line 2,|row 1) has .* 'text'; .*mend or remove it, or set tokenize.corpus"
        ):
            read(corpus(name, **source))
    whole = CORPORA.build(corpus(name, skip_null=True, **source), "train")
    rows = [Row(text or None) for text in texts]
    assert [list(whole.rows(start)) for start in range(4)] == [rows, rows[3:], rows[5:], rows[7:]]
    parts = [CORPORA.build(corpus(name, skip_null=True, heldout_every=3, **source), s) for s in ("train", "heldout")]
    assert [len(list(part.rows())) for part in parts] == [6, 2]  # all 8 of the source
    assert [list(part.documents()) for part in parts] == [["b", "c"], ["a"]]


@pytest.mark.parametrize("name", ["files", "jsonl"])
def test_a_byte_order_mark_is_no_text_and_counted_where_it_is_of_one(tmp_path, name):
    content = b'{"text": "a"}' if name == "jsonl" else b"a"
    path = tmp_path / f"1.{'jsonl' if name == 'jsonl' else 'txt'}"
    path.write_bytes(b"\xef\xbb\xbf" + content)
    assert list(CORPORA.build(corpus(name, path=str(path)), "train").rows()) == [Row("a", marked=name == "files")]


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
    with pytest.raises(ConfigError, match=r"^field=text is not a column of .*; .*known: content"):
        read(corpus("huggingface", id=place, streaming=streaming))
    with pytest.raises(ConfigError, match=r"^heldout=test is no split of .*; known: train$"):
        read(corpus("huggingface", id=place, heldout="test", streaming=streaming), "heldout")


@pytest.mark.usefixtures("cached")
def test_a_dataset_packed_by_zstd_is_read_or_what_it_takes_is_said(tmp_path, monkeypatch):
    lines = write_lines(tmp_path / "plain", ["a", "b"]).read_bytes()
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl.zst").write_bytes(zstd(lines))
    section = corpus("huggingface", id=str(tmp_path / "set"))
    if importlib.util.find_spec("zstandard"):
        assert read(section) == ["a", "b"]
    else:
        with pytest.raises(ConfigError, match=r"^id=.* zstd not supported; pip install '?zstandard"):
            read(section)


@pytest.mark.usefixtures("cached")
def test_a_row_without_text_is_named(tmp_path):
    place = str(huggingface(tmp_path / "set", ["a", None, "b"]))
    with pytest.raises(ValueError, match=r"set, train, row 1 has null in the column 'text'; mend or remove it, or set"):
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


def test_python_docs_are_two_megabytes_whose_names_decide_the_split_and_no_paragraph_is_in_both():
    splits = {split: CORPORA.build(corpus("python_docs"), split).texts for split in ("train", "heldout")}
    sizes = [sum(len(text.encode()) for text in texts.values()) for texts in splits.values()]
    assert 1e6 < sum(sizes) < 5e6 and 0.05 < sizes[1] / sum(sizes) < 0.2
    together = splits["train"] | splits["heldout"]
    assert {name for name in together if is_held_out(name)} == set(splits["heldout"])
    assert "topic assert" in together
    assert together["module textwrap"].startswith("textwrap\n\nText wrapping and filling")
    train, heldout = (
        [" ".join(each.split()) for text in texts.values() for each in text.split("\n\n")] for texts in splits.values()
    )
    assert len(heldout) > 1000
    assert not set(train) & {each for each in heldout if len(each) >= 60}
