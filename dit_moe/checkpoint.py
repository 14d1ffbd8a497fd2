"""Checkpoints: folders that are either whole or refused, written so that a crash at any moment loses nothing.

    runs/NAME/checkpoints/step_00000500/
        model.safetensors      parameters and persistent buffers, the controllers' state among them
        ema.safetensors        the same of the averaged weights
        optimizer.safetensors  "<parameter name>.<slot>", for instance "blocks.0.attn.qkv.weight.exp_avg"
        config.yaml            the resolved config of the run
        state.json             step, position in the data, …; size and sha256 of each file above

A folder is written under a temporary name, synced to disk and renamed, and older ones go only after that.
Reading never runs code, never repairs, and never falls back to an older checkpoint on its own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from dit_moe.config import STORED, Tree, parse
from dit_moe.files import give_usual_mode, missing, require_utf8, sha256_of, sync, wrong_size
from dit_moe.formatting import first_few
from dit_moe.json_files import Count, FileName, Name, Sha256, checked, load, require_format

FORMAT = 1
CHECKPOINTS, STATE, CONFIG = (
    "checkpoints",
    "state.json",
    STORED,
)  # the first in the run folder, the others in each of it
_FOLDER = re.compile(r"step_(\d{8,})")
TEMPORARY = ".incomplete_"  # how the names of unfinished folders begin
_FILES = {STATE, CONFIG, *(f"{part}.safetensors" for part in ("model", "ema", "optimizer"))}

Weights = dict[str, Tensor]
Part = Literal["model", "ema", "optimizer"]
Parts = Mapping[Part, Mapping[str, Tensor]]
T = TypeVar("T")


class FileFacts(TypedDict):
    """What state.json says of another file."""

    bytes: Count
    sha256: Sha256


class Unlogged(TypedDict):
    """Steps since the last line of the log, and the sums of their numbers."""

    steps: Count
    gathered: dict[str, float]


class Change(TypedDict):
    """Settings that the run has had since a step: beside that, keys with their values before and since."""

    step: Count


class State(TypedDict):
    """What is read of state.json whatever was trained; there is more in it."""

    step: Count
    files: dict[FileName, FileFacts]
    class_names: NotRequired[list[Name] | None]  # in the order of the label table
    class_counts: NotRequired[list[Count] | None]  # images of each
    precision: NotRequired[str]
    since_line: NotRequired[Unlogged | None]
    changes: NotRequired[list[Change]]
    tokenizer: NotRequired[Tree]
    started_in: NotRequired[str]


# ---------------------------------------------------------------------------------------------------------- finding


def checkpoints(run: str | Path) -> list[Path]:
    """The complete checkpoint folders of a run folder, oldest first. ValueError for one with a shortened name."""
    folders = [path for path in Path(run, CHECKPOINTS).glob("step_*") if path.name[5:].isdecimal()]
    for path in folders:
        if not _FOLDER.fullmatch(path.name):
            raise ValueError(f"{path} is not a name of a checkpoint, {_name_of(step_of(path))} is; rename or move it")
    return sorted(folders, key=step_of)


def step_of(folder: Path) -> int:
    """The step that the name of a checkpoint folder says."""
    return int(folder.name.removeprefix("step_"))


def run_of(folder: Path) -> Path:
    """The run folder that a checkpoint folder is in; of a copy that lies by itself, the folder that it is in."""
    parent = folder.parent if folder.parent.name else folder.absolute().parent
    return parent.parent if parent.name == CHECKPOINTS else parent


def latest(run: str | Path) -> Path | None:
    """The newest checkpoint folder of a run folder, if it has one."""
    return next(reversed(checkpoints(run)), None)


def is_run(path: str | Path) -> bool:
    """Whether `path` is a run folder with a checkpoint, or a checkpoint folder."""
    return Path(path).is_dir() and (Path(path, STATE).is_file() or bool(checkpoints(path)))


def find(path: str | Path) -> Path:
    """The checkpoint folder that `path` means: itself, or the newest one of the run folder that it is.

    Raises ValueError if there is no such folder, or no checkpoint in it.
    """
    path = Path(path)
    if not path.is_dir():
        problem = f"{path} is a file, and a run is a folder" if path.exists() else missing(path)
        raise ValueError(f"{problem}; name a run folder (runs/NAME) or one of its checkpoint folders")
    if _FOLDER.fullmatch(path.name) or (path / STATE).exists():
        return path
    newest = latest(path)
    if newest is None:
        raise ValueError(f"{path} holds no checkpoint; train a run into it first, or name another folder")
    return newest


# ---------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose files are all there at their right sizes. `open_checkpoint` makes one."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["step"])

    def facts(self, schema: type[T]) -> T:
        """The state as `schema` has it. ValueError for what that does not allow."""
        return checked(self.state, schema, str(self.folder / STATE), _remedy(self.folder))

    @property
    def run(self) -> Path:
        """The run folder that it is in."""
        return run_of(self.folder.absolute())

    @property
    def started_in(self) -> Path:
        """The folder that relative paths in the config are relative to; this one if it did not record that."""
        return Path(self.state.get("started_in") or os.getcwd())

    def require_classes(self, count: int) -> None:
        """ValueError unless what the state says of the classes is of so many."""
        for name in ("class_names", "class_counts"):
            found = self.state.get(name)
            if found is not None and (len(found) != count or not any(found)):
                problem = f"is of another model: {name} has {len(found)} entries for {count} classes, or none above 0"
                raise _broken(self.folder, STATE, problem)

    def sha256(self, part: Part) -> str:
        """Of the file of these weights, as recorded."""
        return self._recorded(f"{part}.safetensors")

    def weights(self, part: Part) -> Weights:
        """The tensors of one file by name, memory-mapped on the CPU, after its checksum was verified."""
        require_utf8(self.folder)
        path = self._verified(f"{part}.safetensors")
        try:
            return load_file(path)
        except SafetensorError as error:
            raise _broken(self.folder, path.name, f"is not readable ({error})") from None

    def config(self) -> Tree:
        """The resolved config of the run, as a plain nested dict."""
        path = self._verified(CONFIG)
        try:
            return parse(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise _broken(self.folder, path.name, f"is no config ({error})") from None

    def _verified(self, name: str) -> Path:
        recorded = self._recorded(name)
        if sha256_of(self.folder / name) != recorded:
            raise _broken(self.folder, name, "was changed after it was written: its sha256 is not the recorded one")
        return self.folder / name

    def _recorded(self, name: str) -> str:
        if name not in self.state["files"]:
            if self.state.get("exported"):
                remedy = "use the run it was exported from, or, to train, start from its weights with train.init_from"
                raise ValueError(f"{self.folder} was exported without {name}; {remedy}")
            raise _broken(self.folder, STATE, f"does not list {name}")
        return str(self.state["files"][name]["sha256"])


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint folder, or the newest one of a run folder.

    Raises ValueError naming the first file that is missing, truncated or unreadable, and what to do about it.
    """
    folder = find(path)
    if not (folder / STATE).is_file():
        raise _broken(folder, STATE, "is missing")
    body = load(folder / STATE, _remedy(folder))
    require_format(body, FORMAT, folder / STATE, _remedy(folder))
    state = Checkpoint(folder, body).facts(State)
    if _FOLDER.fullmatch(folder.name) and folder.name != _name_of(state["step"]):
        raise _broken(folder, STATE, f"is of step {state['step']}, not of the one that names the folder")
    files = {name: entry["bytes"] for name, entry in state["files"].items()}
    for name, size in files.items():
        if (problem := wrong_size(folder / name, size, STATE)) is not None:
            raise _broken(folder, name, problem)
    return Checkpoint(folder, dict(state))


