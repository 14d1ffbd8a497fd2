"""Markdown tables whose columns line up in the source, too."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

NUMBER = re.compile(r"(≈ )?\*{0,2}[-+−]?\d")  # how the cell of a number begins


def markdown_table(columns: Iterable[tuple[str, Sequence[str]]]) -> str:
    """A table of (title, cells of every row). Columns of numbers are right-aligned.

    An empty cell is shown as "–", and a column without any content is left out.
    """
    shown: list[list[str]] = []
    for title, content in columns:
        if not any(content):
            continue
        cells = [cell.replace("|", "\\|") for cell in content]
        right = all(not cell or NUMBER.match(cell) for cell in cells)
        lines = [title, *(cell or "–" for cell in cells)]
        width = max(map(len, lines))
        head, *body = [line.rjust(width) if right else line.ljust(width) for line in lines]
        shown.append([head, "-" * (width - 1) + (":" if right else "-"), *body])
    return "".join(f"| {' | '.join(line)} |\n" for line in zip(*shown, strict=True))
