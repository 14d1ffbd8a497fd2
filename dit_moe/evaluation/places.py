"""Where `dit-moe eval` writes, held against what it reads before anything is made."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from dit_moe.distributed import locked
from dit_moe.evaluation.sources import IMAGES_FILE
from dit_moe.files import require_writable
from dit_moe.sampling.outputs import FACTS

ENDINGS = {"out": ".json", "save_stats": ".npz", "save_npz": ".npz"}  # of the files that these options name
OF_FEATURES = re.compile(r"reference|heldout|reconstruction|samples_\d+")  # in the folder of --features


def features_folder(args: argparse.Namespace) -> Path | None:
    """Where features are kept: as --features says, or beside the first file that is written."""
    if args.features is not None:
        return Path(args.features)
    beside: Path | None = next((path for path in _written(args).values()), None)
    if beside is None:
        return None
    return beside.with_name(f"{beside.name.removesuffix('.json').removesuffix('.npz')}.features")


def require_places(args: argparse.Namespace, reads: Sequence[str]) -> None:
    """ValueError if a file could not be written, or would take the place of what is read or written."""
    taken = {file.resolve() for word in reads for file in (Path(word), Path(word) / IMAGES_FILE)}
    for option, path in _written(args).items():
        name = f"--{option.replace('_', '-')} {path}"
        _require_file(path, name, ENDINGS[option])
        if path.resolve() in taken:
            raise ValueError(f"{name} would overwrite what is read or written; name another file")
        if path.name == IMAGES_FILE and (path.parent / FACTS).is_file():
            problem = f"{path.parent / FACTS} says how the {IMAGES_FILE} beside it was made"
            raise ValueError(f"{name}: {problem}; name another file")
        taken.add(path.resolve())
    folder = features_folder(args)
    if folder is not None and folder.is_dir():
        strangers = sorted(each.name for each in folder.iterdir() if not OF_FEATURES.fullmatch(each.name))
        if strangers:
            raise ValueError(f"--features {folder} holds {strangers[0]}, which is no features; name another folder")


@contextmanager
def locked_places(args: argparse.Namespace) -> Iterator[None]:
    """While entered, no other command writes the same files or features. ValueError, on all processes, if one does."""
    folder = features_folder(args)
    with ExitStack() as held:
        for path in [*_written(args).values(), *([] if folder is None else [folder])]:
            held.enter_context(locked(path.parent, path.name))
        yield


def _written(args: argparse.Namespace) -> dict[str, Path]:
    return {option: Path(path) for option in ENDINGS if (path := getattr(args, option)) is not None}


def _require_file(path: Path, name: str, ending: str) -> None:
    if not path.parent.is_dir():
        raise ValueError(f"{name}: the folder {path.parent} does not exist; make it first")
    if path.is_dir():
        raise ValueError(f"{name} is a folder; name a file, for instance {path / f'metrics{ending}'}")
    if path.suffix != ending:
        raise ValueError(f"{name} should end in {ending}")
    require_writable(path.parent)
