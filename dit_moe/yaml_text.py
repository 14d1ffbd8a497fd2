"""YAML as configs are written and read: every text, number and list comes back as it was, and nothing is looked up.

1e-3 is a number, 2001-01-01 a text, and no key may stand twice in a section.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

MOST_VALUES = 1_000_000  # in a file, with those that an alias (*name) repeats: a few lines could mean billions

LONGEST = 2**20  # characters
DEEPEST = 100  # sections and lists in each other
_STRING, _FLOAT, _TIME = (f"tag:yaml.org,2002:{kind}" for kind in ("str", "float", "timestamp"))
_EXPONENT = re.compile(r"[-+]?[0-9]+(?:_[0-9]+)*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$")  # YAML 1.1 wants a dot and a sign


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # the first is of C, and quick
    def construct_document(self, node: yaml.Node) -> Any:
        _check(node)
        return super().construct_document(node)


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    def ignore_aliases(self, data: object) -> bool:
        return True


# The dumper quotes a text that the loader would take for something else, so both must know the same.
for _each in (_Loader, _Dumper):
    _each.add_implicit_resolver(_FLOAT, _EXPONENT, list("-+0123456789"))
_Loader.add_constructor(_TIME, _Loader.construct_yaml_str)


def read(text: str) -> Any:
    """What a YAML text says, ``${…}`` included as it stands. ValueError says what is wrong, and where."""
    if len(text) > LONGEST:
        raise ValueError(f"it has {len(text):,} characters, and {LONGEST:,} are the most that are read")
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        but = f"{error.context}, " if str(error.problem).startswith("but ") else ""
        raise ValueError(f"{but}{error.problem}{place}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:  # of a tag, as in `!!int x`
        raise ValueError(f"a value is not what its tag says ({error})") from None


def write(value: Any) -> str:
    """`value`, of dicts, lists, texts, numbers, truth values and None, as text for `read`."""
    return yaml.dump(value, Dumper=_Dumper, allow_unicode=True, sort_keys=False, default_flow_style=False)


def _check(root: yaml.Node) -> None:
    """Raise for a key that stands twice in a section, for too many levels, and for aliases that make too much of it."""
    nodes, count = [(root, 1)], 0
    while nodes:
        (node, depth), count = nodes.pop(), count + 1
        if depth > DEEPEST:
            raise yaml.constructor.ConstructorError(problem=f"more than {DEEPEST} levels in each other")
        if count > MOST_VALUES:
            raise yaml.constructor.ConstructorError(problem=f"more than {MOST_VALUES:,} values, aliases written out")
        if isinstance(node, yaml.SequenceNode):
            nodes += [(each, depth + 1) for each in node.value]
        elif isinstance(node, yaml.MappingNode):
            keys = set()
            for key, value in node.value:
                nodes += [(key, depth + 1), (value, depth + 1)]
                if key.tag == _STRING and key.value in keys:
                    problem = f"found duplicate key {key.value}"
                    raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key.start_mark)
                keys.add(key.value if key.tag == _STRING else None)


def read_section(text: str, example: str) -> dict[str, Any]:
    """The section ``{name: …, option: …}`` of the command line; ValueError, with an example, for any other text."""
    try:
        section: Any = read(text)
    except ValueError as error:
        closed = text.count("{") <= text.count("}")
        hint = "are its commas, colons and brackets right?" if closed else "a closing } is missing?"
        raise ValueError(f"{text} is not valid YAML ({error}): {hint} wanted {example}") from None
    if not isinstance(section, dict) or not isinstance(section.get("name"), str):
        raise ValueError(f"{text} has no name; wanted {example}")
    return section
