"""Which latent space an experiment lives in: as its data and its section `first_stage` say together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dit_moe import config as configs
from dit_moe.config import ConfigError
from dit_moe.data import Dataset
from dit_moe.data.latents import LatentShards
from dit_moe.data.manifest import Manifest
from dit_moe.latents.autoencoder import AutoencoderConfig
from dit_moe.latents.base import FIRST_STAGES, FirstStage, Shape
from dit_moe.latents.identity import IdentityConfig


def settle_first_stage(given: Any, dataset: Dataset) -> tuple[Any, Shape]:
    """The section `first_stage` with everything recorded that tells its latents from others, and their shape.

    Encoded latents know their autoencoder, which is not loaded. ConfigError if `given` is another one.
    """
    try:
        if isinstance(dataset, LatentShards):
            return _of_latents(given, dataset.manifest), dataset.manifest.latent_shape
        stage: FirstStage = FIRST_STAGES.build(given or IdentityConfig())
        shape = stage.latent_shape(dataset.image_shape)
        return stage.settled(), shape
    except ConfigError as error:
        raise error if error.path.startswith("first_stage") else error.below("first_stage") from None


def _of_latents(given: Any, manifest: Manifest) -> AutoencoderConfig:
    own = configs.build(AutoencoderConfig, manifest.autoencoder)
    if given is None:
        return own
    if not isinstance(given, AutoencoderConfig):
        name = FIRST_STAGES.name_of(given)
        raise ConfigError("first_stage.name", f"={name} cannot read latents of {own.describe()}; drop the section")
    if given.normalization == "statistics":
        own = replace(own, shift=manifest.mean, scale=tuple(1 / std for std in manifest.std))
    settled = replace(own, **{name: getattr(given, name) for name in _FREE})
    stated = replace(settled, **{name: getattr(given, name) for name in _RECORDED if getattr(given, name) is not None})
    return require_same_space(settled, stated, "first_stage", "the folder of latents")


_RECORDED = ("kind", "channels", "sha256", "shift", "scale")
_FREE = ("model", "subfolder", "normalization", "precision", "tiling", "slicing")


def require_same_space(wanted: Any, found: Any, where: str, whose: str) -> Any:
    """`found`, at `where` in the config, if latents mean the same as for `wanted`, the settled section of `whose`.

    Else ConfigError with both in words.
    """
    same = wanted.same_space(found) if isinstance(wanted, AutoencoderConfig) else type(wanted) is type(found)
    if not same:
        problem = f" is of the latent space {_describe(found)}, but {whose} is of {_describe(wanted)}"
        raise ConfigError(where, f"{problem}; use the same autoencoder, scale and shift for both")
    return found


def _describe(config: Any) -> str:
    return f"{config.model} ({config.describe()})" if isinstance(config, AutoencoderConfig) else "pixels in [−1, 1]"