def _broken(folder: Path, name: str, problem: str) -> ValueError:
    return ValueError(f"{folder / name} {problem}; {_remedy(folder)}")


def _remedy(folder: Path) -> str:
    siblings = checkpoints(run_of(folder))
    older = siblings[: siblings.index(folder.absolute())] if folder.absolute() in siblings else []
    return (
        f"restore the folder from a copy, or delete it to {f'go on from {older[-1].name}' if older else 'start anew'}"
    )


def _name_of(step: int) -> str:
    return f"step_{step:08d}"


# ---------------------------------------------------------------------------------------------------------- writing


def save(run: str | Path, *, parts: Parts, state: Mapping[str, Any], config_yaml: str, keep: int) -> Path:
    """Write a checkpoint of a run, then delete all but the newest `keep`, apart from those that hold other files, too.

    Args:
        run: the run folder.
        parts: the tensors of each file; they may be on any device.
        state: JSON-ready facts; ``state["step"]``, the number of steps done, names the folder.
        config_yaml: the resolved config.
        keep: how many checkpoints of the run to keep, this one included.

    Returns its folder. Raises OSError if the disk refuses, leaving the earlier checkpoints as they were.
    """
    parent = Path(run, CHECKPOINTS)
    folder = parent / _name_of(state["step"])
    if folder.exists():
        raise FileExistsError(f"{folder} exists already")
    clear(run)
    temporary = parent / f"{TEMPORARY}{folder.name}"
    try:
        _write(temporary, parts, state, config_yaml)
    except OSError:
        clear(run)  # what was written of it would keep a full disk full
        raise
    temporary.rename(folder)
    sync(parent)
    for old in checkpoints(run)[:-keep]:
        if {path.name for path in old.iterdir()} <= _FILES:  # else it has become a user's own
            old = old.rename(parent / f"{TEMPORARY}{old.name}")  # a deletion cut short must not look like a checkpoint
            shutil.rmtree(old)
    return folder


