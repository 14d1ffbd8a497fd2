"""List the configs and studies that come with dit-moe, or print one to copy and change.

Every command that takes a config takes the name of one of these, too, unless there is a file of that name. So does
`base:` in a config of yours. What is printed names its own bases like that: it works in any folder.

    dit-moe configs
    dit-moe configs imagenet256    # all of a folder that the list has in one line
    dit-moe configs show digits
    dit-moe configs show imagenet256/DiT-S-2-8E2A
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from dit_moe import built_in
from dit_moe.registry import did_you_mean

MOST = 5  # configs of a folder that the list has a line each for
OWN_IMAGES = "my_images"  # heads the list


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `run` reads."""
    parser.add_argument("what", nargs="?", metavar="FOLDER|show", help="list those of a folder; show NAME: print one")
    parser.add_argument("name", nargs="?", metavar="NAME", help="which one")


def run(args: argparse.Namespace) -> None:
    """Print to stdout. ValueError for a name that is unknown or missing."""
    if args.what == "show":
        if args.name is None:
            raise ValueError("show needs the name of a config, for instance digits; `dit-moe configs` lists them")
        print(built_in.to_copy(args.name), end="")
    else:
        if args.name is not None:
            raise ValueError(f"{args.what} {args.name}: to print one say show {args.name}; a folder stands alone")
        rows = _all() if args.what is None else _of_folder(args.what.rstrip("/"))
        width = max(len(name) for name, _ in rows)
        print("".join(f"{name:{width}}  {told}\n" for name, told in rows), end="")


def _all() -> list[tuple[str, str]]:
    """What to begin with first; the folders that hold many configs last, each in one line."""
    each, folders = [], []
    for folder, names in built_in.by_folder().items():
        if folder and len(names) > MOST:
            about = f". {built_in.summary(base)}" if (base := f"{folder}/base") in names else ""
            folders.append((f"{folder}/…", f"{len(names)} configs, see `dit-moe configs {folder}`{about}"))
        else:
            each += names
    each.sort(key=lambda name: (name != OWN_IMAGES, "/" in name))
    return _told(each) + folders


def _of_folder(folder: str) -> list[tuple[str, str]]:
    if folder in built_in.names():
        raise ValueError(f"{folder} is a config; `dit-moe configs show {folder}` prints it")
    by_folder = built_in.by_folder()
    if folder not in by_folder:
        known = [name for name in by_folder if name]
        raise ValueError(f"{folder} is no folder of built-in configs; {did_you_mean(folder, known)}")
    return _told(by_folder[folder])


def _told(names: Iterable[str]) -> list[tuple[str, str]]:
    return [(name, built_in.summary(name)) for name in names]
