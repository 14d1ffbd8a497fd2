"""Weights of another suite as a run folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dit_moe.autoencoders.autoencoder import AutoencoderConfig
from dit_moe.autoencoders.own_copy import copy_statistics
from dit_moe.autoencoders.statistics import with_statistics
from dit_moe.data.listing import note
from dit_moe.experiments.run import TOKENIZER
from dit_moe.files import disk_used
from dit_moe.formats import recognise
from dit_moe.formats.recognition import AUTO
from dit_moe.formats.sources import Which
from dit_moe.tasks import task_of
from dit_moe.tasks.image_export import require_averaged, write_run
from dit_moe.text.tokenizer import TokenizerConfig, open_tokenizer


def import_weights(
    source: Path, folder: Path, name: str = AUTO, overrides: Sequence[str] = (), which: Which = "ema"
) -> dict[str, Any]:
    """Write a run folder with the config that weights mean, and the weights as its average.

    Args:
        source: a file, or a folder of files.
        folder: to be made.
        name: the format; "auto" is the only one that fits.
        overrides: ``key=value`` changes to the config.
        which: the averaged weights or the raw ones, where there are both.

    Returns what was read, JSON-ready. ValueError for what cannot be read, before anything is written.
    """
    weights = recognise(source, name, overrides, which)
    task = task_of(weights.config())
    experiment = task.resolve_without_data(task.build_experiment(weights.config()))
    require_averaged(experiment)
    first_stage = getattr(experiment, "first_stage", None)
    if isinstance(first_stage, AutoencoderConfig):
        first_stage = with_statistics(first_stage)
        experiment = replace(experiment, first_stage=first_stage)
    if (told := weights.format.note(weights.source.settings, experiment.model)) is not None:
        note(told)

    def add(run: Path) -> None:
        copy_statistics(first_stage, run)
        if "tokenizer" in weights.state:
            open_tokenizer(TokenizerConfig(**weights.state["tokenizer"])).save(run / TOKENIZER)

    sha256 = write_run(weights, experiment, "ema", folder, add)
    return {
        "folder": str(folder),
        **weights.state["imported"],
        "model": weights.config()["model"],
        "weights": which,
        "weights_sha256": sha256,
        "bytes": disk_used(folder),
    }
