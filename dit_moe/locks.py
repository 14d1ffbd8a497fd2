"""Outputs that one process writes at a time, so that no two results are ever mixed."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dit_moe.files import is_open_as, require_writable
from dit_moe.formatting import tell

_held: set[Path] = set()  # locks of this process, which may enter again what it is in


@contextmanager
def exclusive(folder: Path, file: str = "", *, wait: bool = False) -> Iterator[None]:
    """While entered, no other process can enter the output `folder`, which is made if need be, or this `file` in it.

    The lock is a hidden file, which is removed at the end, as are folders that were made for it and are still empty.
    With `wait`, others are waited for. Raises ValueError if another process is in there or it cannot be written.
    """
    made_folders = [each for each in (folder, *folder.parents) if not each.exists()]
    require_writable(folder)
    lock = folder.resolve() / (f".{file}.lock" if file else ".lock")
    if lock in _held:
        yield
        return
    descriptor, made = _take(lock, folder / file, wait)
    _held.add(lock)
    try:
        yield
    finally:
        _held.remove(lock)
        if made and is_open_as(lock, descriptor):  # before it is released: whoever has it open will find it gone
            lock.unlink(missing_ok=True)
        os.close(descriptor)
        with suppress(OSError):  # one holds something
            for each in made_folders:
                each.rmdir()


def _take(lock: Path, output: Path, wait: bool) -> tuple[int, bool]:
    """An open descriptor of the lock file, locked, and whether the file was made for it."""
    while True:
        made = True
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileNotFoundError:  # another process has made the folder, and removed it
            require_writable(lock.parent)
            continue
        except FileExistsError:
            made = False
            try:
                descriptor = os.open(lock, os.O_RDWR | os.O_NOFOLLOW)
            except FileNotFoundError:
                continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))  # ends with the process
        except BlockingIOError:
            os.close(descriptor)
            problem = f"{output} is in use by another process"
            raise ValueError(f"{problem}; wait for it, or choose another folder") from None
        except OSError as error:  # some clusters' file systems have no locks
            warning = f"warning: {output} cannot be locked ({error.strerror}); start nothing else in it"
            tell(warning)
            return descriptor, made
        if is_open_as(lock, descriptor):
            return descriptor, made
        os.close(descriptor)  # its holder has removed it
