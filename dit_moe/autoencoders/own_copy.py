"""The copy of its autoencoder that a run on latents keeps, so that it can be sampled wherever it is moved to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from dit_moe.autoencoders.autoencoder import BUNDLED, Autoencoder, AutoencoderConfig
from dit_moe.config import ConfigError
from dit_moe.files import atomic_folder
from dit_moe.formatting import tell

OWN_COPY = "autoencoder"  # folder of a run
REMEDY = "to sample from the run, name a folder that holds it: first_stage.model=FOLDER"


def keep_autoencoder(config: Any, run: Path) -> None:
    """Copy the autoencoder of a run on latents into the run folder, unless there is a copy already.

    One on the Hugging Face Hub is not copied, nor one of this package: the run's config has their name and hash.
    A warning tells of one that is not there, or that is not the one that made the latents.

    Args:
        config: the resolved section `first_stage`.
    """
    if not isinstance(config, AutoencoderConfig) or config.model in BUNDLED or (run / OWN_COPY).exists():
        return
    if not Path(config.model).is_dir() and not _is_on_hub(config.model):
        tell(f"warning: first_stage.model={config.model} does not exist, so that {run} keeps no copy; {REMEDY}")
    elif Path(config.model).is_dir():
        try:
            copy_autoencoder(config, run)
        except ConfigError as error:
            tell(f"warning: {error}; {run} keeps no copy; {REMEDY}")


def copy_autoencoder(config: AutoencoderConfig, run: Path) -> None:
    """Write an autoencoder, from wherever it is, into a run folder. ConfigError if it is not there, or another one."""
    stage = Autoencoder(replace(config, tiling=False, slicing=False))
    stage.load()
    with atomic_folder(run / OWN_COPY) as unfinished:
        stage.network.save_pretrained(unfinished)


def with_own_copy(config: Any, run: Path) -> Any:
    """A run's section `first_stage`, with the copy in its folder in place of the autoencoder it names, if it has one.

    Both have the same weights, whose hash is compared when they are loaded.
    """
    if not isinstance(config, AutoencoderConfig) or not (run / OWN_COPY).is_dir():
        return config
    return replace(config, model=str(run / OWN_COPY), subfolder=None)


def _is_on_hub(name: str) -> bool:
    """Whether it may be the name of a model on the Hugging Face Hub."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
