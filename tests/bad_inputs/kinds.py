"""What a bad input is, and which kinds of them there are: the modules beside this one add theirs to `KINDS`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any


@dataclass(frozen=True)
class Case:
    """A command, in a folder in which something is wrong."""

    what: str
    words: list[str]


@dataclass(frozen=True)
class Place:
    """Where a case is made, and of which good files."""

    good: Path
    folder: Path
    random: Random

    def copy(self, name: str, to: str = "") -> Path:
        """A copy of a good file or folder, which may be spoilt."""
        source, target = self.good / name, self.folder / (to or Path(name).name)
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copy(source, target)
        return target

    def pick(self, *options: Any) -> Any:
        return self.random.choice(options)


KINDS: dict[str, Callable[[Place], Case]] = {}


def kind(make: Callable[[Place], Case]) -> Callable[[Place], Case]:
    KINDS[make.__name__] = make
    return make
