"""The last lines of a command, on stderr: where its results are, and the commands that go on from them."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.filesize import decimal

from dit_moe import plugins
from dit_moe.config import Tree
from dit_moe.files import disk_used
from dit_moe.formatting import printable


def scoring(command: str, experiment: Tree, run: Path) -> list[tuple[object, ...]]:
    """The command that measures how good a run is, unless the data that it needs are not there, or not named.

    Args:
        command: "eval", or "perplexity".
        experiment: the whole config of the run.
    """
    data = images_of(experiment)
    is_folder = data.get("name") in (None, "image_folder")  # None: of tokens
    there = data.get("name") != "latents" and (not is_folder or Path(data["path"]).exists())
    return [(command, run)] if there or experiment["eval"].get("reference") else []


def images_of(experiment: Tree) -> Tree:
    """The section that names the data themselves; where it names latents, nothing says of which images they are."""
    encode = experiment.get("encode")
    section: Tree = encode["images"] if encode else experiment["data"]
    return section


def end(results: Iterable[Path], *commands: Sequence[object]) -> None:
    """On the main process: say the results with their sizes, and the commands to go on with.

    Args:
        results: files and folders; one that is not there is left out.
        commands: the words of each after `dit-moe`; they are quoted for the shell here.
    """
    if os.environ.get("RANK", "0") == "0":
        sys.stdout.flush()  # so that what was printed stands before this where both go to one file
        sizes = [f"{path} ({decimal(disk_used(path))})" for path in results if path.exists()]
        _say("results", sizes)
        say_next(*commands)


def say_next(*commands: Sequence[object]) -> None:
    """Say only the commands, whichever process this is."""
    _say("next", [shlex.join(["dit-moe", *map(str, words), *plugins.options()]) for words in commands])


def _say(title: str, lines: Sequence[str]) -> None:
    for first, line in zip([title, *[""] * len(lines)], lines, strict=False):
        print(f"{first:8} {printable(line)}", file=sys.stderr)
