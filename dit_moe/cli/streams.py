"""stdout and stderr of a command: they take any text, and a reader that has gone away ends no work."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class Stream(io.FileIO):
    """The file of a standard stream. Once nobody reads it any more, what is written goes nowhere."""

    lost = False  # whether something was not read
    before: TextIO  # what it stands in for, which would close the descriptor with its last reference

    def write(self, data: ReadableBuffer, /) -> int:
        """As `FileIO.write`; errors of stderr are dropped, as no work depends on what is said there."""
        try:
            return super().write(data)
        except OSError as error:
            if not isinstance(error, BrokenPipeError) and self.fileno() != 2:
                raise  # a full disk under stdout
            self.lost = True
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self.fileno())  # for libraries and new processes, too
            os.close(nothing)
            return memoryview(data).nbytes


def open_standard_streams() -> None:
    """Open those that were closed, so that no file of ours takes their numbers, and set up all of them."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for name, stream in (("stdout", sys.stdout), ("stderr", sys.stderr)):
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
            _outlive_reader(name)


def unread() -> bool:
    """Whether what was printed on stdout found no reader."""
    sys.stdout.flush()
    file = _file(sys.stdout)
    return isinstance(file, Stream) and file.lost


def _outlive_reader(name: str) -> None:
    """Put a `Stream` under sys.stdout or sys.stderr, unless something else was put in its place, as by a notebook."""
    stream = getattr(sys, name)
    file = _file(stream)
    if type(file) is not io.FileIO or file.fileno() not in (1, 2):
        return
    with suppress(OSError):
        stream.flush()
    instead = Stream(file.fileno(), "w", closefd=False)
    instead.before = stream
    text = io.TextIOWrapper(
        io.BufferedWriter(instead),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering or stream.write_through,
        write_through=stream.write_through,
    )
    setattr(sys, name, text)


def _file(stream: object) -> object:
    buffer = getattr(stream, "buffer", None)
    return getattr(buffer, "raw", buffer)
