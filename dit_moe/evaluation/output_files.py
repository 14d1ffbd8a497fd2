"""The files that `dit-moe eval` writes: checked against what it reads before anything is made, and locked."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from dit_moe.distributed import locked
from dit_moe.evaluation.options import EvalOptions
from dit_moe.evaluation.sources import IMAGES_FILE
from dit_moe.files import require_output
from dit_moe.sampling.outputs import SAMPLE_JSON

ENDINGS = {"out": ".json", "save_stats": ".npz", "save_npz": ".npz"}  # of the files that these options name
FEATURE_FOLDERS = re.compile(r"reference|heldout|reconstruction|samples_\d+")  # in the folder of --features


def features_folder(options: EvalOptions) -> Path | None:
    """Where features are kept: as --features says, or beside the first file that is written."""
    if options.features is not None:
        return Path(options.features)
    beside: Path | None = next((path for path in _written(options).values()), None)
    if beside is None:
        return None
    return beside.with_name(f"{beside.name.removesuffix('.json').removesuffix('.npz')}.features")


def require_outputs(options: EvalOptions, reads: Sequence[str]) -> None:
    """ValueError if a file could not be written, or would take the place of what is read or written."""
    taken = {file.resolve() for name in reads for file in (Path(name), Path(name) / IMAGES_FILE)}
    for option, path in _written(options).items():
        name = f"--{option.replace('_', '-')} {path}"
        require_output(path, f"--{option.replace('_', '-')}", ENDINGS[option], "metrics")
        if path.resolve() in taken:
            raise ValueError(f"{name} would overwrite what is read or written; name another file")
        if path.name == IMAGES_FILE and (path.parent / SAMPLE_JSON).is_file():
            problem = f"{path.parent / SAMPLE_JSON} says how the {IMAGES_FILE} beside it was made"
            raise ValueError(f"{name}: {problem}; name another file")
        taken.add(path.resolve())
    folder = features_folder(options)
    if folder is not None and folder.is_dir():
        others = sorted(each.name for each in folder.iterdir() if not FEATURE_FOLDERS.fullmatch(each.name))
        if others:
            raise ValueError(
                f"--features {folder} holds {others[0]}, which is no folder of features; name another folder"
            )


@contextmanager
def locked_outputs(options: EvalOptions) -> Iterator[None]:
    """While entered, no other command writes the same files or features. ValueError, on all processes, if one does."""
    folder = features_folder(options)
    with ExitStack() as held:
        for path in [*_written(options).values(), *([] if folder is None else [folder])]:
            held.enter_context(locked(path.parent, path.name))
        yield


def _written(options: EvalOptions) -> dict[str, Path]:
    return {option: Path(path) for option in ENDINGS if (path := getattr(options, option)) is not None}
