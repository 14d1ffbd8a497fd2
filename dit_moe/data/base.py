"""What a dataset is: labelled images, or moments of latents they were encoded to, fetched a whole batch at a time.

And what datasets share: where a split is.
"""

# B batch, M moments, C channels, H height, W width (of images or of latents, as the name says)

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from dit_moe.config import require
from dit_moe.registry import Registry, did_you_mean

DATASETS = Registry("dataset")  # DATASETS.build(config, split)


class Dataset(Protocol):
    """A map-style dataset. `DATASETS.build(config, split)` makes one; NoSuchSplit if there is no such split.

    `__getitems__` is what torch's loaders call with a whole batch of indices, so one call serves one read of a shard.
    A row never depends on when, or beside which others, it is fetched.
    """

    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]  # (C, H, W) of the images, encoded or not
    # Of what the files hold, as far as their names, labels, sizes (in a folder, those of some files) or recorded hashes
    # tell, wherever they lie; None: nothing outside the code can change it.
    fingerprint: str | None

    # `parts`, where there is such an attribute, names by real paths or hashes what is read, and by no other split.

    def __len__(self) -> int: ...

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Rows in the order of `indices`, of one of two kinds:

        * {"images": uint8 [B, C, H, W], "labels": int64 [B]};
        * {"moments": fp16, bf16 or fp32 [B, M, C, H, W], "labels": int64 [B]}, where M is 2, mean and std, or 1 from a
          deterministic encoder.
        """
        ...

    def class_counts(self) -> list[int]:
        """Images of each class, mirrored ones not counted. Reads labels only."""
        ...


class BrokenImages(ValueError):
    """Some images of a batch cannot be used. `problems`: dataset index → what is wrong, naming the file."""

    def __init__(self, problems: Mapping[int, str]) -> None:
        self.problems = dict(problems)
        first, *others = dict.fromkeys(self.problems.values())  # a mirrored row has its image's problem
        more, them = (f", and {len(others)} more", "them") if others else ("", "it")
        remedy = f"mend {them}, or set skip_broken=true in the section of the images, data.skip_broken=true for one"
        super().__init__(f"{first}{more}; {remedy}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.problems,)  # so that a loader's process can hand it over


class NoSuchSplit(ValueError):
    """Data that are there have no split of that name, only those of `splits`."""

    def __init__(self, contents: str, split: str, splits: Iterable[str]) -> None:
        super().__init__(f"{contents} have no split {split!r}; {did_you_mean(split, splits)}")


def place_of(config: Any, split: str, contents: str, train: str = "path") -> tuple[str, str]:
    """The option of `config` that says where the `contents` of a split are, and what it says.

    Raises NoSuchSplit, and ConfigError if the option is not given.
    """
    by_share = isinstance(getattr(config, "heldout", None), float)
    options = {"train": train, "heldout": train if by_share else "heldout"}
    if getattr(config, "reserve", 0):
        options["extractor"] = train
    if split not in options:
        raise NoSuchSplit(contents, split, options)
    option = options[split]
    place = getattr(config, option)
    require(place is not None, config, option, f"names no held-out {contents}; say where they are")
    require(place != "", config, option, f"is empty; say where the {contents} are")
    return option, place
