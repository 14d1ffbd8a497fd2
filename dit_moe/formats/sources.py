"""Files and folders of weights, opened by memory map: averaged weights, raw ones, and the settings beside them."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor

from dit_moe.checkpoint import CONFIG, is_run
from dit_moe.config import Tree
from dit_moe.files import sha256_of
from dit_moe.formatting import first_few
from dit_moe.shards import MANIFEST
from dit_moe.weights import require_file, require_unpacked

Which = Literal["ema", "model"]
SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
INDEX = ("*.safetensors.index.json", "*.bin.index.json")  # which tensor is in which file of several
LAYOUT = ("model_index.json", "config.json", "model.safetensors", *INDEX)  # one of them is in a folder of the hub
NAMES: dict[Which, tuple[str, ...]] = {  # what training scripts call them
    "ema": ("ema", "model_ema", "state_dict_ema", "ema_state_dict", "ema_model", "ema_model_state_dict"),
    "model": ("model", "state_dict", "model_state_dict", "module"),
}
WRAPPERS = ("module.", "_orig_mod.")  # what DistributedDataParallel and torch.compile put before every name
OURS = (MANIFEST, CONFIG)  # in folders of latents, of runs and of checkpoints, damaged ones, too
REMEDY = "name another file"


@dataclass(frozen=True)
class Source:
    """What is in a file or folder of weights; tensors are mapped into memory, and read when they are used."""

    path: Path
    files: tuple[Path, ...]
    weights: Mapping[Which, Mapping[str, Tensor]]  # by name; a file that holds one set holds "ema", what is published
    settings: Tree  # arguments of the training, or what a config.json says

    def tensors(self, which: Which) -> Mapping[str, Tensor]:
        """The averaged weights, or the raw ones; ValueError if it does not have them."""
        if which not in self.weights:
            found = ", ".join(self.weights)
            raise ValueError(f"{self.path} holds no weights of the kind {which}, only {found}; leave the option out")
        return self.weights[which]

    def sha256(self) -> str:
        """Of the file; of several, of their hashes in the order of their names."""
        hashes = [sha256_of(file) for file in self.files]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def is_source(path: str | Path) -> bool:
    """Whether this means weights of another suite: a file by its ending, or a folder in the layout of the hub."""
    path = Path(path)
    return (path.is_file() or any(any(path.glob(name)) for name in LAYOUT)) and holds_weights(path)


def holds_weights(path: str | Path) -> bool:
    """The same also of a folder with a file of weights beside whatever else, and nothing of ours."""
    path = Path(path)
    if not path.is_dir():
        return path.is_file() and path.suffix in SUFFIXES
    return not is_run(path) and not any((path / name).exists() for name in OURS) and bool(_weights_in(path))


def open_source(path: str | Path) -> Source:
    """Open a .pt, .pth, .ckpt, .bin or .safetensors file, or a folder of them in the layout of the Hugging Face hub.

    No code in them is run. Raises ValueError for what cannot be read so.
    """
    path = Path(path)
    folder = _folder_of(path)
    files = (path,) if folder is None else _weights_in(path)
    if not files:
        endings = ", ".join(SUFFIXES)
        raise ValueError(f"{path} holds no weights in a file that ends in {endings}; {REMEDY} or folder")
    content: dict[str, Any] = {}
    for file in files:
        content |= _read(file)
    weights, settings = _unwrapped(content, path)
    if folder is not None and (folder / "config.json").is_file():
        settings = read_settings(folder / "config.json") | settings
    return Source(path, files, weights, settings)


def _folder_of(path: Path) -> Path | None:
    """Where the weights of a folder are: of a pipeline, in that of its transformer. None for a file."""
    if not path.is_dir():
        return None
    return path / "transformer" if (path / "model_index.json").is_file() else path


def _weights_in(path: Path) -> tuple[Path, ...]:
    """The files of a folder that together hold the weights: those that an index lists, or the only one."""
    folder = _folder_of(path)
    assert folder is not None
    for pattern in INDEX:
        for index in sorted(folder.glob(pattern)):
            listed = read_settings(index).get("weight_map")
            names = set(map(str, listed.values())) if isinstance(listed, dict) else set()
            if not names or any(Path(name).name != name for name in names):
                raise ValueError(f"{index} names no files beside it in weight_map; get it anew")
            return tuple(folder / name for name in sorted(names))
    for suffix in reversed(SUFFIXES):  # safetensors first
        found = sorted(folder.glob(f"*{suffix}"))
        if found:
            if len(found) > 1:
                raise ValueError(f"{folder} holds {len(found)} files of weights and no index; name one, {found[0]}")
            return tuple(found)
    return ()


def read_settings(path: Path) -> Tree:
    """The JSON object in a file. ValueError if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); get it anew") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no settings by name; get it anew")
    return content


