"""log.jsonl, evaluations.jsonl: a JSON object per line, always one per logged step, however often a run was resumed."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, TextIO

from dit_moe.files import write_atomically


class RunLog:
    """Appends lines to a file whose lines all belong to steps up to `step`, the one that the run (re)starts from.

    The file is made with its first line.
    """

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        self._file: TextIO | None = None
        if path.exists():
            cut(path, step)

    def write(self, line: dict[str, Any]) -> None:
        self._file = self._file or self._path.open("a")
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def ends_with(self, step: int) -> bool:
        """Whether the last line is of `step`."""
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        return bool(lines) and json.loads(lines[-1])["step"] == step

    def sync(self) -> None:
        """Put every line on the disk: a checkpoint must not be newer than its log."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def cut(path: Path, step: int) -> None:
    """Drop, in one atomic replacement, the lines past `step`, and the last one if it was not written to its end.

    Lines that cannot be read are moved to a file beside it, and stderr says so.
    """
    lines = path.read_bytes().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n")]
    damaged = [line for line in whole if _step_of(line) is None]
    kept = [line for line in whole if (at := _step_of(line)) is not None and at <= step]
    if damaged:
        aside = path.with_name(f"{path.name}.damaged")
        with aside.open("ab") as file:
            file.writelines(damaged)
            os.fsync(file.fileno())
        count = "a line" if len(damaged) == 1 else f"{len(damaged)} lines"
        print(f"warning: {path} has {count} that cannot be read, now in {aside.name}", file=sys.stderr)
    if kept != lines:
        write_atomically(path, b"".join(kept))


def _step_of(line: bytes) -> int | None:
    """None of a line that cannot be read."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return None


def flatten(line: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a log line under one level of names, "layers/p/0": what trackers take."""
    flat: dict[str, float] = {}
    for key, value in line.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}/")
        elif isinstance(value, list):
            flat |= flatten({str(i): item for i, item in enumerate(value)}, f"{prefix}{key}/")
        elif value is not None:
            flat[prefix + key] = value
    return flat
