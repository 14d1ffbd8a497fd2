"""From YAML files and ``key=value`` overrides to frozen, validated dataclasses, and back.

The dataclasses themselves stand beside the classes they configure; `dit_moe.experiments.image` puts them together.
Four rules:

* ``base: other.yaml`` (or a list) inherits from files named relative to the file; later values win, key by key.
* A section that chooses a registry entry does so by ``name``; a bare string is short for ``{name: that}``.
  Naming another entry drops the inherited options of the old one, which would mean nothing to the new.
* ``${…}`` is looked up in a user's own files, as they are read; everywhere else it is a text like any other.
* Every mistake is one `ConfigError` that starts with the dotted path and the value.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

from omegaconf import OmegaConf

from dit_moe import yaml_text
from dit_moe.registry import Registry, did_you_mean, entry_of

C = TypeVar("C")
Tree = dict[str, Any]
MOST_SHOWN = 80  # characters of a value in a message

STORED = "config.yaml"  # of a run or a checkpoint, beside one of these:
_OF_A_RUN = ("state.json", "checkpoints/step_*")
LITERAL = "# Values are literal: ${…} stands for itself.\n"  # how a written config begins that has such a text
OF_A_RUN = "# The resolved config of this run, as dit-moe wrote it.\n"  # how that of a run folder begins
OF_A_STUDY = "# This study with its changes, as dit-moe wrote it.\n"  # and that of a study's folder


class ConfigError(ValueError):
    """A mistake in a config: `path` is dotted, `problem` follows it ("=9 exceeds …; lower it …")."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(path + problem)
        self.path, self.problem = path, problem

    def below(self, parent: str) -> ConfigError:
        """The same mistake, seen from the section `parent` that contains this one."""
        return ConfigError(f"{parent}.{self.path}" if parent else self.path, self.problem)


class WorkFailed(RuntimeError):
    """Work that failed in its middle for a known reason: the message says what, why, and what to do about it."""


@contextmanager
def section(path: str) -> Iterator[None]:
    """Within it a mistake is seen from the section `path` of the config: its path is below that."""
    try:
        yield
    except ConfigError as error:
        raise error.below(path) from None


def require(ok: bool, config: object, field: str, wanted: str) -> None:
    """In a dataclass's ``__post_init__``: raise unless `ok`, naming the field, its value and what is wanted."""
    if not ok:
        raise ConfigError(field, f"={shown(getattr(config, field))} {wanted}")


def shown(value: object) -> str:
    """A value as a message has it: in one line that can be printed, and a long one shortened."""
    try:
        text = str(value)
    except (ValueError, RecursionError):  # too many digits, or too deep
        text = f"({type(value).__name__} too large to show)"
    text = text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}… ({len(text):,} characters)"
    return text if text.isprintable() else repr(text)


@dataclasses.dataclass(frozen=True)
class Within:
    """For an `Annotated` number: both are allowed."""

    low: float
    high: float

    def require(self, value: Any, path: str) -> None:
        """ConfigError if `value` is outside."""
        if not self.low <= value <= self.high:
            raise ConfigError(path, f"={shown(value)} must be from {self.low} to {self.high}")


@dataclasses.dataclass(frozen=True)
class Matching:
    """For an `Annotated` text: the pattern that all of it must match, and what messages call such a text."""

    pattern: str
    wanted: str

    def require(self, value: Any, path: str) -> None:
        """ConfigError if `value` is another text."""
        if not re.fullmatch(self.pattern, value, re.DOTALL):
            raise ConfigError(path, f"={shown(value)} must be {self.wanted}")


@dataclasses.dataclass(frozen=True)
class Keys:
    """For an `Annotated` dict: a TypedDict, whose keys it must have."""

    schema: type

    def require(self, value: Any, path: str) -> None:
        """ConfigError if one is missing, or holds anything else."""
        convert(self.schema, value, path)


# ---------------------------------------------------------------------------------------------- files to one tree


