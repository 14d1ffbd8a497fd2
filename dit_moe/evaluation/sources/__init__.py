"""What an evaluation reads: a name or a path of the command line → images, statistics, or both."""

from __future__ import annotations

import os
import re
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from dit_moe import checkpoint
from dit_moe import config as configs
from dit_moe.config import ConfigError
from dit_moe.data import DATASETS
from dit_moe.data.latents import MANIFEST
from dit_moe.downloads import NotDownloaded
from dit_moe.evaluation.sources.base import (
    FEATURES_MANIFEST,
    GRID,
    IMAGES_FILE,
    PNG,
    EvaluationInput,
    ReadOptions,
    Source,
    Statistics,
    converted,
    sampled_into,
)
from dit_moe.evaluation.sources.dataset import open_dataset, open_latents
from dit_moe.evaluation.sources.folder import LABELS, FolderSource
from dit_moe.evaluation.sources.npz import open_npz
from dit_moe.files import missing, require_no_stand_in
from dit_moe.registry import did_you_mean
from dit_moe.yaml_text import read_section

__all__ = [
    "IMAGES_FILE",
    "EvaluationInput",
    "ReadOptions",
    "Source",
    "Statistics",
    "converted",
    "open_dataset",
    "open_input",
]

ENCODING = "encoding.json"  # of latents that may not be finished
KINDS = "an npz file, a run, a folder of images or of encoded latents"
EXAMPLE = "'{name: image_folder, path: …, size: 256, split: heldout}'"


def open_input(given: str, options: ReadOptions | None = None) -> EvaluationInput:
    """Images, statistics or both, with the size and the channels that `options` asks for.

    Args:
        given: an npz file, or a folder with images.npz in it that is no run; a folder of encoded latents, which are
            decoded; a folder of images; a dataset, ``digits`` or ``digits/heldout``, or with options
            ``{name: image_folder, path: …, split: heldout}``. What exists as a file is not taken for a dataset.
        options: how files are read.

    Raises ValueError: it names nothing of these, or what it names cannot be evaluated.
    """
    options = options or ReadOptions()
    require_there(given)
    opened = _open_path(Path(given), options) if os.path.exists(given) else _open_dataset(given, options)
    return converted(opened, options)


def _open_path(path: Path, options: ReadOptions) -> EvaluationInput:
    if path.is_dir():
        if (path / MANIFEST).is_file() or (path / ENCODING).is_file():
            return EvaluationInput(open_latents(path))
        _refuse_run(path)
        if (path / IMAGES_FILE).is_file():
            return open_npz(path / IMAGES_FILE, options)
        _refuse_neighbour(path)
        return EvaluationInput(FolderSource(_folder_of_images(path), options))
    require_no_stand_in(path)
    if path.suffix.lower() == ".npz" or zipfile.is_zipfile(path):
        return open_npz(path, options)
    raise ValueError(f"{path} is no npz; name {KINDS}")


def _refuse_run(path: Path) -> None:
    if checkpoint.is_run(path):
        found = next((each for each in (path / IMAGES_FILE, path / PNG) if each.exists()), None)
        images = "" if found is None else f", or name its images, {found}"
        raise ValueError(f"{path} is a run, which can only be SAMPLES; put it first{images}")


def _folder_of_images(path: Path) -> Path:
    """The pictures that `dit-moe sample --out` left in a folder, or the folder itself. ValueError for a grid alone."""
    written = sampled_into(path)["files"]
    if PNG in written and (path / PNG).is_dir():
        return path / PNG
    if not (path / LABELS).is_file() and GRID in written:
        remedy = "sample again with --save npz or --save png"
        raise ValueError(f"{path} holds a grid of samples, {GRID}, and not the samples themselves; {remedy}")
    return path


def _refuse_neighbour(path: Path) -> None:
    """ValueError for a folder that holds something that can be evaluated, or the checkpoints or grids of a run."""
    inside = sorted(each.parent for each in path.glob(f"*/{FEATURES_MANIFEST}"))
    if inside:
        named = next((each for each in inside if each.name.startswith("samples")), inside[0])
        raise ValueError(f"{path} holds folders of features; name one of them, for instance {named}")
    run = path.resolve().parent
    for held in ("checkpoints", "samples"):
        if path.resolve().name == held and checkpoint.is_run(run) and any(path.glob("step_*")):
            what = "checkpoints" if held == "checkpoints" else "grids of samples"
            raise ValueError(f"{path} holds the {what} of a run; name the run, {run}, as SAMPLES")
    settings = path / checkpoint.CONFIG
    if settings.is_file() and re.search(r"^objective:", settings.read_text(encoding="utf-8", errors="replace"), re.M):
        remedy = "train it until it has written one, or name another"
        raise ValueError(f"{path} is a run without a checkpoint; {remedy}")


def require_there(given: str) -> None:
    """ValueError for a path that is not there, or a name that is none of a dataset."""
    name = given.partition("/")[0]
    if os.path.exists(given) or given.lstrip().startswith("{") or name in DATASETS.names():
        return
    if name != given or os.path.splitext(given)[1]:
        raise ValueError(f"{missing(given)}; name {KINDS}, or a dataset")
    meant = did_you_mean(name, DATASETS.names()).replace("known:", "datasets are")
    raise ValueError(f"{given} does not exist, and is no dataset; name {KINDS}, or a dataset: {meant}")


def _open_dataset(given: str, options: ReadOptions) -> EvaluationInput:
    config, split = _read_dataset(given, options)
    try:
        return open_dataset(config, split, options)
    except NotDownloaded:
        raise
    except ConfigError as error:
        raise ValueError(f"{given}: {error}") from None


@dataclass(frozen=True, kw_only=True)
class _Given:
    dataset: Annotated[Any, DATASETS]


def _read_dataset(given: str, options: ReadOptions) -> tuple[Any, str]:
    """Config and split."""
    if given.lstrip().startswith("{"):
        section = read_section(given, EXAMPLE)
        if section["name"] not in DATASETS.names():
            meant = did_you_mean(section["name"], DATASETS.names())
            raise ValueError(f"{given}: there is no dataset {section['name']!r}; {meant}")
    else:
        name, _, split = given.partition("/")
        section = {"name": name, "split": split or "train"}
    split = str(section.pop("split", "train"))
    if options.size and "size" in {field.name for field in fields(DATASETS.config_class(section["name"]))}:
        section = {"size": options.size, **section}
    try:
        return configs.build(_Given, {"dataset": section}).dataset, split
    except ConfigError as error:
        raise ValueError(f"{given}: {error.path.removeprefix('dataset.')}{error.problem}, as in {EXAMPLE}") from None
