"""Absurd values, and trees and bytes with one thing in them spoilt."""

from __future__ import annotations

import copy
import math
from random import Random
from typing import Any

ABSURD: tuple[Any, ...] = (
    None,
    True,
    "",
    "banana",
    "../../etc/passwd",
    "[red]",
    "a\nb",
    "${oc.env:HOME}",
    "\x1b[31m",
    "𝕏" * 2000,
    -1,
    0,
    0.5,
    1e300,
    10**30,
    10**15,
    math.nan,
    math.inf,
    -math.inf,
    [],
    {},
    [1, 2, 3],
    [[[[]]]],
    {"name": "banana"},
    {"": None},
    ["a"] * 10_000,
    list(range(5000)),
)


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of everything in a tree of dicts and lists, the branches too."""
    found = [path] if path else []
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(items)[:20]:
        found += leaves(value, (*path, key))
    return found


def spoil(tree: Any, random: Random) -> tuple[Any, str]:
    """A copy of a tree with one entry gone or absurd, and what that is in words."""
    tree = copy.deepcopy(tree)
    *above, last = random.choice(leaves(tree))
    branch = tree
    for key in above:
        branch = branch[key]
    name = ".".join(map(str, (*above, last)))
    if random.random() < 0.15:
        del branch[last]
        return tree, f"{name} gone"
    branch[last] = other(branch[last], random)
    return tree, f"{name}={str(branch[last])[:40]!r}"


def other(value: Any, random: Random) -> Any:
    """An absurd value that is not like `value`."""
    while True:
        chosen = random.choice(ABSURD)
        if type(chosen) is not type(value) or chosen != value:
            return copy.deepcopy(chosen)


def nested(depth: int, opening: str = "[", closing: str = "]") -> str:
    return opening * depth + closing * depth


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
PAGE = b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head><body>Not Found</body></html>\n"


def spoil_bytes(data: bytes, random: Random) -> tuple[bytes, str]:
    """A file that is not what it was, in a way that cannot go unnoticed, and what was done in words."""
    way = random.choice(("empty", "half", "head", "zeros", "pointer", "page", "noise"))
    cut = random.randrange(1, max(2, len(data) // 2))
    made = {
        "empty": b"",
        "half": data[:cut],
        "head": random.randbytes(16) + data[16:],
        "zeros": bytes(len(data)),
        "pointer": POINTER,
        "page": PAGE,
        "noise": random.randbytes(len(data)),
    }
    return made[way], f"{way} of {len(data)} bytes"
