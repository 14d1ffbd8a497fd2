"""Weights in files that other programs wrote: no code in them is run, and their headers are not believed."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from dit_moe.files import require_no_stand_in, sha256_of


def sha256_of_weights(path: Path) -> str:
    """Of their file; ValueError if it cannot be read, or something else stands in its place."""
    require_file(path, "name their file with --weights FILE")
    return sha256_of(path)


def sha256_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Of the names, shapes and values of weights; the kind of their file has no part in it."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_tensors(path: Path, remedy: str = "name another file with --weights") -> dict[str, Tensor]:
    """Weights by name from a .safetensors file, or from one that `torch.save` wrote; no code in it is run.

    Raises ValueError, which ends with the `remedy`, if there is anything else in it.
    """
    require_file(path, remedy)
    try:
        if path.suffix == ".safetensors":
            tensors = safetensors.torch.load_file(path)
        else:
            require_unpacked(path)
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # of many kinds, with advice that would let code in the file run
        problem = f"{path} is no file of weights (a zip or pickle of tensors, or safetensors)"
        raise ValueError(f"{problem}, or it is damaged; {remedy}") from None
    if not isinstance(tensors, dict) or not all(isinstance(each, Tensor) for each in tensors.values()):
        problem = f"{path} holds other things than weights by name"
        raise ValueError(f"{problem}; take a network's state_dict, or {remedy}")
    for name, tensor in tensors.items():
        if tensor.ndim and not tensor.is_floating_point():  # batch normalisation counts, but has no tensor of counts
            problem = f"{path} holds {str(tensor.dtype).removeprefix('torch.')} for {name}, which are no weights"
            raise ValueError(f"{problem}; {remedy}")
    return tensors


def require_file(path: Path, remedy: str) -> None:
    """ValueError unless it can be read, and is not empty, a pointer of Git LFS or a web page."""
    try:
        if path.exists() and not path.is_file():
            raise OSError(0, "it is not a regular file")
        require_no_stand_in(path)
    except OSError as error:
        raise ValueError(f"the weights {path} cannot be read ({error.strerror}); {remedy}") from None


def require_unpacked(path: Path) -> None:
    """ValueError for a zip that unpacks to more than it is: `torch.save` packs nothing, and torch would allocate it."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                raise ValueError