def _read(path: Path) -> dict[str, Any]:
    """What a file holds by name."""
    require_file(path, REMEDY)
    try:
        if path.suffix == ".safetensors":
            return dict(safetensors.torch.load_file(path))
        require_unpacked(path)
        content = _unpickled(path)
    except Exception as error:  # of many kinds, with advice that would let code in the file run
        if isinstance(error, UnpicklingError) and (found := re.search(r"GLOBAL ([\w.]+)", str(error))):
            problem = f"holds objects of Python ({found[1]}), which are code and are not loaded"
            raise ValueError(
                f"{path} {problem}: do not load it by other means; if it is yours, save its state dict alone"
            ) from None
        problem = f"{path} is no file of weights (a zip or pickle of tensors, or safetensors)"
        raise ValueError(f"{problem}, or it is damaged; {REMEDY}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, and no weights by name; {REMEDY}")
    return {str(name): value for name, value in content.items()}


def _unpickled(path: Path) -> Any:
    """Tensors and plain values, and the Namespace that training scripts keep their arguments in, which runs nothing."""
    options: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, mmap=zipfile.is_zipfile(path), **options)  # older files cannot be mapped


def _unwrapped(content: dict[str, Any], path: Path) -> tuple[dict[Which, Mapping[str, Tensor]], Tree]:
    """The sets of weights in a file, and the arguments beside them."""
    weights: dict[Which, Mapping[str, Tensor]] = {}
    if _is_state_dict(content):
        weights["ema"] = _plainly_named(content)
        return weights, {}
    for which, names in NAMES.items():
        found = [content[name] for name in names if _is_state_dict(content.get(name))]
        if found:
            weights[which] = _plainly_named(found[0])
    if not weights:
        shown = first_few(sorted(content), 5)
        known = ", ".join(name for names in NAMES.values() for name in names)
        raise ValueError(f"{path} holds {shown}, and neither weights by name nor one of {known}; {REMEDY}")
    if "ema" not in weights and (unread := _unread_average(content)) is not None:
        problem = f"{path} holds averaged weights as {unread}, in a layout that is not read, beside the raw ones"
        raise ValueError(f"{problem}; save the state dict of either to a file of its own")
    if "ema" not in weights:
        weights = {"ema": weights["model"]}
    return weights, _plain_settings(content.get("args", content.get("config")))


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(each, Tensor) for each in value.values())


def _unread_average(content: Mapping[str, Any]) -> str | None:
    """The name of an entry that is called an average and holds tensors, or dicts of them."""

    def holds_tensors(value: Any) -> bool:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
        return (isinstance(value, Tensor) and value.ndim > 0) or any(map(holds_tensors, inner))

    averages = (name for name in content if "ema" in re.split(r"[^a-z]+", name.lower()))
    return next((name for name in averages if holds_tensors(content[name])), None)


def _plainly_named(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    for prefix in WRAPPERS:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _plain_settings(args: Any) -> Tree:
    found = vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, dict) else {}
    plain = str | int | float | bool | list | dict
    return {str(key): value for key, value in found.items() if isinstance(value, plain)}
