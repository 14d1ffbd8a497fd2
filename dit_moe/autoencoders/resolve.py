"""Which latent space an experiment lives in: as its data and its section `first_stage` say together."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from dit_moe import config as configs
from dit_moe.autoencoders.autoencoder import BUNDLED, IDENTITY, AutoencoderConfig
from dit_moe.autoencoders.base import FIRST_STAGES, FirstStage, IdentityConfig, Shape
from dit_moe.config import ConfigError
from dit_moe.data import Dataset
from dit_moe.data.latents import LatentShards, Manifest


def resolve_first_stage(given: Any, dataset: Dataset) -> tuple[Any, Shape]:
    """The section `first_stage` with everything recorded that tells its latents from others, and their shape.

    Encoded latents know their autoencoder, which is not loaded. ConfigError if `given` is another one.
    """
    try:
        if isinstance(dataset, LatentShards):
            return _of_latents(given, dataset.manifest), dataset.manifest.latent_shape
        stage: FirstStage = FIRST_STAGES.build(given or IdentityConfig())
        shape = stage.latent_shape(dataset.image_shape)
        return stage.resolved(), shape
    except ConfigError as error:
        raise error if error.path.startswith("first_stage") else error.below("first_stage") from None


def _of_latents(given: Any, manifest: Manifest) -> AutoencoderConfig:
    own = configs.build(AutoencoderConfig, manifest.autoencoder)
    if given is None:
        return own
    if not isinstance(given, AutoencoderConfig):
        name = FIRST_STAGES.name_of(given)
        raise ConfigError("first_stage.name", f"={name} cannot read latents of {own.describe()}; drop the section")
    if given.contradicts(own):
        stated = replace(own, **{name: getattr(given, name) or getattr(own, name) for name in IDENTITY})
        raise _other_space("first_stage", stated, "the folder of latents", own)
    shift, scale = given.shift, given.scale  # raw latents can be normalised in any way, as those of a run to start from
    if scale is None and given.normalization == "statistics":
        shift, scale = manifest.mean, tuple(1 / std for std in manifest.std)
    elif scale is None:
        shift, scale = own.shift, own.scale
    recorded = {name: getattr(own, name) for name in IDENTITY}
    resolved = replace(given, **recorded, shift=shift, scale=scale)
    if (given.model, given.subfolder) != (own.model, own.subfolder):
        _check_model(resolved, own)
    return resolved


def _check_model(resolved: AutoencoderConfig, own: AutoencoderConfig) -> None:
    """ConfigError if the autoencoder that goes by another name than the latents' own turns out to be another one."""
    if resolved.model in BUNDLED or Path(resolved.model).is_dir():
        FIRST_STAGES.build(resolved).load()
    else:
        note = (
            f"first_stage.model={resolved.model} is not there to be compared with {own.model}, which made the latents"
        )
        warnings.warn(note, stacklevel=2)


def require_same_latents(wanted: Any, found: Any, where: str, whose: str) -> Any:
    """`found`, at `where` in the config, if latents mean the same as for `wanted`, the resolved section of `whose`.

    Else ConfigError with both in words.
    """
    same = wanted.same_space(found) if isinstance(wanted, AutoencoderConfig) else type(wanted) is type(found)
    if not same:
        raise _other_space(where, found, whose, wanted)
    return found


def _other_space(where: str, found: Any, whose: str, wanted: Any) -> ConfigError:
    problem = f" is of the latent space {_describe(found)}, but {whose} is of {_describe(wanted)}"
    return ConfigError(where, f"{problem}; use the same autoencoder, shift and scale for both")


def _describe(config: Any) -> str:
    return f"{config.model} ({config.describe()})" if isinstance(config, AutoencoderConfig) else "pixels in [−1, 1]"
