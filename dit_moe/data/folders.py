"""Data made beforehand lies in a folder for each split."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dit_moe.config import ConfigError
from dit_moe.registry import did_you_mean


def folder_of_split(folders: Mapping[str, str | None], split: str, kind: str, contents: str) -> Path:
    """The folder that holds a split of the `kind`: latents, tokens.

    Raises:
        ValueError: there is no such split.
        ConfigError: no folder is named for it; the message asks for one with such `contents`.
    """
    if split not in folders:
        raise ValueError(f"{kind} have no split {split!r}; {did_you_mean(split, folders)}")
    folder = folders[split]
    if folder is None:
        raise ConfigError(split, f" is missing; name a folder {contents}")
    if not folder:  # to Python it is the folder that one is in
        raise ConfigError("heldout" if split == "heldout" else "path", "= is empty; name a folder")
    return Path(folder)
