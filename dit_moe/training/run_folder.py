"""The run folder at the start of a run: can it be written, and does what is in it belong to the same run?"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from dit_moe import checkpoint
from dit_moe.checkpoint import CONFIG
from dit_moe.config import OF_A_RUN, ConfigError, Tree, differences
from dit_moe.files import require_own
from dit_moe.training.config import FREE

WRITTEN = (CONFIG, "log.jsonl", "evaluations.jsonl")
# What may differ between the start of a run and its resumption: it has no part in what the weights become.
_FREE = {"sample", "eval", "encode", *(f"train.{field}" for field in FREE)}
# And in a section that identifies what it names, under this key: where that is, and how it is worked with.
_IDENTIFIED = {
    "data": ("fingerprint", {"path", "heldout"}),
    "first_stage": ("sha256", {"model", "subfolder", "tiling", "slicing"}),
}


def is_begun(run: Path) -> bool:
    """Whether `run` is the folder of a run that was begun, with a checkpoint or yet without."""
    settings = run / CONFIG
    begun = settings.is_file() and settings.read_bytes().startswith(OF_A_RUN.encode())
    return begun or checkpoint.latest(run) is not None


def require_own_run(run: Path, files: Iterable[str] = WRITTEN) -> None:
    """ValueError if `run` holds any of `files`, which are to be written, and is no run that was begun."""
    require_own(run, files, is_begun(run))


def differing(old: Tree, new: Tree, *, fixed: Collection[str] = ()) -> dict[str, tuple[Any, Any]]:
    """Keys in which two resolved configs differ, with both values, other than those that may.

    `fixed` are keys that may differ when a run is resumed, but not here.
    """
    free = {each for each in _FREE if each not in fixed} | {
        f"{section}.{key}"
        for section, (identity, keys) in _IDENTIFIED.items()
        if (old.get(section) or {}).get(identity) is not None
        for key in keys
    }
    return {
        key: pair
        for key, pair in sorted(differences(old, new))
        if not any(key == each or key.startswith(f"{each}.") for each in free)
    }


def require_same_run(old: Tree, new: Tree, run: Path) -> None:
    """ConfigError listing the keys, other than the free ones, in which two resolved configs differ."""
    found = differing(old, new)
    if found:
        (key, (was, now)), *others = found.items()
        also = f", as do {', '.join(key for key, _ in others)}" if others else ""
        remedy = "resume with the run's config.yaml, or train into another run folder"
        raise ConfigError(key, f"={now} differs from the run in {run}, which has {was}{also}; {remedy}")
