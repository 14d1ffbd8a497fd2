"""Weights in the format of transformers that an earlier version saved under other names."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn

from dit_moe.checkpoint import upgraded


def load_upgraded(model: nn.Module, info: dict[str, Any], source: str | PathLike[str], options: dict[str, Any]) -> None:
    """Load weights whose modules had another form before, and remove their names from the lists of what does not fit.

    Args:
        info: what `from_pretrained` found; its lists of missing and unexpected keys are changed.
        source: a folder, or a name on the hub whose files `from_pretrained` has just fetched.
        options: its keyword arguments.
    """
    folder = Path(source)
    if not folder.is_dir():
        where = {name: options[name] for name in ("revision", "cache_dir") if name in options}
        folder = Path(snapshot_download(str(source), allow_patterns="**.safetensors", local_files_only=True, **where))
    folder /= options.get("subfolder", "")
    stored: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            stored |= {name: file.get_tensor(name) for name in set(file.keys()) & set(info["unexpected_keys"])}
    own, state = model.state_dict(), upgraded(model, stored)
    found = {name: tensor for name, tensor in state.items() if name in own}
    for name, tensor in found.items():
        own[name].copy_(tensor)
    info["missing_keys"] = set(info["missing_keys"]) - found.keys()
    info["unexpected_keys"] = state.keys() - found.keys()
