"""Numbers, texts and tables as people read them: numbers rounded, but never to nothing; names that cannot do harm."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.text import Text

NUMBER = re.compile(r"(≈ )?\*{0,2}[-+−]?\d")  # how the cell of a number begins
SMALLEST = 8  # decimals, beyond which an exponent is easier to read
LONGEST = 1000  # letters of a message, whose middle is left out beyond that
# What steers a terminal, reverses its lines, or is half a character.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_BREAK = re.compile(r"\s*[\n\t\r\v\f\x85\u2028\u2029]\s*")


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


def first_few(names: Sequence[str], count: int = 1) -> str:
    """The first `count` of them, and how many more there are."""
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


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
        cells = [one_line(cell).replace("|", "\\|") for cell in content]
        right = all(not cell or NUMBER.match(cell) for cell in cells)
        lines = [title, *(cell or "–" for cell in cells)]
        width = max(map(len, lines))
        head, *body = [line.rjust(width) if right else line.ljust(width) for line in lines]
        shown.append([head, "-" * (width - 1) + (":" if right else "-"), *body])
    return "".join(f"| {' | '.join(line)} |\n" for line in zip(*shown, strict=True))


# --------------------------------------------------------------------------------------------------- for the terminal


def printable(text: str) -> str:
    """`text` with its control characters, and halves of characters, written out: ``\\x1b`` for an escape."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(text: str, longest: int = LONGEST) -> str:
    """`text` on one printable line; of a long one, the beginning and the end."""
    if len(text) > longest:
        half = longest // 2
        text = f"{text[:half]} … {text[-half:]}"
    return printable(_BREAK.sub(" ", text.strip()))


def tell(text: str) -> None:
    """One line on stderr, whatever names are in it, and whether or not anybody reads it."""
    with suppress(OSError):
        print(one_line(text), file=sys.stderr)


class PlainConsole(Console):
    """rich's console, for which texts are texts: nothing in a name is markup, an emoji, or an order to the terminal.

    A notebook's streams are no terminals, though its kernel tells rich so by FORCE_COLOR.
    """

    def __init__(self, **options: Any) -> None:
        stream = options.get("file") or (sys.stderr if options.get("stderr") else sys.stdout)
        options = {"force_jupyter": False, "force_terminal": stream.isatty(), **options}
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def on_broken_pipe(self) -> None:
        """Say no more, where rich would end the process."""
        self.quiet = True

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)
