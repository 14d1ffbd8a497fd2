"""The run folder at the start of a run: can it be written, and does what is in it belong to the same run?"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dit_moe import checkpoint
from dit_moe.config import ConfigError, Tree
from dit_moe.training.config import FREE

# What may differ between the start of a run and its resumption: it has no part in what the weights become.
_FREE = {"sample", "eval", *(f"train.{field}" for field in FREE)}


def require_writable(run: Path) -> None:
    """Make the run folder, and raise ValueError if nothing can be written into it."""
    probe = run / "checkpoints" / f"{checkpoint.TEMPORARY}{os.getpid()}"
    try:
        probe.mkdir(parents=True)
        probe.rmdir()
    except OSError as error:
        raise ValueError(f"{run} cannot be written ({error.strerror}); choose another run folder") from None


def require_same_run(old: Tree, new: Tree, run: Path) -> None:
    """ConfigError listing the keys, other than the free ones, in which two resolved configs differ."""
    differences = {key: pair for key, pair in sorted(_differences(old, new)) if not _is_free(key)}
    if differences:
        (key, (was, now)), *others = differences.items()
        also = f", as do {', '.join(key for key, _ in others)}" if others else ""
        remedy = "resume with the run's config.yaml, or train into another run folder"
        raise ConfigError(key, f"={now} differs from the run in {run}, which has {was}{also}; {remedy}")


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in _FREE)


def _differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old.keys() | new.keys():
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new:
        yield path, (old, new)


def parse(config_yaml: str) -> Tree:
    """A resolved config as a plain nested dict."""
    tree = OmegaConf.to_container(OmegaConf.create(config_yaml))
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


def write_config(run: Path, config_yaml: str) -> None:
    """Put config.yaml in place in one atomic replacement."""
    temporary = run / "config.yaml.tmp"
    temporary.write_text(config_yaml)
    checkpoint.sync(temporary)
    temporary.replace(run / "config.yaml")
