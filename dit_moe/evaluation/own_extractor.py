"""Which feature space a run is evaluated in where its config leaves that open, and the training of a CNN for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_moe.config import ConfigError
from dit_moe.data import Dataset
from dit_moe.data.batch_sampler import load_batches
from dit_moe.data.listing import note
from dit_moe.distributed import from_main, join_processes, locked, on_main
from dit_moe.experiments.image import Experiment, open_data
from dit_moe.extractors import EXTRACTORS, FeatureExtractor, trained_cnn
from dit_moe.extractors.inception import InceptionConfig, missing_weights
from dit_moe.extractors.trained_cnn import TrainedCNNConfig, TrainedFacts, resized
from dit_moe.progress import work_bar
from dit_moe.weights import sha256_of_tensors

FOLDER = "extractor"  # in a run folder
MOST_LEARNED, MOST_HELD_OUT = 20_000, 5_000  # images
ROWS = 256  # that are read at a time


def extractor_of(experiment: Experiment, home: Path) -> FeatureExtractor:
    """What the run in the folder `home` is evaluated with, on this process's device. All processes call it together.

    Raises ValueError, with a remedy, if there is none.
    """
    built: FeatureExtractor = EXTRACTORS.build(chosen_config(experiment, home))
    return built.to(join_processes().device)


def chosen_config(experiment: Experiment, home: Path) -> Any:
    """As the config says; else the network in the run folder; else Inception, if its weights can be had; else a CNN.

    The CNN is trained here, on the split `extractor` of the images, and kept in the run folder.
    """
    given, own = experiment.eval.extractor, home / FOLDER
    named = given if given is not None else TrainedCNNConfig()
    if named != TrainedCNNConfig():  # which is that of the run
        return named
    if not trained_cnn.is_trained(own):
        if given is None and (reason := from_main(missing_weights)) is None:
            return InceptionConfig()
        if given is None:
            note(f"{reason}; features are those of a small CNN that learns from images set aside for it ({own})")
        train_extractor(experiment, own)
    return TrainedCNNConfig(weights=str(own))


def describe_choice(experiment: Experiment) -> str:
    """What `chosen_config` would choose for a new run: downloads and trains nothing. ConfigError if it could not."""
    given = experiment.eval.extractor
    if given not in (None, TrainedCNNConfig()):
        return str(EXTRACTORS.name_of(given))
    inception = "inception, if its weights can be downloaded, otherwise " if given is None else ""
    if given is None and missing_weights(download=False) is None:
        return "inception"
    try:
        images = len(_reserved(experiment))
    except ConfigError:
        if not inception:
            raise
        remedy = "set data.reserve=0.1 for a small CNN to learn from, or name eval.extractor"
        return f"inception, if its weights can be downloaded; otherwise {remedy}"
    return f"{inception}trained_cnn, which learns from the {images:,} images of the split `extractor`"


def train_extractor(experiment: Experiment, folder: Path) -> None:
    """Train a CNN on the split `extractor` of a run's images, and keep it in `folder`.

    ConfigError if there is no such split.
    """
    reserved = _reserved(experiment)
    try:
        heldout: Dataset | None = open_data(experiment.images, "heldout", "data")
    except ValueError:  # is told when it is needed
        heldout = None
    with locked(folder.parent, folder.name):
        on_main(lambda: _train(reserved, heldout, folder, experiment.seed))


def _reserved(experiment: Experiment) -> Dataset:
    try:
        return open_data(experiment.images, "extractor", "data")
    except ConfigError:
        raise
    except ValueError:
        problem = " is not set, Inception's weights are missing, and no images are reserved for a network to learn from"
        remedy = "set data.reserve=0.1 in a new run, or name an extractor (--extractor for dit-moe eval)"
        raise ConfigError("eval.extractor", f"{problem}; {remedy}") from None


def _train(reserved: Dataset, heldout: Dataset | None, folder: Path, seed: int) -> None:
    images_NCHW, labels_N = _read(reserved, MOST_LEARNED, f"images for {folder}")
    supervised = len(labels_N.unique()) > 1
    if len(images_NCHW) < trained_cnn.FEW_IMAGES:
        few = f"{folder} learns from {len(images_NCHW)} images only: distances in its features tell little"
        note(f"{few}; raise data.reserve, or name eval.extractor")
    names = list(reserved.class_names) if supervised else []
    targets_N, classes = (labels_N, len(names)) if supervised else (None, trained_cnn.QUARTER_TURNS)
    steps = trained_cnn.steps_for(len(images_NCHW))
    with work_bar(f"training {folder}", steps, "steps") as advance:
        network = trained_cnn.fit(images_NCHW, targets_N, classes, steps=steps, seed=seed, advance=advance)
    right, count = None, 0
    if heldout is not None:
        images_NCHW, labels_N = _read(heldout, MOST_HELD_OUT, "held-out images")
        right, count = trained_cnn.accuracy(network, images_NCHW, labels_N if supervised else None), len(images_NCHW)
    facts = TrainedFacts(
        version=trained_cnn.VERSION,
        weights_sha256=sha256_of_tensors(network.state_dict()),
        channels=reserved.image_shape[0],
        learned="classes" if supervised else "rotations",
        class_names=names,
        images=len(reserved),
        fingerprint=reserved.fingerprint,
        accuracy=right,
        heldout=count,
        seed=seed,
    )
    trained_cnn.save(network, facts, folder)
    told = "" if right is None else f", and tells {right:.1%} of {count:,} held-out ones"
    what = f"{len(names)} classes" if supervised else "quarter turns"
    note(f"{folder}: a CNN that learned {what} from {len(reserved):,} images{told}")


def _read(dataset: Dataset, most: int, what: str) -> tuple[Tensor, Tensor]:
    """At most so many images, spread evenly, as the CNN takes them, and their labels."""
    rows = torch.linspace(0, len(dataset) - 1, min(most, len(dataset))).round().long().tolist()
    parts = [rows[start : start + ROWS] for start in range(0, len(rows), ROWS)]
    images, labels = [], []
    with work_bar(f"reading {what}", len(rows), "images") as advance:
        for batch in load_batches(dataset, parts):
            images.append(resized(batch["images"]))
            labels.append(batch["labels"])
            advance(len(batch["labels"]))
    return torch.cat(images), torch.cat(labels)
