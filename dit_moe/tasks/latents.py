"""What a run on latents is made from: its autoencoder, trained where the config says how, and the encoded images."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

from dit_moe.autoencoders.autoencoder import AutoencoderConfig
from dit_moe.autoencoders.encode import encode
from dit_moe.autoencoders.kl import CONFIG, MADE_BY
from dit_moe.data.latents import LatentsConfig, read_manifest
from dit_moe.experiments.autoencoder import AutoencoderSettings
from dit_moe.experiments.image import Experiment
from dit_moe.tasks.autoencoder import AutoencoderTraining, open_images, train_and_export


def make_data(experiment: Experiment, *, skip_broken: bool = False) -> None:
    if isinstance(experiment.data, LatentsConfig):
        _train_missing_first_stage(experiment, skip_broken)
        encode(experiment, skip_broken=skip_broken)
        # Digits have held-out images, and no option that says where.
        if experiment.data.heldout is not None and getattr(experiment.images, "heldout", True) is not None:
            encode(experiment, "heldout", skip_broken=skip_broken)


def _train_missing_first_stage(experiment: Experiment, skip_broken: bool = False) -> None:
    """Train the autoencoder that the config says how to train, on the images, unless it is there."""
    settings, stage = experiment.first_stage_training, experiment.first_stage
    if settings is None or experiment.encode is None or not isinstance(stage, AutoencoderConfig):
        return
    out = Path(stage.model)
    if not ((out / MADE_BY).is_file() and (out / CONFIG).is_file()):  # an export that was stopped lacks the latter
        given = {each.name: getattr(settings, each.name) for each in fields(AutoencoderSettings)}
        source = experiment.encode.images
        source = replace(source, skip_broken=True) if skip_broken else source
        training, images = open_images(AutoencoderTraining(**given, data=source))
        train_and_export(training, images, out.with_name(f"{out.name}-training"), out)


def make_missing_data(experiment: Experiment) -> None:
    if isinstance(experiment.data, LatentsConfig) and experiment.encode is not None:
        _train_missing_first_stage(experiment)
        for split, folder in (("train", experiment.data.path), ("heldout", experiment.data.heldout)):
            if folder is not None and not _is_encoded(folder):
                encode(experiment, split)


def _is_encoded(folder: str) -> bool:
    """To the end: images and autoencoder are then not needed any more."""
    try:
        read_manifest(folder)
    except ValueError:
        return False  # `encode` mends it, or says what is wrong
    return True