def _write(folder: Path, parts: Parts, state: Mapping[str, Any], config_yaml: str) -> None:
    """Make `folder` with all files of a checkpoint, and wait until they are on the disk."""
    folder.mkdir(parents=True)
    for part, tensors in parts.items():
        on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        try:
            save_file(on_cpu, folder / f"{part}.safetensors")
        except SafetensorError as error:  # how a full disk shows
            raise OSError(f"{folder / part}.safetensors: {error}") from None
    (folder / CONFIG).write_text(config_yaml, encoding="utf-8")
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in sorted(folder.iterdir())}
    made = {"format": FORMAT, "torch": torch.__version__, "started_in": os.getcwd()}
    body = made | {**state, "files": files}
    (folder / STATE).write_text(json.dumps(body, indent=1), encoding="utf-8")
    for path in [*folder.iterdir(), folder]:
        give_usual_mode(path)
        sync(path)


def clear(run: str | Path) -> None:
    """Remove what interrupted writes and deletions left behind."""
    for leftover in Path(run, CHECKPOINTS).glob(f"{TEMPORARY}*"):
        if _FOLDER.fullmatch(leftover.name.removeprefix(TEMPORARY)):
            shutil.rmtree(leftover)


# ------------------------------------------------------------------------------------------------- modules in and out


def state_of(module: nn.Module) -> Weights:
    """Parameters and persistent buffers by name; a tensor that has several names (tied weights) under its first."""
    seen: dict[int, str] = {}
    tensors = module.state_dict(keep_vars=True)
    return {name: tensor.detach() for name, tensor in tensors.items() if seen.setdefault(id(tensor), name) == name}


@torch.no_grad()
def load_into(module: nn.Module, weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Copy `weights`, upgraded, into `module`. Raises ValueError as `require_fit` does."""
    own, weights = state_of(module), upgraded(module, weights)
    require_fit(own, weights, source)
    for name, tensor in own.items():
        tensor.copy_(part_of(weights[name], tensor))


def upgraded(module: nn.Module, weights: Mapping[str, Tensor]) -> Weights:
    """`weights` in the form of today: parts of `module` that had another state before have a method `upgrade_state`."""
    state = dict(weights)
    for name, part in module.named_modules():
        if hasattr(part, "upgrade_state"):
            part.upgrade_state(state, f"{name}." if name else "")
    return state


def require_fit(own: Mapping[str, Tensor], weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Raise ValueError naming `source` and the first few keys that are missing, unexpected or of another shape or kind.

    Floating-point numbers of any width are of one kind; whole numbers in their place were never trained.
    """
    problems: dict[str, list[str]] = {
        "missing": [name for name in own if name not in weights],
        "unexpected": [name for name in weights if name not in own],
        "of another shape": [],
        "of another kind": [],
    }
    for name in [name for name in own if name in weights]:
        found, wanted = weights[name], own[name]
        if found.shape != wanted.shape:
            problems["of another shape"].append(f"{name} {list(found.shape)} for {list(wanted.shape)}")
        if found.is_floating_point() != wanted.is_floating_point():
            problems["of another kind"].append(f"{name} {found.dtype} for {wanted.dtype}".replace("torch.", ""))
    shown = "; ".join(f"{problem}: {first_few(names, 3)}" for problem, names in problems.items() if names)
    if shown:
        raise ValueError(f"{source} holds another architecture ({shown}); use the model section of its config.yaml")


# ----------------------------------------------------------------------------------- tensors that processes share out


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor put together, which all processes do together; any other tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(full: Tensor, own: Tensor) -> Tensor:
    """What this process needs of `full` where it holds `own`: a slice if that is sharded. Nothing is communicated."""
    if not isinstance(own, DTensor):
        return full
    return distribute_tensor(full, own.device_mesh, own.placements, src_data_rank=None)


def gathered(tensors: Mapping[str, Tensor], keep: bool) -> Weights:
    """`tensors` with the sharded ones whole and on the CPU; {} without `keep`.

    All processes call it together. No device ever holds more than one of the gathered tensors.
    """
    kept: Weights = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if keep:
            kept[name] = full if full is tensor else full.cpu()
    return kept