def load(path: str | Path, overrides: Sequence[str] = ()) -> Tree:
    """Read a YAML file with all its bases and apply ``a.b=value`` overrides; a plain nested dict, not yet typed."""
    return override(_load_file(Path(path), seen=()), overrides)


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
        names = key.split(".")
        if len(names) > yaml_text.DEEPEST or "" in names:
            raise ConfigError(shown(text), " is not an override; write key=value, for instance train.steps=100")
        for name in reversed(names):
            value = {name: value}
        tree = merge(tree, value)
    return tree


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
    if path.resolve() in seen:
        raise ConfigError(str(path), " inherits from itself; remove one `base:`")
    if path.is_dir():
        raise ConfigError(str(path), " is a folder; name a YAML config file in it")
    if not path.is_file():
        problem = "is no file of text" if path.exists() else "does not exist"
        raise ConfigError(str(path), f" {problem}; name a YAML config file, for instance configs/digits.yaml")
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
        merged = merge(merged, _load_file(path.parent / base, (*seen, path.resolve())))
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


# -------------------------------------------------------------------------------------------- tree to dataclasses


def build(cls: type[C], tree: Mapping[str, Any], path: str = "") -> C:
    """Read `tree` as the dataclass `cls`, checking every key and type; ConfigError names the dotted path."""
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, cls)) if field.init}
    values = {}
    with section(path):
        for key in tree:
            if key not in fields:
                raise ConfigError(shown(key), f" is not a known key; {did_you_mean(str(key)[:MOST_SHOWN], fields)}")
        for name, field in fields.items():
            if name in tree:
                values[name] = convert(hints[name], _with_default_entry(field, hints[name], tree[name]), name)
            elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                raise ConfigError(name, " is missing; add it to the config")
        return cls(**values)


def _with_default_entry(field: dataclasses.Field[Any], hint: Any, value: Any) -> Any:
    """A section that names no entry means the one that the field has by default."""
    registry, factory = _registry_of(hint), field.default_factory
    if registry is None or not isinstance(value, Mapping) or "name" in value or factory is dataclasses.MISSING:
        return value
    return {"name": registry.name_of(factory()), **value}


def convert(hint: Any, value: Any, path: str = "") -> Any:
    """`value` as the annotated type `hint`; ConfigError names the dotted path.

    Types are scalars, Literal, X | None, tuple, list, dict, dataclass, registry entry, `Annotated` with `Within`,
    `Matching` or `Keys`, and TypedDict, which may have more keys than it names.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin is Annotated and isinstance(args[1], Registry):
        return _convert_entry(args[1], value, path)
    if origin is Annotated:
        value = convert(args[0], value, path)
        for check in args[1:]:
            check.require(value, path)
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert_union([arg for arg in args if arg is not type(None)], value, path)
    if origin is typing.Literal:
        if value not in args or type(value) not in {type(arg) for arg in args}:
            raise ConfigError(path, f"={shown(value)} is not one of {', '.join(map(str, args))}")
        return value
    if origin in (tuple, list, Sequence):
        return _convert_list(tuple if origin is tuple else list, args, value, path)
    if origin in (dict, Mapping) or dataclasses.is_dataclass(hint) or typing.is_typeddict(hint):
        if not isinstance(value, Mapping):
            wanted = "a section of `key: value` lines" if dataclasses.is_dataclass(hint) else "an object"
            raise ConfigError(path, f"={shown(value)} must be {wanted}")
        if origin in (dict, Mapping):
            return {
                convert(args[0], key, path): convert(args[1], each, _below(path, key)) for key, each in value.items()
            }
        return _convert_keys(hint, value, path) if typing.is_typeddict(hint) else build(hint, value, path)
    return _convert_scalar(hint, value, path)


def _convert_list(kind: type, args: tuple[Any, ...], value: Any, path: str) -> Any:
    if not isinstance(value, list | tuple):
        raise ConfigError(path, f"={shown(value)} must be a list")
    many = args[0] is float and args[1:] in ((), (Ellipsis,)) and set(map(type, value)) == {float}
    if many and all(map(math.isfinite, value)):  # without looking at each by itself
        return kind(value)
    each = args[:1] * len(value) if kind is list or args[-1] is Ellipsis else args
    if len(value) != len(each):
        raise ConfigError(path, f"={shown(value)} must have {len(each)} entries")
    return kind(convert(hint, item, f"{path}[{i}]") for i, (hint, item) in enumerate(zip(each, value, strict=True)))


def _convert_keys(hint: Any, value: Mapping[str, Any], path: str) -> Tree:
    found = dict(value)
    for name, each in typing.get_type_hints(hint, include_extras=True).items():
        optional = typing.get_origin(each) is typing.NotRequired
        if name in value:
            found[name] = convert(typing.get_args(each)[0] if optional else each, value[name], _below(path, name))
        elif not optional:
            raise ConfigError(_below(path, name), " is missing")
    return found


def _below(path: str, key: object) -> str:
    return f"{path}.{shown(key)}" if path else shown(key)


def _convert_entry(registry: Registry, value: Any, path: str) -> Any:
    section = {"name": value} if isinstance(value, str) else value
    if not isinstance(section, Mapping) or not isinstance(section.get("name"), str):
        raise ConfigError(f"{path}.name", f" is missing; name a {registry.kind}: {', '.join(registry.names())}")
    try:
        config_class = registry.config_class(section["name"])
    except ValueError as error:
        raise ConfigError(f"{path}.name", f"={shown(section['name'])}: {error}") from None
    keeps_name = any(field.name == "name" for field in dataclasses.fields(config_class))
    return build(config_class, section if keeps_name else {k: v for k, v in section.items() if k != "name"}, path)


def _convert_union(hints: list[Any], value: Any, path: str) -> Any:
    problems = []
    for hint in hints:
        try:
            return convert(hint, value, path)
        except ConfigError as problem:
            problems.append(problem)
    # Of a list, what is wrong within is told where only one of the types is a list; of a section likewise.
    kinds: dict[type, tuple[type, ...]] = {list: (tuple, list), dict: (dict,)}
    kind = kinds.get(type(value), ())
    meant = [problem for hint, problem in zip(hints, problems, strict=True) if _container(hint) in kind]
    if len(problems) == 1 or len(meant) == 1:
        raise (meant or problems)[0]
    raise ConfigError(path, f"={shown(value)} must be {', or '.join(map(_wanted, hints))}")


def _container(hint: Any) -> Any:
    """Of a type whose values are lists or sections, which of them; dict for the latter."""
    return dict if dataclasses.is_dataclass(hint) or _registry_of(hint) else typing.get_origin(hint)


_SCALARS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def _wanted(hint: Any) -> str:
    """In words, which values a type takes."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return f"a {args[1].kind}" if isinstance(args[1], Registry) else _wanted(args[0])
    if origin is typing.Literal:
        return f"{'one of ' if len(args) > 1 else ''}{', '.join(map(str, args))}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_wanted(arg) for arg in args)
    if origin in (tuple, list):
        return f"a list, of which each is {_wanted(args[0])}"
    return _SCALARS.get(hint, "a section of `key: value` lines")


