"""From YAML files and ``key=value`` overrides to frozen, validated dataclasses, and back.

The dataclasses themselves stand beside the classes they configure; `dit_moe.experiments.image` puts them together.
Four rules:

* ``base: other.yaml`` (or a list) inherits from files named relative to the file, or from built-in configs; later
  values win, key by key.
* A section that chooses a registry entry does so by ``name``; a bare string is short for ``{name: that}``.
  Naming another entry drops the inherited options of the old one, which would mean nothing to the new.
* ``${…}`` is looked up in a user's own files, as they are read; everywhere else it is a text like any other.
* Every mistake is one `ConfigError` that starts with the dotted path and the value.
"""

from __future__ import annotations

import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dit_moe import built_in, yaml_text
from dit_moe.registry import entry_of
from dit_moe.schema import (
    ConfigError,
    Keys,
    Matching,
    NotThere,
    Place,
    Tree,
    Within,
    WorkFailed,
    build,
    convert,
    dump,
    located,
    require,
    section,
    shown,
)

__all__ = [  # with what the rest of the package takes from the schema
    "ConfigError",
    "Keys",
    "Matching",
    "NotThere",
    "Place",
    "Tree",
    "Within",
    "WorkFailed",
    "build",
    "convert",
    "differences",
    "dump",
    "flatten",
    "load",
    "located",
    "merge",
    "override",
    "parse",
    "require",
    "require_same",
    "section",
    "shown",
    "to_yaml",
    "without_options_of_others",
]

STORED = "config.yaml"  # of a run or a checkpoint, beside one of these:
_OF_A_RUN = ("state.json", "checkpoints/step_*")
LITERAL = "# Values are literal: ${…} stands for itself.\n"  # how a written config begins that has such a text
OF_A_RUN = "# The resolved config of this run, as dit-moe wrote it.\n"  # how that of a run folder begins
OF_A_STUDY = "# This study with its changes, as dit-moe wrote it.\n"  # and that of a study's folder


# ---------------------------------------------------------------------------------------------- files to one tree


def load(path: str | Path, overrides: Sequence[str] = ()) -> Tree:
    """Read a YAML file, or a built-in config by its name, with all its bases and apply ``a.b=value`` overrides.

    Returns a plain nested dict, not yet typed.
    """
    return override(_load_file(built_in.find(path), seen=()), overrides)


def override(tree: Tree, changes: Sequence[str]) -> Tree:
    """`tree` with ``a.b=value`` changes applied in order; ConfigError for one that cannot be read."""
    for text in changes:
        key, sep, written = text.partition("=")
        if not sep or not key:
            raise ConfigError(shown(text), " is not an override; write key=value, for instance train.steps=100")
        try:
            value = yaml_text.read(written)
        except ValueError as error:
            raise ConfigError(shown(text), f" cannot be parsed: {error}") from None
        tree = change(tree, key, value)
    return tree


def change(tree: Tree, key: str, value: Any) -> Tree:
    """`tree` with `value` under the dotted `key`; ConfigError for a key that is none."""
    names = key.split(".")
    if len(names) > yaml_text.DEEPEST or "" in names:
        problem = " is not an override; write key=value, for instance train.steps=100"
        raise ConfigError(f"{shown(key)}={shown(value)}", problem)
    for name in reversed(names):
        value = {name: value}
    return merge(tree, value)


def parse(text: str) -> Tree:
    """A config as a plain nested dict, every value as it is written. ValueError if it is none."""
    tree = yaml_text.read(text)
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise ValueError("it must hold `key: value` lines at its top level")
    return tree


def differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Where two trees of plain values differ: dotted path, (old value, new value)."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old.keys() | new.keys():
            yield from differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new:
        yield path, (old, new)


def without_options_of_others(found: Mapping[str, Any]) -> dict[str, Any]:
    """What `differences` found, where a section is of two entries their names alone: the options follow from these."""
    sections = [
        key.removesuffix("name")
        for key, pair in found.items()
        if key.endswith(".name") and len({entry_of(str(name)) for name in pair}) > 1
    ]
    return {
        key: pair
        for key, pair in found.items()
        if not any(key.startswith(section) and key != f"{section}name" for section in sections)
    }


