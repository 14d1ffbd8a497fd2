"""Files and folders that are in place as a whole or not at all, in folders that can be written.

What is being written lies beside its place under a private name and is locked: nothing of a user's is ever taken for
it, and what a killed process left is known by its lock being free. The next writer of the same output removes it.
"""

from __future__ import annotations

import difflib
import fcntl
import hashlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from errno import EEXIST, ENOTEMPTY
from glob import escape
from pathlib import Path
from typing import BinaryIO

from dit_moe.formatting import first_few

_PRIVATE = ".dit_moe-partial"  # how the names of unfinished files and folders end
NEAREST = 3  # names in a message
_LONGEST = 200  # bytes of an output's name in a private one, as a file system takes 255 in all


def write_atomically(path: Path, content: str | bytes) -> None:
    """Put `content` in place of whatever `path` was. OSError if the disk refuses; the old file is then as it was."""
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of `path` when the block ends, and leaves no trace if it fails.

    ValueError if `path` is a device, a pipe or a socket.
    """
    require_regular(path)
    private = None
    try:
        private, descriptor = _make_private(path)
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            private.replace(path)
    except OSError as error:
        if error.errno and error.filename in (None, str(private)):  # a full disk does not say what was too much for it
            raise type(error)(error.errno, error.strerror, str(path)) from None
        raise
    finally:
        if private is not None:
            private.unlink(missing_ok=True)


def require_regular(path: Path) -> None:
    """ValueError for what is neither a file nor a folder, also behind a link.

    A file in place of a device would take it from the whole machine, and writing to a pipe waits for a reader.
    """
    if os.path.lexists(path) and not (path.is_file() or path.is_dir()):
        problem = "is a pipe, a device or a link to nothing, and a file is to be written"
        raise ValueError(f"{path} {problem}; move it away")
    if path.is_symlink() and path.parent == Path("/dev"):  # /dev/stdout may lead to a file, and is the whole machine's
        raise ValueError(f"{path} is a link of the system, and a file is to be written; name another place")


def everything(folder: Path) -> Sequence[str]:
    """What is foreign in a folder of which nothing may be replaced."""
    return sorted(os.listdir(folder))


@contextmanager
def atomic_folder(folder: Path, foreign: Callable[[Path], Sequence[str]] = everything) -> Iterator[Path]:
    """A folder to fill, which takes the place of `folder` when the block ends, and leaves no trace if it fails.

    Args:
        folder: what is to be written; if it is a link, what that points to.
        foreign: called with an existing folder, names what in it was not written by us.

    Raises ValueError, before the block and after it, if anything foreign would be lost.
    """
    folder = folder.resolve() if folder.is_symlink() else folder
    require_replaceable(folder, foreign)
    private, descriptor = _make_private(folder, as_folder=True)
    try:
        yield private
        made = [private, *private.rglob("*")]
        for path in made:
            give_usual_mode(path)
        with ThreadPoolExecutor() as pool:
            list(pool.map(sync, made))
        _put_in_place(private, folder, foreign)
    finally:
        shutil.rmtree(private, ignore_errors=True)
        os.close(descriptor)


def require_replaceable(folder: Path, foreign: Callable[[Path], Sequence[str]] = everything) -> None:
    """ValueError if `folder` is no folder or the current one, or if anything in it is `foreign`."""
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is there already and is no folder; move it away, or choose another name")
    if folder.samefile(os.curdir):  # a shell would be left in what was there before
        raise ValueError(f"{folder} is the current folder, whose place a new one would take; name a folder in it")
    if found := foreign(folder):
        problem = f"{folder} is there already and holds {first_few(found)}, which would be lost"
        raise ValueError(f"{problem}; move it away, or choose another folder")


def _put_in_place(private: Path, folder: Path, foreign: Callable[[Path], Sequence[str]]) -> None:
    """Rename the folder `private` to `folder`; what that was goes, unless anything in it is foreign."""
    while True:
        try:
            private.rename(folder)  # also over an empty folder
            return
        except OSError as error:
            if error.errno not in (EEXIST, ENOTEMPTY):
                raise
        require_replaceable(folder, foreign)
        old = _private_name(folder)
        try:
            folder.rename(old)
        except FileNotFoundError:  # another process was faster, and will put its own in place
            continue
        try:
            private.rename(folder)
        except OSError as error:
            if error.errno not in (EEXIST, ENOTEMPTY):
                old.rename(folder)
                raise
        else:
            return
        finally:
            shutil.rmtree(old, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------ private names


def _private_name(path: Path) -> Path:
    return path.with_name(f"{_private_start(path)}{secrets.token_hex(4)}{_PRIVATE}")


def _private_start(path: Path) -> str:
    return f".{os.fsdecode(os.fsencode(path.name)[:_LONGEST])}."


def _make_private(path: Path, as_folder: bool = False) -> tuple[Path, int]:
    """Remove what killed writers of `path` left, and make an empty file or folder under a private name beside it.

    Returns its path and an open descriptor, whose lock says that the writer is alive.
    """
    for leftover in path.parent.glob(f"{escape(_private_start(path))}*{_PRIVATE}"):
        _remove_unlocked(leftover)
    while True:
        private = _private_name(path)
        try:
            if as_folder:
                private.mkdir()
            # A new file has the mode that the umask gives, which one of `tempfile` has not.
            flags = os.O_RDONLY if as_folder else os.O_WRONLY | os.O_CREAT | os.O_EXCL
            descriptor = os.open(private, flags, 0o666)
        except FileNotFoundError:
            if not path.parent.is_dir():
                raise
            continue
        with suppress(OSError):  # where there are no locks, leftovers stay
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if is_open_as(private, descriptor):
            return private, descriptor
        os.close(descriptor)  # taken for a leftover before it was locked


def _remove_unlocked(leftover: Path) -> None:
    """Remove a file or folder with a private name unless its writer is alive."""
    try:
        descriptor = os.open(leftover, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:  # gone by now
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
    except OSError:  # in use
        pass
    finally:
        os.close(descriptor)


def is_open_as(path: Path, descriptor: int) -> bool:
    """Whether the name `path` still is that of an open file."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


