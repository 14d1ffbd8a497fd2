"""What classes are called: by names of their own, by ImageNet's words for its synsets, or by their numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from dit_moe.config import ConfigError
from dit_moe.formatting import first_few

SYNSET = re.compile(r"n\d{8}")  # WordNet's number of a noun, which ImageNet's folders are called by
IMAGENET_CLASSES = 1000


def readable_names(class_names: Sequence[str] | None, num_classes: int) -> list[str]:
    """What pictures and results call the classes: a synset by the first of its words, "golden retriever".

    Args:
        class_names: in the order of the label table; None: not known, they are called by their numbers.
    """
    if class_names is None:
        return list(map(str, range(num_classes)))
    return [words_of(name)[0] if SYNSET.fullmatch(name) else name for name in class_names]


def words_of(name: str) -> list[str]:
    """The words for a class, which ImageNet separates by commas ("tench, Tinca tinca"); of a synset, WordNet's."""
    if SYNSET.fullmatch(name):
        try:
            name = _imagenet().label_name_to_description(name)
        except KeyError:  # of another version of WordNet
            return [name]
    return [word.strip() for word in name.split(",") if word.strip()] or [name]


def row_called(label: str, class_names: Sequence[str] | None) -> int | None:
    """The row of the label table that a word, or a synset, means; None if no class is called so.

    A class is found by any of its words, in small letters or capitals; another's first word goes before its later ones.
    ConfigError for a word of several classes.
    """
    names, wanted = class_names or (), label.strip().casefold()
    words = [[word.casefold() for word in (name, *words_of(name))] for name in names]
    first = [row for row, known in enumerate(words) if wanted in known[:2]]
    rows = first or [row for row, known in enumerate(words) if wanted in known]
    if len(rows) > 1:
        several = first_few([names[row] for row in rows], 3)
        raise ConfigError("labels", f": {label} is a name of {len(rows)} classes; give that of one, {several}")
    return rows[0] if rows else None


def or_imagenet(class_names: Sequence[str] | None, num_classes: int) -> Sequence[str] | None:
    """The names or, of 1000 classes without any but their numbers, the synsets of ImageNet in its order."""
    unnamed = class_names is None or list(class_names) == list(map(str, range(num_classes)))
    return _imagenet().label_names() if unnamed and num_classes == IMAGENET_CLASSES else class_names


@cache
def _imagenet() -> Any:
    from timm.data import ImageNetInfo  # late: it takes a second to import

    return ImageNetInfo()
