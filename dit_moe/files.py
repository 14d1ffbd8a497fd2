"""Files that are in place as a whole or not at all, in folders that can be written."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

_SEAL, _END = ',\n "sha256": "', "\n}"  # as json.dumps(…, indent=1) has them


def write_atomically(path: Path, content: str | bytes | Callable[[BinaryIO], object]) -> None:
    """Put text, bytes, or what a function writes into the open file, in place of whatever `path` was.

    Raises OSError if the disk refuses; the old file is then as it was.
    """
    with atomic_file(path) as file:
        if callable(content):
            content(file)
        else:
            file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of `path` when the block ends, and leaves no trace if it fails."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        if error.errno and error.filename is None:  # a full disk does not say which file was too much for it
            raise type(error)(error.errno, error.strerror, str(path)) from None
        raise
    finally:
        partial.unlink(missing_ok=True)


def require_writable(folder: Path) -> None:
    """Make `folder` if need be; ValueError if that, or writing into it, is impossible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{folder} cannot be written ({error.strerror}); choose another folder") from None


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_sealed(path: Path, body: Mapping[str, Any]) -> None:
    """Put a JSON object in place; its last entry is the hash of its text without that entry."""
    write_atomically(path, _sealed(json.dumps(body, indent=1)))


def read_sealed(path: Path, version: int, remedy: str) -> dict[str, Any]:
    """The object that `write_sealed` wrote, with an entry `format` that is `version`.

    Raises ValueError if it is damaged or was changed, for which there is a copy or a `remedy`, or of another format.
    """
    try:
        text = path.read_bytes().decode()
        body = json.loads(text)
        found = body["format"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is truncated or damaged; restore it from a copy, or {remedy}") from None
    if found != version:
        raise ValueError(f"{path} has format {found}, this version reads {version}; use a dit_moe to match")
    if text != _sealed(text.rpartition(_SEAL)[0] + _END):
        raise ValueError(f"{path} was changed after it was written; restore it from a copy, or {remedy}")
    return body


def require_size(path: Path, size: int, source: str, remedy: str) -> None:
    """ValueError unless the file has as many bytes as `source` says."""
    found = path.stat().st_size if path.is_file() else None
    if found != size:
        problem = "is missing" if found is None else f"has {found} bytes where {source} says {size}"
        raise ValueError(f"{path} {problem}; restore it from a copy, or {remedy}")


def sha256_of(path: Path) -> str:
    """The hash of a file, which is read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sealed(text: str) -> str:
    """The text of a JSON object with a last entry, the hash of that text."""
    return f'{text.removesuffix(_END)}{_SEAL}{hashlib.sha256(text.encode()).hexdigest()}"{_END}\n'
