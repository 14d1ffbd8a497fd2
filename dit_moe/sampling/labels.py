"""The label of every image of a run, as the option `labels` says: by a word, or by classes and their names."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dit_moe.config import ConfigError
from dit_moe.data.class_names import or_imagenet, readable_names, row_called
from dit_moe.formatting import first_few
from dit_moe.randomness import generator
from dit_moe.registry import did_you_mean

if TYPE_CHECKING:
    from dit_moe.sampling.generator import SampleConfig

WORDS = ("balanced", "random", "data")  # that `labels` takes: all classes in turn; drawn uniformly; as in the data
SHOWN = 5  # classes that are told


def plain_labels(labels: Any) -> Any:
    """Labels as a config has them: a text, a whole number, or a tuple of these; those of NumPy or torch are taken."""
    if isinstance(labels, Iterable) and not isinstance(labels, str):
        return tuple(map(_plain, labels))
    return _plain(labels)


def _plain(label: Any) -> Any:
    return operator.index(label) if hasattr(label, "__index__") else label


def listed_classes(config: SampleConfig, num_classes: int, class_names: Sequence[str] | None = None) -> list[int]:
    """The rows of the model's label table that the config lists; all where it lists none.

    An entry is the name of a class, a word for it (see `row_called`) or, where no class is called so, the number of its
    row. ConfigError for a class that there is not, and for a list of both where names are whole numbers.

    Args:
        class_names: of the rows; None: not known.
    """
    listed = config.listed
    if listed is None:
        return list(range(num_classes))
    names = list(map(str, range(num_classes))) if class_names is None else class_names
    row_of = {str(int(name)): row for row, name in enumerate(names) if name.isdecimal()}  # 7 is also "007"
    numeric, row_of = bool(row_of), row_of | {name: row for row, name in enumerate(names)}
    given, alone = f"={_written(config.labels)}", not isinstance(config.labels, tuple)
    found = {label: row_of.get(str(label)) for label in listed}
    words = [label for label, row in found.items() if row is None and isinstance(label, str)]
    called = or_imagenet(class_names, num_classes) if words else class_names
    found |= {word: row_called(word, called) for word in words}
    for label in (label for label, row in found.items() if row is None):
        if called is None and isinstance(label, str):
            remedy = f"give their numbers{', or one of ' + ', '.join(WORDS) if alone else ''}"
            raise ConfigError("labels", f"{given}: the names of the classes are not known; {remedy}")
        if isinstance(label, str) or not 0 <= label < num_classes:
            wanted = f"must lie in 0..{num_classes - 1}, the model's classes, or be the name of one: {label} is neither"
            raise ConfigError("labels", f"{given} {wanted}; {_nearest(label, called or names, alone)}")
        if numeric and any(row is not None for row in found.values()):
            problem = f"{given} lists names of classes and {label}, which is none"
            raise ConfigError("labels", f"{problem}; {_nearest(label, names, alone)}")
    return [label if found[label] is None else found[label] for label in listed]  # type: ignore[misc]


def describe_listed(config: SampleConfig, num_classes: int, class_names: Sequence[str] | None) -> str | None:
    """What may be taken for another class, in words: which classes numbers are, and words that classes are called by.

    None where there is nothing to say, as the numbers, and the names of the classes, are those of the rows.
    """
    listed = config.listed
    if listed is None:
        of_all = f"labels={config.labels} is of all classes; the class of that name is labels=[{config.labels}]"
        return of_all if config.labels in (class_names or ()) else None
    rows = dict(zip(listed, listed_classes(config, num_classes, class_names), strict=True))
    names = list(map(str, range(num_classes))) if class_names is None else class_names
    unlike = {label: row for label, row in rows.items() if not isinstance(label, str) and names[row] != str(row)}
    words = {label: row for label, row in rows.items() if label not in names and names[row] == str(row) != str(label)}
    found = [f"{label} is the class {names[row]}, row {row}" for label, row in unlike.items()]
    found += [f"{label} is row {row} in ImageNet's order" for label, row in words.items()]
    return f"labels: {first_few(found, SHOWN)} of the model's {num_classes} classes" if found else None


def choose_labels(
    config: SampleConfig,
    num_classes: int,
    class_counts: Sequence[int] | None = None,
    class_names: Sequence[str] | None = None,
) -> Tensor:
    """The label of every image of a run, int64 [count]; label i is the same whatever the count.

    Drawn labels are uniform ("random"), or as frequent as in the training data ("data"), of which `class_counts` says
    how many images each class has. ConfigError if the config lists a class that there is not, or needs those counts.
    """
    classes = torch.tensor(listed_classes(config, num_classes, class_names))
    if config.labels in ("random", "data"):
        counts = [1] * num_classes if config.labels == "random" else class_counts
        if counts is None:
            problem = "=data needs the class frequencies of the training data, which this run did not record"
            raise ConfigError("labels", f"{problem}; choose random or balanced, or train it for one more checkpoint")
        total, ends_K = sum(counts), torch.tensor(counts).cumsum(0)
        draws = [torch.randint(total, (), generator=generator(config.seed, "label", i)) for i in range(config.count)]
        return torch.searchsorted(ends_K, torch.stack(draws), right=True)  # of images in the order of their classes
    return classes[torch.arange(config.count) % len(classes)]


def _written(labels: int | str | tuple[int | str, ...]) -> str:
    return f"[{', '.join(map(str, labels))}]" if isinstance(labels, tuple) else str(labels)


def _nearest(label: int | str, class_names: Sequence[str], alone: bool) -> str:
    """The remedy behind a label that no class has; one that stands alone may have been meant for one of `WORDS`."""
    known = class_names if re.match(r"n\d", str(label)) else readable_names(class_names, len(class_names))
    return did_you_mean(str(label), [*known, *WORDS] if alone else known)
