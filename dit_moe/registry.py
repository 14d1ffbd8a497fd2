"""One small registry for everything a config file can name: routers, models, objectives, samplers, datasets, …

An entry is a class together with the dataclass that configures it. A config section says which entry it means by
its key ``name``; `dit_moe.config.build` then reads the rest of the section as that entry's dataclass.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

T = TypeVar("T")

LISTED = 50  # known words of a message, which may be of a thousand classes


def entry_of(name: str) -> str:
    """The entry that a name means: what stands before its first hyphen, so ``DiT-S/2-8E2A`` is a ``DiT``."""
    return name.partition("-")[0]


class Registry:
    """Names → (factory, config dataclass).

    Args:
        kind: what messages call an entry.
        spell_out: the section that a text alone stands for, beside names; ValueError for a text that cannot be meant.
    """

    def __init__(self, kind: str, spell_out: Callable[[str], dict[str, str]] = lambda name: {"name": name}) -> None:
        self.kind, self.spell_out = kind, spell_out
        self._entries: dict[str, tuple[Any, type]] = {}

    def register(self, name: str, config: type) -> Callable[[T], T]:
        """Class or function decorator: file it under `name`, configured by the dataclass `config`.

        Raises ValueError if the name, or the config class, is taken, or if the name has a hyphen.
        """
        if entry_of(name) != name:
            raise ValueError(
                f"{self.kind} {name!r} has a hyphen, at which a config stops reading (DiT-B/4 is the entry DiT); "
                f"call it {name.replace('-', '_')!r}"
            )

        def add(factory: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered twice; choose another name")
            if any(config is taken for _, taken in self._entries.values()):
                raise ValueError(f"{config.__name__} configures two {self.kind}s; give {name!r} its own dataclass")
            self._entries[name] = factory, config
            return factory

        return add

    def names(self) -> list[str]:
        return sorted(self._entries)

    def config_class(self, name: str) -> type:
        """The dataclass that configures entry `name`; ValueError with the known names if there is none."""
        if entry_of(name) not in self._entries:
            near = difflib.get_close_matches(name, self.names(), n=1)
            own = "" if near else "; a module of yours that adds one is named by --plugin MODULE"
            raise ValueError(f"unknown {self.kind} {name!r}; {did_you_mean(name, self.names())}{own}")
        return self._entries[entry_of(name)][1]

    def name_of(self, config: object) -> str:
        """The name of the entry that `config` configures."""
        for name, (_, config_class) in self._entries.items():
            if type(config) is config_class:
                return name
        raise ValueError(f"{type(config).__name__} configures no {self.kind}; known: {', '.join(self.names())}")

    def factory(self, config: object) -> Any:
        """The class or function that `config` belongs to."""
        return self._entries[self.name_of(config)][0]

    def build(self, config: object, *args: Any, **kwargs: Any) -> Any:
        """Call the factory that `config` belongs to with the config and what else it needs."""
        return self.factory(config)(config, *args, **kwargs)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The remedy behind an unknown word: the nearest known one if there is any, and the list."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    more = f" and {len(known) - LISTED} more" if len(known) > LISTED else ""
    return f"{hint}known: {', '.join(known[:LISTED]) or 'none'}{more}"


def import_submodules(package: str, path: Iterable[str]) -> None:
    """Import every module of a package, so that a new file in it registers itself by being there."""
    for module in pkgutil.iter_modules(path):
        importlib.import_module(f"{package}.{module.name}")
