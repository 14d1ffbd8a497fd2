"""From plain values to frozen, validated dataclasses, and back; every mistake is one `ConfigError`.

The dataclasses themselves stand beside the classes they configure. A section that chooses a registry entry does so by
``name``; a bare string is short for ``{name: that}``.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

from dit_moe.registry import Registry, did_you_mean

C = TypeVar("C")
Tree = dict[str, Any]
MOST_SHOWN = 80  # characters of a value in a message


class ConfigError(ValueError):
    """A mistake in a config: `path` is dotted, `problem` follows it ("=9 exceeds …; lower it …")."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(path + problem)
        self.path, self.problem = path, problem

    def below(self, parent: str) -> ConfigError:
        """The same mistake, seen from the section `parent` that contains this one."""
        return type(self)(f"{parent}.{self.path}" if parent else self.path, self.problem)


class NotThere(ConfigError):
    """The images that a config names are not there: none can be damaged."""


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


@dataclasses.dataclass(frozen=True)
class Place:
    """For an `Annotated` text that may be the path of a file or a folder; `names` are texts that never are one."""

    names: tuple[str, ...] = ()

    def require(self, value: Any, path: str) -> None:
        """Any text may be one."""

    def is_in(self, folder: Path, value: str) -> bool:
        """Whether `value`, taken relative to `folder`, is there; of a pattern, what stands before its first sign."""
        plain = re.split(r"[*?\[{]", value, maxsplit=1)
        fixed = value if len(plain) == 1 else plain[0].rpartition("/")[0]
        return value != "" and value not in self.names and os.path.exists(folder / fixed)


# -------------------------------------------------------------------------------------------- tree to dataclasses


def build(cls: type[C], tree: Mapping[str, Any], path: str = "") -> C:
    """Read `tree` as the dataclass `cls`, checking every key and type; ConfigError names the dotted path.

    ``cls.FORMER``, if there is one, names keys of earlier versions: runs of theirs have them, and they have no effect.
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, cls)) if field.init}
    values = {}
    with section(path):
        for key in tree:
            if key not in fields and key not in getattr(cls, "FORMER", ()):
                raise ConfigError(shown(key), f" is not a known key; {_meant(cls, str(key), list(fields))}")
        for name, field in fields.items():
            if name in tree:
                values[name] = convert(hints[name], _with_default_entry(field, hints[name], tree[name]), name)
            elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                raise ConfigError(name, " is missing; add it to the config")
        return cls(**values)


def _meant(cls: type, key: str, fields: Sequence[str]) -> str:
    """What may have been meant by a key that `cls` does not have: that of a section below, or one like it."""
    below = keys_called(key, [cls])
    return f"did you mean {' or '.join(below)}?" if below else did_you_mean(key[:MOST_SHOWN], fields)


def keys_called(name: str, classes: Iterable[type]) -> list[str]:
    """The dotted keys of config dataclasses that are `name` or end in it, of those the least deep."""
    ending = f".{name}"
    found = dict.fromkeys(key for cls in classes for key in _keys(cls) if f".{key}".endswith(ending))
    least = min((key.count(".") for key in found), default=0)
    return [key for key in found if key.count(".") == least]


def _keys(hint: Any) -> Iterator[str]:
    """The dotted keys of all sections, whichever registry entry they name."""
    if typing.get_origin(hint) is Annotated and isinstance(hint.__metadata__[0], Registry):
        registry = hint.__metadata__[0]
        for name in registry.names():
            yield from _keys(registry.config_class(name))
    elif dataclasses.is_dataclass(hint):
        for name, each in typing.get_type_hints(hint, include_extras=True).items():
            yield name
            yield from (f"{name}.{key}" for key in _keys(each))
    else:
        for each in typing.get_args(hint):
            yield from _keys(each)


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
        section = {**section, **registry.spell_out(section["name"])}
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


def located(config: C, folder: Path) -> C:
    """`config` as it was given in `folder`, for use in any other: its paths that are there become absolute."""
    hints = typing.get_type_hints(type(config), include_extras=True)
    changes: Tree = {}
    for name in (field.name for field in dataclasses.fields(typing.cast(Any, config)) if field.init):
        value, place = getattr(config, name), _note_of(hints[name], Place)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            changes[name] = located(value, folder)
        elif place is not None and isinstance(value, str) and place.is_in(folder, value):
            changes[name] = str(folder / value)
    return typing.cast(C, dataclasses.replace(typing.cast(Any, config), **changes))


def _registry_of(hint: Any) -> Registry | None:
    return _note_of(hint, Registry)


def _note_of(hint: Any, kind: type[C]) -> C | None:
    """What a type is `Annotated` with of this kind, itself or a type in it."""
    if typing.get_origin(hint) is Annotated:
        return next((arg for arg in typing.get_args(hint) if isinstance(arg, kind)), None)
    return next((found for arg in typing.get_args(hint) if (found := _note_of(arg, kind)) is not None), None)
