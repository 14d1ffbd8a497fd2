"""JSON files that are read back: one reader, with limits and a schema, for what we wrote and for what others may have.

A schema is a dataclass or a TypedDict, read by `dit_moe.config.convert`; what a file says beyond it is let be. All that
can be wrong with a file is one ValueError: the file, the dotted key, the value, what was wanted, and a remedy.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from dit_moe.config import ConfigError, Matching, Tree, Within, convert, shown
from dit_moe.files import write_atomically

T = TypeVar("T")

MOST_BYTES = 2**26  # of a file: JSON takes up to thirty times as much memory
MOST_LEVELS = 100  # of objects and lists inside one another: all that goes through them calls itself for each
MOST_DIGITS = 19  # of a whole number: those of 64 bits have no more

# Types of a schema.
Count = Annotated[int, Within(0, 2**53)]
Size = Annotated[int, Within(1, 2**53)]
NonNegative = Annotated[float, Within(0, float("inf"))]
Sha256 = Annotated[str, Matching("[0-9a-f]{64}", "a sha256: 64 digits from 0 to f")]
FileName = Annotated[str, Matching(r"(?!\.\.?$)[^/\x00]{1,255}", "the name of a file, without a folder")]
Name = Annotated[str, Matching(r"[^\x00]{0,10000}", "a text of at most 10,000 characters")]

_SEAL, _END = ',\n "sha256": "', "\n}"  # as json.dumps(…, indent=1) has them


# --------------------------------------------------------------------------------------------------------------- texts


def parse(text: str | bytes, *, any_number: bool = False, any_text: bool = False) -> Any:
    """What a JSON text says, in UTF-8 with or without a byte-order mark. ValueError says what is wrong with it.

    Refused are NaN, infinities and whole numbers beyond 64 bits unless `any_number`, lone surrogates unless
    `any_text`, keys that stand twice, and more than `MOST_LEVELS` levels.
    """
    strict: dict[str, Any] = {"parse_constant": _finite, "parse_float": _finite, "parse_int": _whole}
    numbers = {"parse_int": _any_whole} if any_number else strict
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        text = text.removeprefix("\ufeff")
        found = json.loads(text, object_pairs_hook=_without_doubles, **numbers)
    except UnicodeDecodeError:
        raise ValueError("is not in UTF-8") from None
    except json.JSONDecodeError as error:
        if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated"):
            raise ValueError("is empty" if not text.strip() else "is truncated, or still being written") from None
        raise ValueError(f"is not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    if text.count("{") + text.count("[") > MOST_LEVELS and _is_deep(found):
        raise ValueError(_TOO_DEEP)
    if not any_text and "\\u" in text and not _is_unicode(found):
        raise ValueError("has a lone surrogate (\\ud800 to \\udfff), which is no character")
    return found


_TOO_DEEP = f"has more than {MOST_LEVELS} levels of objects and lists inside one another"


def _without_doubles(pairs: list[tuple[str, Any]]) -> Tree:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for i, key in enumerate(keys) if key in keys[:i])
        raise ValueError(f"has the key {shown(twice)} twice")
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not abs(number) < float("inf"):
        raise ValueError(f"has the number {shown(text)}, which is not finite")
    return number


def _whole(text: str) -> int:
    if len(text.removeprefix("-")) > MOST_DIGITS:
        raise ValueError(f"has the number {shown(text)}, which is beyond 64 bits")
    return int(text)


def _any_whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:  # Python reads no more than some thousand digits
        raise ValueError(f"has the number {shown(text)}, which is too long") from None


def _is_deep(found: Any) -> bool:
    level = [found]
    for _ in range(MOST_LEVELS + 1):
        level = [
            item
            for each in level
            if isinstance(each, dict | list)
            for item in (each.values() if isinstance(each, dict) else each)
        ]
    return bool(level)


def _is_unicode(found: Any) -> bool:
    try:
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


# --------------------------------------------------------------------------------------------------------------- files


def load(path: Path, remedy: str, *, any_number: bool = False) -> Any:
    """What a JSON file says, whatever it is. ValueError for one that `parse` refuses, or that is too large or no file.

    Args:
        remedy: what to do about it, for instance "encode anew".
        any_number: as in `parse`.
    """
    try:
        return parse(_content(path), any_number=any_number)
    except ValueError as error:
        raise ValueError(f"{path} {error}; {remedy}") from None


def read(path: Path, schema: type[T], remedy: str, *, any_number: bool = False) -> T:
    """What a JSON file says, as `schema` has it. ValueError as of `load`, or for what the schema does not allow."""
    return checked(load(path, remedy, any_number=any_number), schema, str(path), remedy)


def read_if_good(path: Path, schema: type[T]) -> T | None:
    """As `read`; None if there is no such file, or a damaged one, where it is to be made anew then.

    OSError if it cannot be read.
    """
    try:
        return read(path, schema, "it is made anew")
    except (FileNotFoundError, ValueError):
        return None


def checked(found: Any, schema: type[T], source: str, remedy: str) -> T:
    """What was read of `source`, as `schema` has it. ValueError for what that does not allow."""
    if not isinstance(found, dict):
        raise ValueError(f"{source} holds no JSON object; {remedy}")
    if dataclasses.is_dataclass(schema):
        known = {field.name for field in dataclasses.fields(schema)}
        found = {key: value for key, value in found.items() if key in known}
    try:
        return convert(schema, found)
    except ConfigError as error:
        problem = error.problem.removesuffix("; add it to the config")
        raise ValueError(f"{source}: {error.path}{problem}; {remedy}") from None


def read_object(path: Path) -> Tree:
    """The JSON object that a file of unknown origin holds; empty if there is none. OSError if it cannot be read."""
    try:
        found = parse(_content(path))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _content(path: Path) -> bytes:
    """All of a file. ValueError if it is too large, or something else than a file."""
    facts = path.stat()
    if not stat.S_ISREG(facts.st_mode):
        raise ValueError("is a folder" if stat.S_ISDIR(facts.st_mode) else "is not a regular file")
    if facts.st_size > MOST_BYTES:
        raise ValueError(f"has {facts.st_size:,} bytes, where at most {MOST_BYTES:,} are read")
    with path.open("rb") as file:
        return file.read(MOST_BYTES)


# -------------------------------------------------------------------------------------------------------------- sealed


def write_sealed(path: Path, body: Mapping[str, Any]) -> None:
    """Put a JSON object in place; its last entry is the hash of its text without that entry."""
    write_atomically(path, _sealed(json.dumps(body, indent=1)))


def read_sealed(path: Path, schema: type[T], version: int, remedy: str) -> T:
    """The object that `write_sealed` wrote, with an entry `format` that is `version`, as `schema` has it.

    Raises ValueError if it is damaged or was changed, for which there is a copy or a `remedy`, or of another format.
    """
    remedy = f"restore it from a copy, or {remedy}"
    body = load(path, remedy)
    require_format(body, version, path, remedy)
    text = path.read_bytes().decode("utf-8")
    if text != _sealed(text.rpartition(_SEAL)[0] + _END):
        raise ValueError(f"{path} was changed after it was written; {remedy}")
    return checked(body, schema, str(path), remedy)


def require_format(body: Any, version: int, path: Path, remedy: str) -> None:
    """ValueError unless what was read of a file is an object with an entry `format` that is `version`."""
    found = body.get("format") if isinstance(body, dict) else None
    if type(found) is not int:
        raise ValueError(f"{path} is no file of dit-moe, or damaged: it has no `format`; {remedy}")
    if found != version:
        raise ValueError(f"{path} has format {found}, this version reads {version}; use a dit_moe to match")


def _sealed(text: str) -> str:
    """The text of a JSON object with a last entry, the hash of that text."""
    return f'{text.removesuffix(_END)}{_SEAL}{hashlib.sha256(text.encode()).hexdigest()}"{_END}\n'
