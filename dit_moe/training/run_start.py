"""How a run begins: in a folder of its own, from its newest checkpoint, or from the weights of another run.

The last is `train.init_from`: it takes the averaged weights, with other classes if need be.
"""

# C classes, D width

from __future__ import annotations

import itertools
import os
import shlex
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dit_moe import checkpoint
from dit_moe.checkpoint import CONFIG
from dit_moe.config import OF_A_RUN, ConfigError, Tree, differences, parse, without_options_of_others
from dit_moe.data.listing import note
from dit_moe.files import require_own
from dit_moe.formats import open_model
from dit_moe.formatting import first_few
from dit_moe.moe import controlled_routers
from dit_moe.moe.routing import threshold_u
from dit_moe.training.config import FREE, RECORDED, TrainConfig
from dit_moe.training.curves_of_runs import CURVES
from dit_moe.training.trackers import KEPT

WRITTEN = (CONFIG, "log.jsonl", "evaluations.jsonl", CURVES, KEPT)
# What may differ between the start of a run and its resumption: it has no part in what the weights become.
_FREE = {
    "sample",
    "eval",
    "encode",
    "tokenize",
    "plugins",
    "model.recompute",
    "model.moe.recompute",
    "model.moe.implementation",
    *(f"train.{field}" for field in FREE),
}
_RECORDED = {f"train.{field}" for field in RECORDED}  # what may, if it is kept with the run from which step on
# And in a section that identifies what it names, under this key: where that is, and how it is worked with.
_IDENTIFIED = {
    "data": ("fingerprint", {"path", "heldout", "skip_broken", "allow_empty"}),
    "first_stage": ("sha256", {"model", "subfolder", "statistics", "tiling", "slicing"}),
}


def is_begun(run: Path) -> bool:
    """Whether `run` is the folder of a run that was begun, with a checkpoint or yet without."""
    settings = run / CONFIG
    begun = settings.is_file() and settings.read_bytes().startswith(OF_A_RUN.encode())
    return begun or checkpoint.latest(run) is not None


def require_own_run(run: Path, files: Iterable[str] = WRITTEN) -> None:
    """ValueError if `run` holds any of `files`, which are to be written, and is no run that was begun.

    Also if a folder is in place of one of them, or a file in place of that of the checkpoints.
    """
    for path in (run / name for name in files if (run / name).is_dir()):
        raise ValueError(f"{path} is a folder, and a file of the run is to be written; move it away")
    folder = run / checkpoint.CHECKPOINTS
    if os.path.lexists(folder) and not folder.is_dir():
        raise ValueError(f"{folder} is no folder, and checkpoints are to be written into it; move it away")
    require_own(run, files, is_begun(run))


def note_edited_config(saved: checkpoint.Checkpoint, config_yaml: str | None = None) -> None:
    """Say it if the config.yaml of a run folder is not as in its newest checkpoint, `saved`, which is what counts.

    `config_yaml` is what the run goes on with: if that is what the file says, it is no surprise.
    """
    path = saved.run / CONFIG
    if not path.is_file():
        return
    try:
        found = parse(path.read_text(encoding="utf-8"))
    except ValueError:
        found = {}
    changed = sorted(key for key, _ in differences(saved.config(), found))
    if changed and (config_yaml is None or found != parse(config_yaml)):
        problem = f"{path} differs from the checkpoint's config in {first_few(changed, 3)} and is ignored"
        note(f"{problem}; change settings by key=value, or start another run by train.init_from={saved.run}")


def differing(old: Tree, new: Tree, *, fixed: Collection[str] = ()) -> dict[str, tuple[Any, Any]]:
    """Keys in which two resolved configs differ, with both values, other than those that may.

    Of a section that names another entry, the name alone. `fixed` are keys that may differ when a run is resumed, but
    not here.
    """
    free = {each for each in _FREE if each not in fixed} | {
        f"{section}.{key}"
        for section, (identity, keys) in _IDENTIFIED.items()
        if (old.get(section) or {}).get(identity) is not None
        for key in keys
    }
    found = {
        key: pair
        for key, pair in sorted(differences(old, new))
        if not any(key == each or key.startswith(f"{each}.") for each in free)
    }
    return without_options_of_others(found)


def require_same_run(
    old: Tree, new: Tree, run: Path, fits: Callable[[], bool] = lambda: True
) -> dict[str, tuple[Any, Any]]:
    """The recorded changes between two resolved configs: keys, each with the value before and the one from now on.

    ConfigError listing the keys in which they differ, other than these and the free ones, and how to train with them:
    from the weights of the run, if the new model `fits` them.
    """
    found = differing(old, new)
    changes = {key: found.pop(key) for key in _RECORDED & found.keys()}
    if found:
        (key, (was, now)), *others = found.items()
        also = f", as do {', '.join(key for key, _ in others)}" if others else ""
        new_run = f"--run {shlex.quote(_free_name(run))}"
        if "train.init_from" in found or not fits():
            remedy = f"begin another run with {new_run}"
        else:
            remedy = f"begin a run from its averaged weights with {shlex.quote(f'train.init_from={run}')} {new_run}"
        section, _, field = key.partition(".")
        if was is not None and field == _IDENTIFIED.get(section, (None,))[0]:
            problem = f"={str(now)[:12]} is of other content than the run in {run} began with, {str(was)[:12]}"
            raise ConfigError(key, f"{problem}{also}; restore it, or {remedy}")
        same = "take these values" if others else "take that value"
        raise ConfigError(key, f"={now} differs from the run in {run}, which has {was}{also}; {same}, or {remedy}")
    return changes


