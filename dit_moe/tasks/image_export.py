"""A run of images without what only training needs, as a run folder that all but `train` open as any other."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file

from dit_moe import checkpoint, config
from dit_moe.autoencoders.autoencoder import BUNDLED, AutoencoderConfig
from dit_moe.autoencoders.own_copy import copy_autoencoder, copy_statistics
from dit_moe.config import OF_A_RUN, ConfigError
from dit_moe.evaluation.own_extractor import FOLDER as EXTRACTOR
from dit_moe.experiments.image import image_experiment
from dit_moe.experiments.run import open_image_run, sampling_changes
from dit_moe.files import atomic_folder, disk_used, require_replaceable, write_atomically
from dit_moe.formats import in_format, open_model
from dit_moe.locks import exclusive

OF_IMAGES = ("data.", "encode.")  # sections that an export leaves as they are
NOT_OF_USE = ("files", "since_line")  # of the state: what is written anew, and what only training goes on from


def export_image_run(path: Path, overrides: Sequence[str], folder: Path) -> dict[str, Any]:
    """Write a run's config, the weights that its section `sample` names, class names, autoencoder and extractor.

    Args:
        path: a run folder, or one of its checkpoint folders.
        overrides: ``key=value`` changes to the section ``sample`` and, written in full, to ``first_stage``, which are
            exported.
        folder: the run folder to make.

    Returns what it is of, its bytes, and the sha256 of its weights, JSON-ready. ValueError for bad input, before
    anything is written, if `folder` is not empty among it.
    """
    for key in (each.partition("=")[0] for each in overrides):
        if key.startswith(OF_IMAGES):
            problem = ": the run that is made says what was trained on, as this one does"
            raise ConfigError(key, f"{problem}; give it to the command that reads the images")
    run, saved = open_image_run(path, overrides), open_model(path)
    # Of the run's config as it was written only `sample` differs, and what the user says of the autoencoder: what it
    # names may not be here.
    tree = config.override(saved.config(), [each for each in overrides if each.startswith("first_stage.")])
    experiment = image_experiment(tree | {"sample": config.dump(run.experiment.sample)})
    weights, first_stage = experiment.sample.weights, run.experiment.first_stage

    def keep_networks(unfinished: Path) -> None:
        copy_statistics(first_stage, unfinished)
        if isinstance(first_stage, AutoencoderConfig) and first_stage.model not in BUNDLED:
            copy_autoencoder(first_stage, unfinished)
        if (saved.run / EXTRACTOR).is_dir():
            shutil.copytree(saved.run / EXTRACTOR, unfinished / EXTRACTOR)

    sha256 = write_run(saved, experiment, weights, folder, keep_networks)
    return {
        "folder": str(folder),
        "run": str(run.folder),
        "step": run.step,
        "weights": weights,
        "weights_sha256": sha256,
        "bytes": disk_used(folder),
    }


def export_weights(path: Path, overrides: Sequence[str], folder: Path, name: str) -> dict[str, Any]:
    """Write a run's weights into model.safetensors of a new folder as the format `name` of another suite has them.

    `overrides` are of the section ``sample``, of which ``weights`` counts. Returns what it is of, JSON-ready.
    ValueError, before anything is written, for a model that the suite's network does not compute alike, or for another
    compute budget than it was trained with.
    """
    require_replaceable(folder)
    saved = open_model(path)
    changes = [f"sample.{change}" for change in sampling_changes(overrides)]
    sample = image_experiment(config.override(saved.config(), changes)).sample
    if sample.requested is not None:
        problem = f": weights of the format {name} hold the experts of training alone; drop it, or export it as a run"
        raise ConfigError(f"sample.{sample.describe()}", problem)
    weights = sample.weights
    tensors = {key: tensor.contiguous() for key, tensor in in_format(name, saved, weights).items()}
    with exclusive(folder.parent, folder.name), atomic_folder(folder) as unfinished:
        save_file(tensors, unfinished / "model.safetensors")
    facts = {"folder": str(folder), "format": name, "run": str(saved.folder), "step": saved.step, "weights": weights}
    return facts | {"bytes": disk_used(folder)}


def require_averaged(experiment: Any) -> None:
    """ConfigError if the section `sample` of a run that is to be made names other weights than it will hold."""
    if experiment.sample.weights != "ema":
        problem = f"={experiment.sample.weights}: the run will hold one set of weights, as its averaged ones"
        raise ConfigError("sample.weights", f"{problem}; drop it")


def write_run(
    saved: checkpoint.Checkpoint,
    experiment: Any,
    weights: Literal["ema", "model"],
    folder: Path,
    add: Callable[[Path], object] = lambda _: None,
) -> str:
    """Write a run folder with some weights of a checkpoint and without what only training needs.

    Args:
        experiment: the config, typed; only its section `sample` may differ from the checkpoint's.
        folder: to be made; ``add(folder)`` puts more into it.

    Returns the sha256 of the weights. ValueError, before anything is written, if `folder` is not empty.
    """
    require_replaceable(folder)
    text = config.to_yaml(experiment)
    state = {name: value for name, value in saved.state.items() if name not in NOT_OF_USE} | {"exported": True}
    with exclusive(folder.parent, folder.name), atomic_folder(folder) as unfinished:
        parts: checkpoint.Parts = {weights: saved.weights(weights)}
        written = checkpoint.save(unfinished, parts=parts, state=state, config_yaml=text, keep=1)
        write_atomically(unfinished / checkpoint.CONFIG, OF_A_RUN + text)
        add(unfinished)
        return checkpoint.open_checkpoint(written).sha256(weights)
