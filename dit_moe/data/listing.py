"""Which files of a folder count, by one rule for images, tars and text; what is said of the others; folders as classes.

Hidden files, those that editors and systems leave behind, pipes, devices and broken links never count. Of the rest, the
caller says which do. A folder is listed once, by its own name, whatever links lead to it.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from dit_moe.distributed import join_processes
from dit_moe.formatting import printable, tell

PassedOver = dict[str, dict[str, Any]]  # reason → {"count": entries, "first": name}, JSON-ready

OTHER_KINDS = "files of other kinds"
OUTSIDE_CLASSES = "files outside of the class folders"
LISTED_ALREADY = "links to folders that are listed already"
BROKEN_LINKS = "broken links"
SPECIAL = "pipes, sockets or devices"
FOLDERS = "folders"
BROKEN = "images that cannot be used"
NO_IMAGES = "class folders without images"

SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "heldout"}
FEW_CLASSES = 1000  # so many there may be whatever the number of images
ONE_CLASS = "all"  # what images without class folders are called

_LEFT_BEHIND = {
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir", "lost+found"),
    *("$recycle.bin", "system volume information", "__pycache__"),
}
_UNFINISHED = ("~", ".bak", ".orig", ".swp", ".tmp", ".part", ".partial", ".crdownload", ":zone.identifier")


class Listing(NamedTuple):
    """What is in a folder: paths below it, in no order."""

    files: list[bytes]
    folders: list[bytes]
    passed_over: PassedOver


def list_files(
    folder: str, why_not: Callable[[str, str], str | None], own: Collection[str] = (), recursive: bool = True
) -> Listing:
    """The files of a folder, and of all folders in it, that count.

    Args:
        folder: where to look; it may be a link.
        why_not: of a file's name and its whole path, why it does not count; None if it does.
        own: names in `folder` itself that are read for another purpose, and are neither listed nor passed over.
        recursive: whether to look into the folders in it.

    Raises ValueError if a folder, or a file that has to be looked into, cannot be read.
    """
    root, found = os.fsencode(folder), Listing([], [], {})
    here = os.path.realpath(root)
    above = {os.path.realpath(each) for each in Path(os.path.abspath(folder)).parents}
    seen = {os.fsencode(each) for each in {*above, *map(str, Path(os.fsdecode(here)).parents)}}
    waiting, links = [(b"", here)], list[tuple[bytes, bytes]]()
    while waiting or links:
        below, real = waiting.pop() if waiting else heapq.heappop(links)
        if below and real in seen:
            pass_over(found.passed_over, LISTED_ALREADY, os.fsdecode(below))
            continue
        seen.add(real)
        if below:
            found.folders.append(below)
        for entry in _entries(os.path.join(root, below)):
            path = os.path.join(below, entry.name)
            name = os.fsdecode(entry.name)
            if not below and name in own:
                continue
            kind, reason = _kind(entry), never_counts(name)
            if reason is not None:
                pass_over(found.passed_over, f"{reason} {kind if kind == FOLDERS else 'files'}", os.fsdecode(path))
            elif kind == FOLDERS and not recursive:
                pass_over(found.passed_over, FOLDERS, os.fsdecode(path))
            elif kind == FOLDERS and entry.is_symlink():
                heapq.heappush(links, (path, os.path.realpath(entry.path)))
            elif kind == FOLDERS:
                waiting.append((path, os.path.join(real, entry.name)))
            elif kind is not None or (kind := why_not(name, os.fsdecode(entry.path))) is not None:
                pass_over(found.passed_over, kind, os.fsdecode(path))
            else:
                found.files.append(path)
    return found


def never_counts(name: str) -> str | None:
    """Why a file or folder of this name is not looked at, whatever it holds; None if it is."""
    if name.startswith("."):
        return "hidden"
    lower = name.lower()
    if lower in _LEFT_BEHIND or lower.endswith(_UNFINISHED) or (len(name) > 1 and name[0] == name[-1] == "#"):
        return "temporary"
    return None


def first_bytes(path: str, count: int = 32) -> bytes:
    """How a file begins. ValueError if it cannot be read."""
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read(count)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); make it readable, or take it out") from None


def pass_over(found: PassedOver, reason: str, name: str) -> None:
    """Count one more entry that does not count for this reason.

    Its name is for people: bytes in it that are no UTF-8 are written out, as records of runs are Unicode.
    """
    name = printable(name)
    seen = found.setdefault(reason, {"count": 0, "first": name})
    seen["count"] += 1
    seen["first"] = min(seen["first"], name)


def merged(found: Iterable[PassedOver]) -> PassedOver:
    """The counts of several places together."""
    total: PassedOver = {}
    for reason, each in (item for one in found for item in one.items()):
        seen = total.setdefault(reason, {"count": 0, "first": each["first"]})
        total[reason] = {"count": seen["count"] + each["count"], "first": min(seen["first"], each["first"])}
    return total


def say_passed_over(place: str, found: PassedOver) -> None:
    """One line on stderr: how many entries of `place` were passed over, why, and the first of each kind."""
    if found:
        kinds = [
            f"{reason} ({each['count']:,}: {each['first']}{', …' if each['count'] > 1 else ''})"
            for reason, each in sorted(found.items())
        ]
        note(f"{place}: passed over are {', '.join(kinds)}")


def facts_of_listing(source: Any) -> dict[str, PassedOver]:
    """What a record says of how a source was listed: nothing, if nothing was passed over."""
    found = getattr(source, "passed_over", None)
    return {"passed_over": found} if found else {}


@lru_cache
def note(text: str) -> None:
    """One line on stderr, once, and on the main process alone."""
    if join_processes().is_main_process:
        tell(f"note: {text}")


# --------------------------------------------------------------------------------------------------- folders as classes


class ClassFolders(NamedTuple):
    """The label of each class folder, and the names of all classes: of the labels 0, 1, …"""

    label_of: dict[str, int]
    names: tuple[str, ...]


def in_sorted_order(folders: Sequence[str]) -> ClassFolders:
    """The label of a folder is its place among `folders`."""
    return ClassFolders({folder: label for label, folder in enumerate(folders)}, tuple(folders))


def number_classes(place: str, folders: Sequence[str], images: int) -> ClassFolders:
    """Folders whose names all are whole numbers have these as labels; others are numbered in sorted order.

    A line on stderr says so, unless the numbers are 0, 1, … without a gap.

    Args:
        place: where they are, for messages.
        folders: their names, sorted.
        images: how many there are in all.

    Raises ValueError if two folders are the same number, or one is a number far above that of the images.
    """
    numbers = whole_numbers(folders)
    if numbers is None:
        if len(folders) > 1:
            some = [f"{folder} = {label}" for label, folder in enumerate(folders)]
            shown = some if len(some) <= 4 else [*some[:2], "…", some[-1]]
            note(f"{place}: class folders are labels in sorted order, {', '.join(shown)}")
        return in_sorted_order(folders)
    label_of = dict(zip(folders, numbers, strict=True))
    folder_of = {label: folder for folder, label in label_of.items()}
    if len(folder_of) < len(folders):
        same = next(folder for folder, label in label_of.items() if folder_of[label] != folder)
        raise ValueError(f"{place}: the class folders {same} and {folder_of[label_of[same]]} are one label; join them")
    if (largest := max(numbers)) >= max(images, FEW_CLASSES):
        problem = f"the class folder {folder_of[largest]} is a label by its number, but there are {images} images"
        raise ValueError(f"{place}: {problem}; if the numbers are names and not labels, put a letter before each")
    if len(folders) <= largest:
        classes = f"{len(folders)} of the {largest + 1} classes 0 to {largest} have images"
        note(f"{place}: class folders are labels by their numbers; {classes}")
    return ClassFolders(label_of, tuple(folder_of.get(label, str(label)) for label in range(largest + 1)))


def require_unicode_names(place: str, class_names: Sequence[str]) -> None:
    """ValueError for a class whose name is not UTF-8: checkpoints and results could not be read again."""
    for name in class_names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{place}: the name of the class {printable(name)} is not UTF-8; rename it") from None


def say_one_class(place: str, images: int) -> None:
    """A line on stderr: these images have no class folders, and so are one class."""
    note(f"{place}: {images:,} images without class folders are one class; for several, give each a folder")


def whole_numbers(names: Sequence[str]) -> list[int] | None:
    """The names as numbers, if all of them are."""
    numeric = names and all(len(name) <= 9 and name.isascii() and name.isdigit() for name in names)
    return [int(name) for name in names] if numeric else None


def are_numbers(names: Sequence[str]) -> bool:
    """Whether class names are the labels themselves: 0, 1, …"""
    return whole_numbers(names) == list(range(len(names)))


def require_no_splits(place: str, folders: Sequence[str], deep: bool) -> None:
    """ValueError if all folders that are to be classes are called as splits are.

    A single one may be, unless it is `deep`: it holds folders.
    """
    if (deep or len(folders) > 1) and {folder.lower() for folder in folders} <= SPLITS:
        named = " and ".join(folders)
        remedy = f"name one of them, as in path=…/{folders[-1]}"
        raise ValueError(f"{place} has the folders {named}, which are splits, not classes; {remedy}")


def _entries(path: bytes) -> list[os.DirEntry[bytes]]:
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except OSError as error:
        problem = f"{os.fsdecode(path)} cannot be read ({error.strerror})"
        raise ValueError(f"{problem}; make it readable, or take it out") from None


def _kind(entry: os.DirEntry[bytes]) -> str | None:
    """`FOLDERS`, or why what is no file does not count; None for a file. Links are followed."""
    try:
        if entry.is_dir():
            return FOLDERS
        if entry.is_file():
            return None
        return BROKEN_LINKS if entry.is_symlink() and not os.path.exists(entry.path) else SPECIAL
    except OSError:  # a link that leads to itself, or through a folder that cannot be entered
        return BROKEN_LINKS
