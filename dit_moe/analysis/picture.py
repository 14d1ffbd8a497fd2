"""A picture and the words that go with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dit_moe.rounding import rounded


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture to be drawn, light or dark, and what to say about it."""

    name: str  # of its file
    section: str
    title: str
    caption: str  # what to look at, with the numbers
    alt: str  # what kind of picture it is, for those who do not see it
    draw: Callable[[bool], Any]  # dark → Figure


def picture(
    name: str, section: str, title: str, caption: str, alt: str, draw: Callable[..., Any], *args: Any
) -> Picture:
    def drawn(dark: bool) -> Any:
        return draw(*args, dark=dark)

    return Picture(name=name, section=section, title=title, caption=caption, alt=alt, draw=drawn)


def percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{rounded(100 * share, 1)} %"


def images_a_class(images_C: np.ndarray) -> str:
    low, high = int(images_C.min()), int(images_C.max())
    return f"{low} images a class" if low == high else f"{low} to {high} images a class"


def only_some(count: int, most: int) -> str:
    return "" if count <= most else f" Drawn: {most} of {count} layers, evenly from the first to the last."


def named(kind: str, name: str) -> str:
    """A class or a token in a sentence; a token in quotes, as it may be a comma."""
    return f"{kind} “{name}”" if kind == "token" else f"{kind} {name}"