def completed(recorded: Tree, config_class: type | None) -> Tree:
    """A resolved config of an earlier version, with the defaults of the keys that came since, which change nothing.

    As it is for a `config_class` that it does not fit, or None.
    """
    try:
        return recorded if config_class is None else dump(build(config_class, recorded))
    except ConfigError:
        return recorded


def require_same(
    now: Tree, earlier: Tree, section: str, where: str, remedy: str, free: Collection[str] = frozenset()
) -> None:
    """ConfigError for a value of `section` that is not as when the work in `where` was begun, unless it is `free`."""
    was = flatten(earlier)
    for key, value in flatten(now).items():
        if was.get(key) != value and key not in free:
            problem = f"={shown(value)} differs from {where}, which has {shown(was.get(key))}"
            raise ConfigError(f"{section}.{key}", f"{problem}; {remedy}")


def flatten(tree: Tree, path: str = "") -> Tree:
    """The leaves under their dotted keys."""
    flat: Tree = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value}
    return flat


def _load_file(path: Path, seen: tuple[Path, ...]) -> Tree:
    if path.is_dir():
        raise ConfigError(str(path), " is a folder; name a YAML config file in it")
    if not path.is_file():
        raise ConfigError(str(path), " is no file of text; name a YAML config file")
    if path.resolve() in seen:
        raise ConfigError(str(path), " inherits from itself; remove one `base:`")
    if (size := path.stat().st_size) > 4 * yaml_text.LONGEST:
        raise ConfigError(str(path), f" has {size:,} bytes, too many for a config; name a YAML config file")
    try:
        text = path.read_text(encoding="utf-8-sig")
        tree = parse(text)
    except UnicodeDecodeError as error:
        problem = f" is not UTF-8 (byte {error.start} is 0x{error.object[error.start]:02x})"
        raise ConfigError(str(path), f"{problem}; save it in that encoding") from None
    except ValueError as error:
        raise ConfigError(str(path), f" is not valid YAML: {error}") from None
    if not (text.startswith((OF_A_RUN, OF_A_STUDY, LITERAL)) or _is_stored(path)):
        tree = _resolve(tree, path)
    bases = tree.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{path}: base", f"={shown(bases)} must be a file name or a list of them")
    merged: Tree = {}
    for base in bases:
        merged = merge(merged, _load_file(built_in.find(base, beside=path.parent), (*seen, path.resolve())))
    return merge(merged, typing.cast(Tree, tree))


def _is_stored(path: Path) -> bool:
    return path.name == STORED and any(any(path.parent.glob(name)) for name in _OF_A_RUN)


def _resolve(tree: Tree, path: Path) -> Tree:
    """What ``${a.b}`` and ``${oc.env:NAME}`` stand for in the file of a user, who may write ``\\${`` for the text."""
    if "${" not in str(tree):
        return tree
    try:
        return typing.cast(Tree, OmegaConf.to_container(OmegaConf.create(tree), resolve=True))
    except Exception as error:  # OmegaConf's errors and its parser's share no base class
        problem = f" has a ${{…}} that cannot be resolved: {' '.join(str(error).split())}"
        raise ConfigError(str(path), f"{problem}; write \\${{ where the text itself is meant") from None


def merge(old: Tree, new: Tree) -> Tree:
    """`old` with the values of `new` over it, section by section (see the rule on ``name`` above)."""
    merged = dict(old)
    for key, value in new.items():
        before = merged.get(key)
        if isinstance(before, str) and isinstance(value, Mapping):
            before = {"name": before}
        if isinstance(before, Mapping) and isinstance(value, str) and "name" in before:
            value = {"name": value}
        if isinstance(before, Mapping) and isinstance(value, Mapping):
            named = [str(section["name"]) for section in (before, value) if "name" in section]
            same_entry = len({entry_of(name) for name in named}) < 2
            merged[key] = merge(dict(before), dict(value)) if same_entry else dict(value)
        else:
            merged[key] = value
    return merged


def to_yaml(config: object) -> str:
    """The whole config as YAML text: `parse` and `load` read the same values out of it."""
    text = yaml_text.write(dump(config))
    return LITERAL + text if "${" in text else text
