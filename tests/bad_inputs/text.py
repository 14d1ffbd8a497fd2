"""Text that is none."""

from __future__ import annotations

import gzip

from tests.bad_inputs.kinds import Case, Place, kind
from tests.bad_inputs.values import nested


@kind
def text(place: Place) -> Case:
    """A file of JSON lines, one of which is wrong."""
    lines = (place.good / "text.jsonl").read_bytes().splitlines()
    what, bad = place.pick(
        ("no JSON", b"banana"),
        ("no text", b'{"tekst": "a"}'),
        ("a number", b'{"text": 1}'),
        ("null", b'{"text": null}'),
        ("a list", b'["a"]'),
        ("a nested line", b'{"text": ' + nested(100_000).encode() + b"}"),
        ("a number of 100 000 digits", b'{"text": "a", "n": ' + b"1" * 100_000 + b"}"),
        ("a lone surrogate", b'{"text": "\\ud800"}'),
        ("no UTF-8", b'{"text": "\xff\xfe"}'),
        ("half a line", b'{"text": "a'),
        ("NUL", b"\0" * 1000),
        ("noise", place.random.randbytes(200).replace(b"\n", b"")),
    )
    lines.insert(place.random.randrange(len(lines)), bad)
    data = b"\n".join(lines) + b"\n"
    what, data, name = place.pick(
        (what, data, "x.jsonl"),
        (what, data, "x.jsonl"),
        (what, data, "x.jsonl"),
        ("gzip cut", gzip.compress(data)[:-20], "x.jsonl.gz"),
        ("UTF-16", data.decode(errors="replace").encode("utf-16"), "x.jsonl"),
        ("empty", b"", "x.jsonl"),
        ("missing", None, "x.jsonl"),
        ("a pattern", None, "x-{0..99999999999}.jsonl"),
        ("/dev/zero", None, "/dev/zero"),
    )
    if data is not None:
        (place.folder / name).write_bytes(data)
    place.copy("lm.yaml")
    corpus = f"tokenize.corpus={{name: jsonl, path: '{name}', heldout_every: 5}}"
    return Case(f"text: {what}", ["tokenize", "lm.yaml", corpus, "data.path=new/a", "data.heldout=new/b"])
