"""A folder of image files, flat or in sub-folders, written by any program."""

# N images, C channels, H height, W width

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from dit_moe.config import shown
from dit_moe.data.image_source import ImageSource, ImageSourceConfig
from dit_moe.data.images import (
    FORMATS,
    BadImage,
    list_images,
    no_image,
    own_limits,
    read_file,
    require_bytes,
    require_size,
)
from dit_moe.data.listing import (
    SPLITS,
    facts_of_listing,
    first_bytes,
    note,
    number_classes,
    pass_over,
    require_unicode_names,
    say_passed_over,
    whole_numbers,
)
from dit_moe.evaluation.sources.base import (
    GRID,
    ReadOptions,
    Source,
    describe_sizes,
    facts_of_images,
    sampled_into,
    sha256_of_labels,
)
from dit_moe.evaluation.sources.dataset import LEAVE_OUT, images_of
from dit_moe.json_files import load
from dit_moe.pictures import CLASSES, LABELS
from dit_moe.sampling.outputs import SAMPLE_JSON


class FolderSource(Source):
    """Images in the order of their paths, folder by folder; what does not count as one is passed over and said.

    They must all be of one size, unless `options.size` gives the size to crop them to; they have 1 channel if all are
    grey, and 3 otherwise. Labels come from labels.json, or else from sub-folders if all images lie in them: these are
    whole numbers, or two or more names (`number_classes`). Only headers are read here.

    Raises ValueError: no images, a file that is none, several sizes, or labels that do not fit the images.
    """

    label_remedy = f"sort them into one sub-folder per class, or write {LABELS}, {{file: label}}, into it"

    def __init__(self, folder: str | Path, options: ReadOptions | None = None) -> None:
        self.folder, self.options, self.name = Path(folder), options or ReadOptions(), str(folder)
        grids = [GRID] if GRID in sampled_into(self.folder)["files"] else []
        found, _, self.passed_over = list_images(self.name, own=(LABELS, SAMPLE_JSON, *grids))
        for grid in grids:
            pass_over(self.passed_over, "grids of samples", grid)
        self.files = sorted(map(os.fsdecode, found), key=lambda path: path.split("/"))
        say_passed_over(self.name, self.passed_over)
        if not self.files:
            known = ", ".join(FORMATS)
            raise ValueError(f"{folder} has no images; known are {known}, in it or in folders in it, or an images.npz")
        self._paths = [os.path.join(self.name, file) for file in self.files]
        headers = self._read_headers()
        self.labels_N, self.class_names = _labels(self.folder, self.files)
        size, channels = self.options.size, 1 if all(header.grey for header in headers) else 3
        self.image_shape = (channels, size, size) if size else (channels, headers[0].height, headers[0].width)
        self._images = _Files(self._paths, size)
        formats, sizes = {header.form for header in headers}, {(header.width, header.height) for header in headers}
        resized, greys = size is not None and sizes != {(size, size)}, {header.grey for header in headers}
        self._stored = {
            "formats": sorted(formats),
            "resized_from": describe_sizes(sizes) if resized else None,
            "converted": "grey and colour to 3 channels" if len(greys) == 2 else None,
        }

    def __len__(self) -> int:
        return len(self.files)

    def identity(self) -> dict[str, Any]:
        """Of the names and the content of all files. ValueError if one cannot be read."""
        return {
            "kind": "folder",
            "sha256": self._sha256,
            "labels_sha256": sha256_of_labels(self.labels_N),
            "count": len(self),
            "image_shape": list(self.image_shape),
            "size": self.options.size,
        }

    def facts(self) -> dict[str, Any]:
        classes = {} if self.class_names is None else {"class_names": list(self.class_names)}
        return facts_of_images(self.folder) | {"stored": self._stored} | classes | facts_of_listing(self)

    def batches(self, parts: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """Raises ValueError naming all images of a batch that are broken."""
        for images_BCHW in images_of(self._images, parts, self.options.workers):
            yield images_BCHW[:, : self.image_shape[0]]  # all three of a grey one are the same

    def _read_headers(self) -> list[_Header]:
        with own_limits(), ThreadPoolExecutor() as pool:
            headers = list(pool.map(partial(_read_header, size=self.options.size), self._paths))
        first = headers[0]
        for header, file in zip(headers, self.files, strict=True):
            if self.options.size is None and (header.width, header.height) != (first.width, first.height):
                found = f"{self.files[0]} is {first.width}×{first.height} and {file} {header.width}×{header.height}"
                raise ValueError(f"{self.folder}: {found}; give --size N to crop and resize all to N×N, as ADM does")
        return headers

    @cached_property
    def _sha256(self) -> str:
        digest = hashlib.sha256()
        with ThreadPoolExecutor() as pool:
            for file, content in zip(self.files, pool.map(_sha256_of, self._paths), strict=True):
                digest.update(os.fsencode(file) + b"\0" + content)
        return digest.hexdigest()


class _Files(ImageSource):
    """Reads and decodes as the datasets of images do."""

    def __init__(self, paths: Sequence[str], size: int | None) -> None:
        labels_N = np.zeros(len(paths), np.int64)  # not used
        super().__init__(ImageSourceConfig(size=size, min_side=1), "train", labels_N, (), fingerprint="")
        self.paths = paths

    def locate(self, image: int) -> str:
        return self.paths[image]

    def read(self, image: int) -> bytes:
        return read_file(self.paths[image], self.config.max_megapixels)

    def keep(self, image_K: np.ndarray) -> None:
        super().keep(image_K)
        self.paths = [self.paths[image] for image in image_K]


class _Header(NamedTuple):
    width: int
    height: int
    grey: bool
    form: str  # JPEG, PNG, …


def _read_header(path: str, size: int | None) -> _Header:
    """ValueError, naming the file, unless it begins as an image does that can be decoded to `size`."""
    limit = ImageSourceConfig.max_megapixels
    try:
        require_bytes(os.path.getsize(path), limit)
        with Image.open(path, formats=FORMATS) as image:
            require_size(image.size, size, 1, limit)
            grey = image.mode in ("1", "L", "LA") or image.mode.startswith("I")  # I: 16 bits
            return _Header(*image.size, grey, image.format or "")
    except BadImage as error:
        problem = str(error)
    except UnidentifiedImageError:
        problem = no_image(first_bytes(path, 1024))
    except Exception as error:  # Pillow's parsers raise OSError, SyntaxError, struct.error, zlib.error, …
        problem = f"cannot be read ({' '.join(str(error).split()) or type(error).__name__})"
    raise ValueError(f"{path} {problem}; mend it, or {LEAVE_OUT}")


def _sha256_of(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); mend it, or {LEAVE_OUT}") from None


def _labels(folder: Path, files: Sequence[str]) -> tuple[Tensor | None, tuple[str, ...] | None]:
    """The labels of the images, and the names of the classes where folders or labels.json have them."""
    path = folder / LABELS
    tops = [file.partition("/")[0] if "/" in file else None for file in files]
    folders = sorted({top for top in tops if top})
    if os.path.lexists(path):
        labels, names = _read_labels(path, files)
        for top, label, file in zip(tops, labels, files, strict=True):
            if whole_numbers(folders) is not None and top is not None and int(top) != label:
                note(f"{folder}: {LABELS} counts and not the folders, as for {file} with the label {label}")
                break
        return torch.tensor(labels, dtype=torch.int64), names
    if not folders or (len(folders) < 2 and whole_numbers(folders) is None) or SPLITS.issuperset(folders):
        return None, None
    if None in tops:
        note(f"{folder}: {tops.count(None)} images lie outside of the class folders, so that no image has a label")
        return None, None
    require_unicode_names(str(folder), folders)
    classes = number_classes(str(folder), folders, len(files))
    return torch.tensor([classes.label_of[top] for top in tops if top], dtype=torch.int64), classes.names


def _read_labels(path: Path, files: Sequence[str]) -> tuple[list[int], tuple[str, ...] | None]:
    """Of a file {"000000.png": 3, …}, which may name the classes: {"classes": ["airplane", …], …}."""
    remedy = "mend it, or remove it to go on without labels"
    labels = load(path, remedy)
    if not isinstance(labels, dict):
        raise ValueError(f"{path} must be a JSON object of file names and labels; {remedy}")
    names = labels.pop(CLASSES, None) if CLASSES not in files else None
    texts = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if names is not None and (not texts or len({*names}) < len(names)):
        raise ValueError(f"{path} has {CLASSES}={shown(names)}; wanted the names of the classes, each once; {remedy}")
    for file in files:
        if file not in labels:
            raise ValueError(f"{path} has no label for {file}; {remedy}")
        label = labels[file]
        if type(label) is not int or label < 0:
            raise ValueError(f"{path} has the label {shown(label)} for {file}; wanted a whole number ≥ 0; {remedy}")
        if names is not None and label >= len(names):
            raise ValueError(f"{path} has the label {label} for {file}, and names {len(names)} classes; {remedy}")
    if missing := sorted(labels.keys() - set(files)):
        raise ValueError(f"{path} has a label for {missing[0]}, which is not there; copy all images, or {remedy}")
    return [labels[file] for file in files], None if names is None else tuple(names)