def _free_name(run: Path) -> str:
    """A run folder that is not there yet: RUN-2, RUN-3, …"""
    return next(name for i in itertools.count(2) if not os.path.lexists(name := f"{run}-{i}"))


# --------------------------------------------------------------------------------------------- weights of another run


def open_start(config: TrainConfig, run: str | Path) -> checkpoint.Checkpoint | None:
    """The checkpoint that a run into the folder `run` starts from; None for one that goes on, or starts from nothing.

    Raises ValueError if ``train.init_from`` holds none, or a damaged one.
    """
    if config.init_from is None or checkpoint.latest(run) is not None:
        return None
    return open_model(config.init_from)


def require_fit_start(model: nn.Module, start: checkpoint.Checkpoint, settings: str = "") -> None:
    """ValueError unless `load_start` would take the weights of `start`, for whatever classes. `model` may be meta."""
    own, weights, table = checkpoint.state_of(model), start.weights("ema"), getattr(model, "label_table", None)
    if table is not None:
        for state in (own, weights):
            state.pop(str(table), None)
    checkpoint.require_fit(own, checkpoint.upgraded(model, weights), _named(start, settings))


def fits_start(model: nn.Module, start: checkpoint.Checkpoint) -> bool:
    """Whether `require_fit_start` raises nothing."""
    try:
        require_fit_start(model, start)
    except ValueError:
        return False
    return True


def _named(start: checkpoint.Checkpoint, settings: str) -> str:
    return f"{start.folder}, trained with {settings}," if settings else str(start.folder)


def load_start(
    model: nn.Module,
    ema: nn.Module,
    start: checkpoint.Checkpoint,
    class_names: Sequence[str] | None,
    settings: str = "",
) -> str:
    """Give the averaged weights and the buffers of `start` to `model` and its average `ema`.

    If the classes differ from those of `start`, the rows of ``model.label_table`` go by name: a class of the same name
    keeps its row, the others keep the fresh one that `model` has, the null class (last) keeps its own. `class_names`
    are in the order of the table; None is a model without classes. `settings` are those that `start` was trained with
    and that are others here, in words: they are named before the tensors that do not fit.

    Returns what was done, in words. Raises ValueError if anything else does not fit. All processes call it together.
    """
    before = start.state.get("class_names")
    weights, done = with_classes(model, start.weights("ema"), before, class_names, start.folder)
    for module in (model, ema):
        checkpoint.load_into(module, weights, _named(start, settings))
    return f"starts from {start.folder}{done and f'; {done}'}"


def with_classes(
    model: nn.Module,
    weights: checkpoint.Weights,
    before: Sequence[str] | None,
    class_names: Sequence[str] | None,
    source: Path,
) -> tuple[checkpoint.Weights, str]:
    """`weights` with the label table that `load_start` makes of theirs, and what was done, in words or ""."""
    table = getattr(model, "label_table", None)
    if table is None or class_names is None or before == list(class_names):
        return weights, ""
    if before is None:
        raise ValueError(f"{source} has no class names to find labels by; start from another run")
    fresh_CD = checkpoint.whole(checkpoint.state_of(model)[table]).cpu()
    if table not in weights or weights[table].shape != (len(before) + 1, *fresh_CD.shape[1:]):
        return weights, ""  # load_into tells
    rebuilt_CD, kept = _rebuilt(fresh_CD, weights[table].cpu(), class_names, before)
    count = len(class_names)
    by = "number" if all(name.isdecimal() for name in before) else "name"
    said = f"label table rebuilt: {kept} of {count} classes kept by {by}, {count - kept} new"
    return {**weights, table: rebuilt_CD}, said


def _rebuilt(fresh_CD: Tensor, old_CD: Tensor, names: Sequence[str], before: Sequence[str]) -> tuple[Tensor, int]:
    """A label table for `names`, and how many of them have their row from the one for `before`."""
    rows = {name: row for row, name in enumerate(before)}
    kept = [row for row, name in enumerate(names) if name in rows]
    table_CD = torch.cat([fresh_CD[:-1], old_CD[-1:]])
    table_CD[kept] = old_CD[[rows[names[row]] for row in kept]]
    return table_CD, len(kept)


def keep_thresholds(model: nn.Module, start: Tree, config: Tree) -> bool:
    """Whether `model` may go on with the thresholds that `load_start` gave it: its experts' section is that of `start`.

    Otherwise p may stand for another number of experts, and what its controller has summed up for other gains. Then the
    thresholds that `config`, the new run's, sets are set; it is left to the caller to solve those that it leaves open.
    """
    if _routing(start) == _routing(config):
        return True
    for router in controlled_routers(model):
        if router.config.controller.p0 is not None:
            router.controller.restart(threshold_u(router.config.controller.p0))
    return False


def _routing(tree: Tree) -> Tree | None:
    """The section `model.moe` of a config without what only says how its experts are computed."""
    moe: Tree | None = (tree.get("model") or {}).get("moe")
    return moe and {key: value for key, value in moe.items() if f"model.moe.{key}" not in _FREE}
