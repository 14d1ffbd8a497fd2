"""A word of the command line → what it names."""

from __future__ import annotations

import os
import re
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from dit_moe import checkpoint, yaml_text
from dit_moe import config as configs
from dit_moe.config import ConfigError
from dit_moe.data import DATASETS
from dit_moe.data.manifest import MANIFEST
from dit_moe.evaluation.sources.base import Opened, ReadOptions
from dit_moe.evaluation.sources.converted import converted
from dit_moe.evaluation.sources.dataset import open_dataset
from dit_moe.evaluation.sources.folder import FolderSource
from dit_moe.evaluation.sources.latents import open_latents
from dit_moe.evaluation.sources.npz import open_npz
from dit_moe.evaluation.stored import MANIFEST as FEATURES
from dit_moe.registry import did_you_mean

IMAGES_FILE = "images.npz"
ENCODING = "encoding.json"  # of latents that may not be finished
FILES = "an npz file, a run, a folder of images or of encoded latents"
EXAMPLE = "'{name: image_folder, path: …, size: 256, split: heldout}'"


def open_word(word: str, options: ReadOptions | None = None) -> Opened:
    """Images, statistics or both, brought to the size and the channels that `options` wants.

    * an npz file, or a folder with images.npz in it that is no run;
    * a folder of encoded latents, which are decoded;
    * a folder of images;
    * a dataset, ``digits`` or ``digits/heldout``, or with options ``{name: image_folder, path: …, split: heldout}``.
      What exists as a file goes first.

    Raises ValueError: it names nothing of the kind, or what it names cannot be evaluated.
    """
    options = options or ReadOptions()
    return converted(_open_path(Path(word), options) if os.path.exists(word) else _open_dataset(word, options), options)


def _open_path(path: Path, options: ReadOptions) -> Opened:
    if path.is_dir():
        if (path / MANIFEST).is_file() or (path / ENCODING).is_file():
            return Opened(open_latents(path))
        _refuse_run(path)
        if (path / IMAGES_FILE).is_file():
            return open_npz(path / IMAGES_FILE, options)
        _refuse_near(path)
        return Opened(FolderSource(path, options))
    if path.suffix.lower() == ".npz" or zipfile.is_zipfile(path):
        return open_npz(path, options)
    raise ValueError(f"{path} is no npz; name {FILES}")


def _refuse_run(path: Path) -> None:
    if checkpoint.is_run(path):
        images = f", or name its images, {path / IMAGES_FILE}" if (path / IMAGES_FILE).is_file() else ""
        raise ValueError(f"{path} is a run, which can only be SAMPLES; put it first{images}")


def _refuse_near(path: Path) -> None:
    """What is no folder of images, and stands above or below something that can be evaluated."""
    inside = sorted(each.parent for each in path.glob(f"*/{FEATURES}"))
    if inside:
        named = next((each for each in inside if each.name.startswith("samples")), inside[0])
        raise ValueError(f"{path} holds folders of features; name one of them, for instance {named}")
    if checkpoint.is_run(path.parent):
        raise ValueError(f"{path} holds the checkpoints of a run; name the run, {path.parent}, as SAMPLES")
    settings = path / checkpoint.CONFIG
    if settings.is_file() and re.search(r"^objective:", settings.read_text(errors="replace"), re.M):
        remedy = "train it until it has written one, or name another"
        raise ValueError(f"{path} is a run without a checkpoint; {remedy}")


def _open_dataset(word: str, options: ReadOptions) -> Opened:
    config, split = _read_dataset(word, options)
    try:
        return open_dataset(config, split, options)
    except ConfigError as error:
        raise ValueError(f"{word}: {error}") from None


@dataclass(frozen=True, kw_only=True)
class _Word:
    dataset: Annotated[Any, DATASETS]


def _read_dataset(word: str, options: ReadOptions) -> tuple[Any, str]:
    """Config and split."""
    if word.lstrip().startswith("{"):
        section = _parse(word)
        split = section.pop("split", "train")
    else:
        name, _, split = word.partition("/")
        section, split = {"name": name}, split or "train"
        if name not in DATASETS.names():
            meant = did_you_mean(name, DATASETS.names()).replace("known:", "datasets are")
            raise ValueError(f"{word} does not exist, and is no dataset; name {FILES}, or a dataset: {meant}")
    if options.size and "size" not in section and _has_size(section["name"]):
        section["size"] = options.size
    try:
        return configs.build(_Word, {"dataset": section}).dataset, str(split)
    except ConfigError as error:
        raise ValueError(f"{word}: {error.path.removeprefix('dataset.')}{error.problem}, as in {EXAMPLE}") from None


def _parse(word: str) -> dict[str, Any]:
    try:
        section: Any = yaml_text.read(word)
    except ValueError as error:
        raise ValueError(f"{word} is not valid YAML ({error}); wanted {EXAMPLE}") from None
    name = section.get("name") if isinstance(section, dict) else None
    if not isinstance(name, str):
        raise ValueError(f"{word} has no name of a dataset; wanted {EXAMPLE}")
    if name not in DATASETS.names():
        raise ValueError(f"{word}: there is no dataset {name!r}; {did_you_mean(name, DATASETS.names())}")
    return section


def _has_size(name: str) -> bool:
    return "size" in {field.name for field in fields(DATASETS.config_class(name))}
