"""The copies of its autoencoder and of statistics that a run keeps, to be sampled wherever it is moved to."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save

from dit_moe.autoencoders.autoencoder import BUNDLED, Autoencoder, AutoencoderConfig
from dit_moe.autoencoders.statistics import read_statistics, with_statistics
from dit_moe.config import ConfigError
from dit_moe.downloads import may_be_repository
from dit_moe.files import atomic_folder, write_atomically
from dit_moe.formatting import tell

OWN_COPY = "autoencoder"  # folder of a run
OWN_STATISTICS = "latent_statistics.safetensors"  # of each place; those of channels are in the config
REMEDY = "to sample from the run, name a folder that holds it: first_stage.model=FOLDER"


def keep_autoencoder(config: Any, run: Path) -> None:
    """Copy the autoencoder of a run on latents into the run folder, unless there is a copy already.

    One on the Hugging Face Hub is not copied, nor one of this package: the run's config has their name and hash.
    A warning tells of one that is not there, or that is not the one that made the latents.

    Args:
        config: the resolved section `first_stage`.
    """
    copy_statistics(config, run)
    if not isinstance(config, AutoencoderConfig) or config.model in BUNDLED or (run / OWN_COPY).exists():
        return
    if not Path(config.model).is_dir() and not may_be_repository(config.model):
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


def copy_statistics(config: Any, run: Path) -> None:
    """Write the statistics of each place, if the latents have such, into a run folder. ConfigError if they changed."""
    if not isinstance(config, AutoencoderConfig) or config.statistics is None or (run / OWN_STATISTICS).exists():
        return
    with_statistics(config)
    mean, std = read_statistics(config.statistics)
    write_atomically(run / OWN_STATISTICS, save({"mean": mean.contiguous(), "std": std.contiguous()}))


def with_own_copy(config: Any, run: Path, named: Collection[str] = ()) -> Any:
    """A run's section `first_stage`, with the copies in its folder in place of what it names, if it has any.

    Both have the same numbers, whose hash is compared when they are loaded. `named` are keys of options that the user
    gives, which copies do not replace.
    """
    if not isinstance(config, AutoencoderConfig):
        return config
    if (run / OWN_COPY).is_dir() and "first_stage.model" not in named:
        config = replace(config, model=str(run / OWN_COPY), subfolder=None)
    own = (run / OWN_STATISTICS).is_file() and "first_stage.statistics" not in named
    if config.statistics is not None and own:
        config = replace(config, statistics=str(run / OWN_STATISTICS))
    return config
