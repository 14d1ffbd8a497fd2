"""Files of weights: hashed, read without running code in them, and fetched once by however many processes."""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from dit_moe.files import sha256_of


def sha256_of_weights(path: Path) -> str:
    """Of their file; ValueError if it cannot be read."""
    try:
        return sha256_of(path)
    except OSError as error:
        problem = f"the weights {path} cannot be read ({error.strerror})"
        raise ValueError(f"{problem}; name their file with --weights FILE") from None


def sha256_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Of the names, shapes and values of weights; the kind of their file has no part in it."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Weights by name from a .safetensors file, or from one that `torch.save` wrote; no code in it is run.

    Raises ValueError if there is anything else in it.
    """
    try:
        if path.suffix == ".safetensors":
            tensors = safetensors.torch.load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        problem = f"the weights {path} cannot be read ({error.strerror or error})"
        raise ValueError(f"{problem}; name another file with --weights") from None
    except Exception:  # of many kinds, with advice that would let code in the file run
        problem = f"{path} is no file of weights (a zip or pickle of tensors, or safetensors)"
        raise ValueError(f"{problem}, or it is damaged; name another file with --weights") from None
    if not isinstance(tensors, dict) or not all(isinstance(each, Tensor) for each in tensors.values()):
        problem = f"{path} holds other things than weights by name"
        raise ValueError(f"{problem}; name a file of a network's state_dict with --weights")
    for name, tensor in tensors.items():
        if tensor.ndim and not tensor.is_floating_point():  # batch normalisation counts, but has no tensor of counts
            problem = f"{path} holds {str(tensor.dtype).removeprefix('torch.')} for {name}, which are no weights"
            raise ValueError(f"{problem}; name another file with --weights")
    return tensors


def misfit(path: Path, network: str, error: RuntimeError) -> ValueError:
    """What to raise where `load_state_dict` refused the weights of `path`."""
    details = " ".join(str(error).partition("\n")[2].split()) or str(error)
    return ValueError(f"{path} does not hold the weights of {network} ({details[:200]} …); name --weights that do")


def fetch(url: str, sha256: str) -> Path:
    """The file of `url` in torch hub's cache, put there if need be; ValueError if that cannot be done.

    It appears there whole and with the right hash, or not at all; one process downloads while the others wait.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_name(f"{path.name}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # ends with the process, however that ends
            if not path.is_file():  # else another process was faster
                torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
    except (OSError, HTTPException, RuntimeError) as error:  # the last is about the hash
        problem = f"{path.name} is neither in {path.parent} nor can it be downloaded ({error})"
        raise ValueError(f"{problem}; get it elsewhere from {url}, and name it with --weights FILE") from None
    return path
