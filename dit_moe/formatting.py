"""Numbers as people read them: rounded, but never to nothing; and Markdown tables."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

NUMBER = re.compile(r"(≈ )?\*{0,2}[-+−]?\d")  # how the cell of a number begins
SMALLEST = 8  # decimals, beyond which an exponent is easier to read


def rounded(number: float, decimals: int, digits: int = 1) -> str:
    """With so many decimals, or with as many more as it takes to show `digits` significant digits."""
    if not number or not math.isfinite(number):
        return f"{number:.{decimals}f}"
    needed = digits - 1 - math.floor(math.log10(abs(number)))
    return f"{number:.{max(decimals, needed)}f}" if needed <= SMALLEST else f"{number:.{digits - 1}e}"


def speed(number: float) -> str:
    """So many a second: whole where they are many, else three digits."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def spaced(number: int) -> str:
    """Whole, its digits in groups of three."""
    return f"{number:,}".replace(",", " ")


def significant(number: float, digits: int = 4) -> float:
    """The nearest number that has no more digits than these."""
    return float(f"{number:.{digits - 1}e}")


def markdown_table(columns: Iterable[tuple[str, Sequence[str]]]) -> str:
    """A table of (title, cells of every row). Columns of numbers are right-aligned, and all line up in the source, too.

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
