"""Numbers as people read them: rounded, but never to nothing."""

from __future__ import annotations

import math

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


def significant(number: float, digits: int = 4) -> float:
    """The nearest number that has no more digits than these."""
    return float(f"{number:.{digits - 1}e}")
