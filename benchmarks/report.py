"""Tables of what other benchmarks printed, for docs/performance.md.

    python -m benchmarks.report [FILE ...]

Reads JSON lines from the files, or from standard input. Prints a Markdown table for each benchmark and machine; what is
the same in all its lines stands above it.
"""

from __future__ import annotations

import argparse
import fileinput
import json
from collections.abc import Sequence
from typing import Any

from dit_moe.formatting import markdown_table

Line = dict[str, Any]


def flat(line: Line, path: str = "") -> Line:
    found: Line = {}
    for name, value in line.items():
        if isinstance(value, dict):
            found |= flat(value, f"{path}{name} ")
        else:
            found[path + name.replace("_", " ")] = value
    return found


def table(name: str, lines: Sequence[Line]) -> str:
    columns = list(dict.fromkeys(key for line in lines for key in line))
    shared = {key: lines[0].get(key) for key in columns if all(line.get(key) == lines[0].get(key) for line in lines)}
    if len(lines) == 1:
        shared = {key: value for key, value in shared.items() if isinstance(value, str)}
    varying = [key for key in columns if key not in shared]
    above = ", ".join(f"{key} {_shown(value)}" for key, value in shared.items())
    cells = markdown_table((key, [_shown(line.get(key)) for line in lines]) for key in varying)
    return f"### {name}\n\n{above}\n\n{cells}\n"


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE")
    groups: dict[tuple[str, str], list[Line]] = {}
    with fileinput.input(parser.parse_args().files) as texts:
        for line in map(json.loads, texts):
            groups.setdefault((line.pop("benchmark"), line["machine"]), []).append(flat(line))
    print("\n".join(table(name, lines) for (name, _), lines in groups.items()), end="")


if __name__ == "__main__":
    main()