def _convert_scalar(hint: Any, value: Any, path: str) -> Any:
    if hint not in _SCALARS:
        raise TypeError(f"{path}: config fields cannot have the type {hint}")
    if hint is int and type(value) is int and not -(2**63) <= value < 2**63:
        raise ConfigError(path, f"={shown(value)} is out of range; give a whole number of 64 bits")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**1000 else math.inf
    if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ConfigError(path, f" holds {value!r}, which is not Unicode; write it in UTF-8, or rename what it names")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(path, f"={shown(value)} must be a finite number")
    if type(value) is not hint:
        kind = {type(None): "null", str: "a text", dict: "a section", list: "a list"}.get(type(value), "")
        raise ConfigError(path, f"={shown(value)} must be {_wanted(hint)}{f', not {kind}' if kind else ''}")
    return value


# -------------------------------------------------------------------------------------------- dataclasses to tree


def dump(config: object) -> Tree:
    """The inverse of `build`: a nested dict of plain values with every default spelt out."""
    hints = typing.get_type_hints(type(config), include_extras=True)
    return {
        field.name: _dump_value(hints[field.name], getattr(config, field.name))
        for field in dataclasses.fields(typing.cast(Any, config))
        if field.init
    }


def _dump_value(hint: Any, value: Any) -> Any:
    if isinstance(value, tuple):
        return [_dump_value(hint, item) for item in value]
    if not dataclasses.is_dataclass(value):
        return value
    registry = _registry_of(hint)
    tree = dump(value)
    return tree if registry is None or "name" in tree else {"name": registry.name_of(value), **tree}


def _registry_of(hint: Any) -> Registry | None:
    if typing.get_origin(hint) is Annotated:
        return next((arg for arg in typing.get_args(hint) if isinstance(arg, Registry)), None)
    return next(filter(None, map(_registry_of, typing.get_args(hint))), None)


def to_yaml(config: object) -> str:
    """The whole config as YAML text: `parse` and `load` read the same values out of it."""
    text = yaml_text.write(dump(config))
    return LITERAL + text if "${" in text else text
