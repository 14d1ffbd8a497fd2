import os
from dataclasses import dataclass
from typing import Annotated, NotRequired, TypedDict

import pytest

from dit_moe import json_files
from dit_moe.config import Within
from dit_moe.json_files import Count, FileName, Sha256, load, parse, read, read_object, read_sealed, write_sealed

REMEDY = "make it anew"


class Body(TypedDict):
    name: str
    shards: NotRequired[list[dict[str, str]]]


def test_a_sealed_file_comes_back_and_no_change_to_it_is_missed(tmp_path):
    path, body = tmp_path / "manifest.json", {"format": 1, "name": "grün", "shards": [{"file": "a"}]}
    write_sealed(path, body)
    assert read_sealed(path, Body, 1, REMEDY).items() >= body.items()
    whole = path.read_bytes()
    for i in range(len(whole) - 1):  # the last is a line's end
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
        with pytest.raises(ValueError, match=r"manifest.json (was|has|is) .*; (restore|use)"):
            read_sealed(path, Body, 1, REMEDY)
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"has format 1, this version reads 2; use a dit_moe to match"):
        read_sealed(path, Body, 2, REMEDY)


UNREADABLE = {
    "": "is empty",
    '{"a": 1': "is truncated, or still being written",
    '{"a": "b': "is truncated, or still being written",
    "{'a': 1}": r"is not valid JSON: line 1, column 2: Expecting property name",
    "[" * 10**5 + "]" * 10**5: "has more than 100 levels of objects and lists inside one another",
    '{"a":' * 101 + "1" + "}" * 101: "has more than 100 levels of objects and lists inside one another",
    '{"a": NaN}': "has the number NaN, which is not finite",
    '{"a": 1e999}': "has the number 1e999, which is not finite",
    '{"a": 1' + "0" * 10**5 + "}": r"has the number 10{79}… \(100,001 characters\), which is beyond 64 bits",
    '{"a": 1, "a": 2}': "has the key a twice",
    '{"a": "\\ud800"}': "has a lone surrogate .*, which is no character",
    b'{"a": "\xff"}': "is not in UTF-8",
}


@pytest.mark.parametrize("content", UNREADABLE, ids=lambda content: str(content[:20]))
def test_a_file_that_is_no_json_of_ours_is_refused_in_one_sentence(tmp_path, content):
    path = tmp_path / "state.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=rf"^\S*state.json {UNREADABLE[content]}.*; make it anew$"):
        load(path, REMEDY)
    assert read_object(path) == {}


def test_a_file_that_is_too_large_or_no_file_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(json_files, "MOST_BYTES", 9)
    (tmp_path / "large").write_text('{"a": 1000}')
    os.mkfifo(tmp_path / "pipe")
    refused = {"large": "has 11 bytes, where at most 9", "pipe": "is not a regular file", ".": "is a folder"}
    for name, problem in refused.items():
        with pytest.raises(ValueError, match=f"{problem}.*; make it anew"):
            load(tmp_path / name, REMEDY)
        assert read_object(tmp_path / name) == {}
    assert read_object(tmp_path / "missing") == {}


def test_a_byte_order_mark_is_passed_over_and_others_numbers_are_read_where_they_may_be():
    assert parse(b'\xef\xbb\xbf{"a": [{}]}') == {"a": [{}]}
    assert parse('{"a": "\\ud83d\\ude00"}') == {"a": "😀"}
    assert (
        parse("[Infinity, 1e999, 123456789012345678901234567890]", any_number=True)[2] == 123456789012345678901234567890
    )
    with pytest.raises(ValueError, match="is too long"):
        parse("1" * 10**5, any_number=True)


@dataclass(frozen=True)
class Part:
    file: FileName
    sha256: Sha256
    count: Count


class Record(TypedDict):
    parts: tuple[Part, ...]
    names: dict[str, list[float]]
    pair: tuple[int, str]
    mean: Annotated[float, Within(0, 1)] | None
    later: NotRequired[bool]


PART = {"file": "a", "sha256": "0" * 64, "count": 1}
GOOD = {"parts": [PART], "names": {"a": [1, 2.5]}, "pair": [1, "b"], "mean": 0.5}
FORGED = [
    ([], "holds no JSON object"),
    ({"parts": [PART], "names": {}, "pair": [1, "b"]}, "mean is missing"),
    (GOOD | {"parts": PART}, r"parts=.* must be a list"),
    (GOOD | {"parts": [7]}, r"parts\[0\]=7 must be a section of `key: value` lines"),
    (GOOD | {"parts": [PART | {"count": -1}]}, r"parts\[0\].count=-1 must be from 0 to 9007199254740992"),
    (GOOD | {"parts": [PART | {"count": True}]}, r"parts\[0\].count=True must be a whole number"),
    (GOOD | {"parts": [PART | {"file": "../a"}]}, r"parts\[0\].file=../a must be the name of a file, without a folder"),
    (GOOD | {"parts": [PART | {"file": ".."}]}, r"parts\[0\].file=.. must be the name of a file"),
    (
        GOOD | {"parts": [PART | {"sha256": "x" * 10**6}]},
        r"parts\[0\].sha256=x{80}… .* must be a sha256",
    ),
    (GOOD | {"names": []}, r"names=\[\] must be an object"),
    (GOOD | {"names": {"a": ["b"]}}, r"names.a\[0\]=b must be a number, not a text"),
    (GOOD | {"pair": [1]}, r"pair=\[1\] must have 2 entries"),
    (GOOD | {"mean": 2}, "mean=2.0 must be from 0 to 1"),
    (GOOD | {"later": "yes"}, "later=yes must be true or false, not a text"),
]


@pytest.mark.parametrize(("body", "problem"), FORGED, ids=lambda each: str(each)[:20])
def test_what_a_schema_does_not_allow_is_named_by_its_key_and_value(tmp_path, body, problem):
    path = tmp_path / "record.json"
    path.write_text(json_files.json.dumps(body))
    with pytest.raises(ValueError, match=rf"record.json:? {problem}.*; make it anew$") as error:
        read(path, Record, REMEDY)
    assert len(str(error.value)) < 400


def test_a_schema_makes_dataclasses_and_tuples_and_keeps_what_it_does_not_name(tmp_path):
    path = tmp_path / "record.json"
    path.write_text(json_files.json.dumps(GOOD | {"newer": 1}))
    found = read(path, Record, REMEDY)
    assert found == GOOD | {"parts": (Part("a", "0" * 64, 1),), "pair": (1, "b"), "newer": 1}
    path.write_text(json_files.json.dumps(PART | {"newer": 1}))
    assert read(path, Part, REMEDY) == Part("a", "0" * 64, 1)
