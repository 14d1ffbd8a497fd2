"""The run folder at the start of a run: can it be written, and does what is in it belong to the same run?"""

from __future__ import annotations

import fcntl
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from omegaconf import OmegaConf

from dit_moe.config import ConfigError, Tree, differences
from dit_moe.files import require_writable
from dit_moe.processes import on_main
from dit_moe.training.config import FREE

# What may differ between the start of a run and its resumption: it has no part in what the weights become.
_FREE = {"sample", "eval", "encode", *(f"train.{field}" for field in FREE)}
# And in a section that identifies what it names, under this key: where that is, and how it is worked with.
_IDENTIFIED = {
    "data": ("fingerprint", {"path", "heldout"}),
    "first_stage": ("sha256", {"model", "subfolder", "tiling", "slicing"}),
}


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """While entered, no other training can enter `run`, which is made if need be.

    Raises ValueError, on every process, if another one is in there or the folder cannot be written.
    """
    with ExitStack() as held:

        def lock() -> None:
            require_writable(run)
            file = held.enter_context((run / ".lock").open("a"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however that ends
            except BlockingIOError:
                remedy = "wait for it, or choose another run folder"
                raise ValueError(f"{run} is in use by another process; {remedy}") from None
            except OSError as error:  # some clusters' file systems have no locks
                warning = f"warning: {run} cannot be locked ({error.strerror}); start no second training in it"
                print(warning, file=sys.stderr)

        on_main(lock)
        yield


def require_same_run(old: Tree, new: Tree, run: Path) -> None:
    """ConfigError listing the keys, other than the free ones, in which two resolved configs differ."""
    free = _FREE | {
        f"{section}.{key}"
        for section, (identity, keys) in _IDENTIFIED.items()
        if (old.get(section) or {}).get(identity) is not None
        for key in keys
    }
    differing = {
        key: pair
        for key, pair in sorted(differences(old, new))
        if not any(key == each or key.startswith(f"{each}.") for each in free)
    }
    if differing:
        (key, (was, now)), *others = differing.items()
        also = f", as do {', '.join(key for key, _ in others)}" if others else ""
        remedy = "resume with the run's config.yaml, or train into another run folder"
        raise ConfigError(key, f"={now} differs from the run in {run}, which has {was}{also}; {remedy}")


def parse(config_yaml: str) -> Tree:
    """A resolved config as a plain nested dict."""
    tree = OmegaConf.to_container(OmegaConf.create(config_yaml))
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}
