"""Which latent space an experiment is of: what its autoencoder, its latents and its config say of it, put together."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from dit_moe import config as configs
from dit_moe.autoencoders.autoencoder import BUNDLED, IDENTITY, Autoencoder, AutoencoderConfig, place_of
from dit_moe.autoencoders.base import FIRST_STAGES, FirstStage, IdentityConfig, Shape
from dit_moe.autoencoders.encoder import FREE, EncodeConfig, described
from dit_moe.autoencoders.statistics import require_fit, with_statistics
from dit_moe.config import ConfigError
from dit_moe.data import Dataset
from dit_moe.data.latents import LatentShards, Manifest

SPREAD = 1e-7  # of a channel, per mean: less is what rounding in float64 leaves of equal latents (about 2e-8)


def resolve_first_stage(given: Any, dataset: Dataset) -> tuple[Any, Shape]:
    """The section `first_stage` with everything recorded that tells its latents from others, and their shape.

    Encoded latents know their autoencoder, which is not loaded. ConfigError if `given` is another one.
    """
    try:
        if isinstance(dataset, LatentShards):
            _require_fitting_statistics(given, dataset.manifest.latent_shape)
            return _of_latents(given, dataset.manifest), dataset.manifest.latent_shape
        stage: FirstStage = FIRST_STAGES.build(given or IdentityConfig())
        shape = stage.latent_shape(dataset.image_shape)
        _require_fitting_statistics(given, shape)
        return stage.resolved(), shape
    except ConfigError as error:
        raise error if error.path.startswith("first_stage") else error.below("first_stage") from None


def _require_fitting_statistics(given: Any, shape: Shape) -> None:
    if isinstance(given, AutoencoderConfig) and given.statistics is not None:
        require_fit(given.statistics, shape)


def _of_latents(given: Any, manifest: Manifest) -> AutoencoderConfig:
    own = configs.build(AutoencoderConfig, manifest.autoencoder)
    if given is None:
        return own
    if not isinstance(given, AutoencoderConfig):
        name = FIRST_STAGES.name_of(given)
        raise ConfigError("first_stage.name", f"={name} cannot read latents of {own.describe()}; drop the section")
    given = with_statistics(given)
    if given.contradicts(own):
        stated = replace(own, **{name: getattr(given, name) or getattr(own, name) for name in IDENTITY})
        raise _other_space("first_stage", stated, "the folder of latents", own)
    shift, scale = given.shift, given.scale  # raw latents can be normalised in any way, as those of a run to start from
    if scale is None and given.statistics is None and given.normalization == "statistics":
        for channel, (mean, std) in enumerate(zip(manifest.mean, manifest.std, strict=True)):
            if std <= SPREAD * abs(mean):
                problem = f"=statistics: channel {channel} of the latents is {mean:.5g} everywhere, without any spread"
                remedy = "encode images that differ, take normalization: model, or give shift and scale"
                raise ConfigError("normalization", f"{problem}; {remedy}")
        shift, scale = manifest.mean, tuple(1 / std for std in manifest.std)
    elif scale is None and given.statistics is None:
        shift, scale = own.shift, own.scale
    recorded = {name: getattr(own, name) for name in IDENTITY}
    resolved = replace(given, **recorded, shift=shift, scale=scale)
    if (place_of(given), given.subfolder) != (place_of(own), own.subfolder):  # by another name, it may be another one
        if given.model in BUNDLED or Path(given.model).is_dir():
            Autoencoder(resolved).load()
        else:
            problem = f"is not there to be compared with {own.model}, which made the latents"
            warnings.warn(f"first_stage.model={given.model} {problem}", stacklevel=2)
    return resolved


def require_encoded_so(config: EncodeConfig, latents: LatentShards) -> None:
    """ConfigError if the section `encode` says other things of the images, or of mirrored ones, than was encoded.

    The images are not opened, so it is not found where they lie, or what they are, that has changed. In which type
    latents are kept is free.
    """
    images, kept = described(config)
    now = json.loads(json.dumps({"images": images, "flips": kept["flips"]}))
    was = configs.flatten(latents.manifest.encoding)
    free = {*FREE, "images.fingerprint", *(configs.flatten(now).keys() - was.keys())}  # the last: of later versions
    shares = {"images.reserve"}
    if any(isinstance(each, float) for each in (images.get("heldout"), was.get("images.heldout"))):
        shares.add("images.heldout")
    remedy = "take that value, or encode into another data.path"
    configs.require_same(now, was, "encode", f"the latents in {latents.folder}", remedy, free - shares)


def require_same_latents(wanted: Any, found: Any, where: str, whose: str) -> None:
    """ConfigError unless latents mean the same for `found`, at `where` in the config, and the section of `whose`."""
    same = wanted.same_space(found) if isinstance(wanted, AutoencoderConfig) else type(wanted) is type(found)
    if not same:
        raise _other_space(where, found, whose, wanted)


def _other_space(where: str, found: Any, whose: str, wanted: Any) -> ConfigError:
    problem = f" is of the latent space {_describe(found)}, but {whose} is of {_describe(wanted)}"
    return ConfigError(where, f"{problem}; use the same autoencoder, shift and scale for both")


def _describe(config: Any) -> str:
    return f"{config.model} ({config.describe()})" if isinstance(config, AutoencoderConfig) else "pixels in [−1, 1]"
