"""Modules of the user's that add entries to the registries: a router, a data set, an extractor, a metric.

To import a module is to run its code, and a run or a config may come from anywhere. So what imports one is that the
command names it, ``--plugin my_module``, or that it is installed as an entry point of the group ``dit_moe.plugins``.
A config only says which ones it needs, in its list `plugins`.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType

from dit_moe.schema import ConfigError, Tree

GROUP = "dit_moe.plugins"
_asked: list[str] = []


def asked() -> tuple[str, ...]:
    """The modules that the command has named, which its runs record."""
    return tuple(_asked)


def options() -> list[str]:
    """The words that have another command load them, too."""
    return [f"--plugin={name}" for name in _asked]


def load(names: Sequence[str]) -> None:
    """Import the modules that the command names, also from the working folder, and the installed ones.

    ValueError, in one line, for one that is not there or fails.
    """
    if names and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    _asked[:] = dict.fromkeys(names)
    for name in _asked:
        import_named(name, f"--plugin {name}")
    load_installed()


@lru_cache
def load_installed() -> None:
    """Import the modules that installed packages declare as plugins."""
    from importlib.metadata import entry_points

    for entry in entry_points(group=GROUP):
        import_named(entry.module, f"the installed plugin {entry.name}")


def require_loaded(tree: Tree) -> None:
    """ConfigError if a config, not yet typed, needs a plugin that is not loaded."""
    load_installed()
    named = tree.get("plugins")
    for name in named if isinstance(named, list) else []:  # what else it may be is refused by its type
        if name not in sys.modules:
            problem = f"={name} would run the code of that module"
            raise ConfigError("plugins", f"{problem}; if you trust it, give --plugin {name}, or import it in Python")


def import_named(name: str, option: str) -> ModuleType:
    """The module that `option`, as a message says it, names. ValueError, in one line, if there is none or it fails."""
    try:
        return importlib.import_module(name)
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}.")
        if not missing:
            raise failure(f"{option} failed as {name} was imported", error) from None
        raise ValueError(f"{option}: there is no module {name}; put its folder on PYTHONPATH") from None


def failure(what: str, error: Exception, file: Path | None = None) -> ValueError:
    """What the user's code raised, in one line, with the last place in `file`, or else the very last."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if file is not None and Path(frame.filename) == file] or frames
    place = f"{Path(own[-1].filename).name}:{own[-1].lineno}"
    if isinstance(error, SyntaxError) and error.filename:
        place = f"{Path(error.filename).name}:{error.lineno}"
    said = " ".join([type(error).__name__, *str(error).split()])
    return ValueError(f"{what}: {said} ({place}); mend it")
