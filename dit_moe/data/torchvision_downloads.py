"""The image sets that torchvision downloads, what they are called there, and their files, checked by their md5."""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

from dit_moe.config import ConfigError, NotThere
from dit_moe.data.listing import note
from dit_moe.downloads import require_allowed, require_reachable
from dit_moe.locks import exclusive


class DownloadedSet(NamedTuple):
    """A set of labelled images."""

    kind: str  # its class in torchvision.datasets
    folder: str  # that the archive is unpacked to
    classes: int
    splits: Mapping[str, Mapping[str, Any]]  # by name, the arguments that choose it
    archives: Callable[[Any], Sequence[tuple[str, str]]]  # of that class, the URL and md5 of what is downloaded
    archives_to: str = ""  # the folder, beside `folder` or the same, that it is downloaded to
    side: int | None = None  # pixels, if all images are square and of one size
    pickles: Callable[[Any], Sequence[tuple[str, str]]] = lambda kind: ()  # in `folder`, with their md5


def _splits(*names: str) -> dict[str, Mapping[str, Any]]:
    return {name: {"split": name, "loader": os.fspath} for name in names}  # files are read as those of all sources


def _cifar(kind: str, folder: str, classes: int) -> DownloadedSet:
    return DownloadedSet(
        kind,
        folder,
        classes,
        {"train": {"train": True}, "test": {"train": False}},
        lambda kind: [(kind.url, kind.tgz_md5)],
        side=32,
        pickles=lambda kind: [*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])],
    )


OWN_FOLDER = "name a folder that has its images in class folders"
SETS = {
    "cifar10": _cifar("CIFAR10", "cifar-10-batches-py", 10),
    "cifar100": _cifar("CIFAR100", "cifar-100-python", 100),
    "dtd": DownloadedSet(
        "DTD", "dtd", 47, _splits("train", "val", "test"), lambda kind: [(kind._URL, kind._MD5)], "dtd"
    ),
    "flowers102": DownloadedSet(
        "Flowers102",
        "flowers-102",
        102,
        _splits("train", "val", "test"),
        lambda kind: [(kind._download_url_prefix + name, md5) for name, md5 in kind._file_dict.values()],
        "flowers-102",
    ),
    "food101": DownloadedSet(
        "Food101", "food-101", 101, _splits("train", "test"), lambda kind: [(kind._URL, kind._MD5)]
    ),
    "imagenette": DownloadedSet(
        "Imagenette", "imagenette2", 10, _splits("train", "val"), lambda kind: [kind._ARCHIVES["full"]]
    ),
    "stl10": DownloadedSet(
        "STL10",
        "stl10_binary",
        10,
        {"train": {"split": "train"}, "test": {"split": "test"}},
        lambda kind: [(kind.url, kind.tgz_md5)],
        side=96,
    ),
}


def open_split(name: str, path: str, split: str) -> Any:
    """A split of the set `name` in the folder `path`, as torchvision has it; what is missing there is downloaded.

    Nothing is unpickled before the md5 of every pickled file is found to be the one that torchvision has on record.

    Raises ConfigError if files are damaged, and NotThere if they cannot, or may not, be downloaded.
    """
    import torchvision.datasets  # late: half a second
    from torchvision.datasets.utils import check_integrity

    found = SETS[name]
    kind, unpacked = getattr(torchvision.datasets, found.kind), Path(path, found.folder)
    if not unpacked.is_dir():
        urls = " and ".join(url for url, _ in found.archives(kind))
        require_allowed("path", f"={path} has no {found.folder}", "torchvision", urls, OWN_FOLDER)
        with exclusive(Path(path), name, wait=True):
            if not unpacked.is_dir():  # else another process was faster
                _download(found, kind, Path(path))
    remedy = f"delete {unpacked}, and it is downloaded again"
    for file, md5 in found.pickles(kind):
        if not check_integrity(str(unpacked / file), md5):
            raise ConfigError("path", f"={path}: {unpacked / file} is missing or damaged, by its md5; {remedy}")
    try:
        return kind(path, **found.splits[split])
    except (RuntimeError, OSError, ValueError, pickle.UnpicklingError) as error:
        raise ConfigError("path", f"={path}: {unpacked} cannot be read ({error}); {remedy}") from None


def _download(found: DownloadedSet, kind: Any, path: Path) -> None:
    """Unpack a set into `path`, from archives that were put there, or else downloaded ones; complete or not at all."""
    from torchvision.datasets.utils import check_integrity

    archives = [(url, path / url.rpartition("/")[2], md5) for url, md5 in found.archives(kind)]
    for _, file, md5 in archives:
        if file.exists() and not check_integrity(str(file), md5):
            problem = f"={path}: {file} is not the file of {found.kind}, whose md5 is {md5}"
            raise ConfigError("path", f"{problem}; delete it, and it is downloaded")
    missing = [(url, file) for url, file, _ in archives if not file.exists()]
    with tempfile.TemporaryDirectory(dir=path, prefix=".") as private:
        made = Path(private, found.archives_to)
        made.mkdir(exist_ok=True)
        for _, file, _ in archives:
            if file.exists():
                _link_or_copy(file, made / file.name)
        try:
            if missing:
                require_reachable(missing[0][0])
                note(f"downloading {', '.join(url for url, _ in missing)} to {path}")
            kind(private, download=True)
        except (OSError, HTTPException, RuntimeError) as error:
            problem = f"={path} has no {found.folder}, and it cannot be downloaded ({error})"
            files = " and ".join(f"{file.name} (from {url})" for url, file in missing)
            remedy = f"put {files or found.folder} there, or {OWN_FOLDER}"
            raise NotThere("path", f"{problem}; {remedy}") from None
        Path(private, found.folder).rename(path / found.folder)


def _link_or_copy(file: Path, to: Path) -> None:
    """Copied on file systems that have no hard links."""
    try:
        os.link(file, to)
    except OSError:
        shutil.copyfile(file, to)