# ------------------------------------------------------------------------------------------- folders, sizes, hashes


def require_writable(folder: Path) -> None:
    """Make `folder` if need be; ValueError if that, or writing into it, is impossible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{folder} cannot be written ({error.strerror}); choose another folder") from None


def require_utf8(path: Path) -> None:
    """ValueError for a path that is not UTF-8, which safetensors does not open, though it writes there."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{path} is not UTF-8, and weights there cannot be read; rename it, or name another") from None


def require_own(folder: Path, names: Iterable[str], own: bool) -> None:
    """ValueError if `folder` holds any of `names`, which are to be written, unless what is there is our `own`.

    Also if `require_regular` refuses it.
    """
    for path in (folder / name for name in names):
        require_regular(path)
        if not own and os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir())):
            problem = f"{path} is there already, and nothing says that dit-moe wrote it"
            raise ValueError(f"{problem}; move it away, or name another folder")


def give_usual_mode(path: Path) -> None:
    """The mode that the umask gives to new files; some libraries make theirs readable by their owner alone."""
    if path.is_file() and not path.is_symlink():
        mask = os.umask(0o077)
        os.umask(mask)
        path.chmod(0o666 & ~mask)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_size(path: Path, size: int, source: str, remedy: str) -> None:
    """ValueError unless the file has as many bytes as `source` says."""
    if (problem := wrong_size(path, size, source)) is not None:
        raise ValueError(f"{path} {problem}; restore it from a copy, or {remedy}")


def wrong_size(path: Path, size: int, source: str) -> str | None:
    """What is wrong with a file that does not have as many bytes as `source` says; None if it has."""
    found = path.stat().st_size if path.is_file() else None
    if found is None:
        return "is missing"
    if found == size:
        return None
    with path.open("rb") as file:
        return (found and stand_in(file.read(1024))) or f"has {found} bytes where {source} says {size}"


def stand_in(start: bytes) -> str | None:
    """What a file that begins so is in place of the one that was meant, and the remedy; None if it may be that one."""
    start = start.lstrip().lower()
    if not start:
        return "is empty; get it again"
    if start.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS and not the file itself; run git lfs pull"
    if start.startswith((b"<!doctype html", b"<html")):
        return "is a web page that was saved in place of the file; download the file itself"
    return None


def require_no_stand_in(path: Path) -> None:
    """ValueError if an existing file is an empty one, a pointer of Git LFS, a web page, or a pipe or device, which is
    not opened. OSError if it is not read."""
    if not path.is_file() and not path.is_dir() and path.exists():
        raise ValueError(f"{path} is a pipe, socket or device; name a file")
    with path.open("rb") as file:
        if (problem := stand_in(file.read(1024))) is not None:
            raise ValueError(f"{path} {problem}")


def missing(path: str | Path) -> str:
    """The words of a message for a path that is not there, with what is there in its place that may be meant."""
    path = Path(path)
    folder = next((each for each in path.parents if each.is_dir()), Path())
    name, told = next(iter(path.relative_to(folder).parts), ""), ""
    with suppress(OSError):
        names = sorted(each.name for each in folder.iterdir() if not each.name.startswith("."))
        if near := difflib.get_close_matches(name, names, NEAREST):
            told = f" (did you mean {' or '.join(str(folder / each) for each in near)}?)"
        elif names and folder != Path():
            told = f" ({folder} holds {first_few(names, NEAREST)})"
    return f"{path} does not exist{told}"


def sha256_of(path: Path) -> str:
    """The hash of a file, which is read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def disk_used(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; one that has several names there counts once."""
    files = [path] if path.is_file() else [Path(top) / name for top, _, names in os.walk(path) for name in names]
    found = [file.lstat() for file in files if os.path.lexists(file)]
    return sum({(each.st_dev, each.st_ino): each.st_size for each in found}.values())


def require_output(path: Path, option: str, ending: str, example: str) -> None:
    """ValueError unless the file that a command's `option` names can be written; its name is to have this ending."""
    if path.is_dir():
        remedy = f"name a file, for instance {path / (example + ending)}"
        raise ValueError(f"{option} {path} is a folder; {remedy}")
    require_regular(path)
    if path.suffix != ending:
        remedy = f"name a file that does, for instance {path.with_suffix(ending)}"
        raise ValueError(f"{option} {path} does not end in {ending}; {remedy}")
    if not path.parent.is_dir():
        raise ValueError(f"{option} {path}: the folder {path.parent} does not exist; make it first")
    require_writable(path.parent)
