"""Which feature space a run is evaluated in where its config leaves that open, and the training of a CNN for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_moe.config import ConfigError
from dit_moe.data import Dataset, NoSuchSplit
from dit_moe.data.batch_sampler import load_batches
from dit_moe.data.listing import note
from dit_moe.distributed import from_main, join_processes, locked, on_main
from dit_moe.downloads import NotDownloaded, no_downloads
from dit_moe.experiments.image import Experiment, open_data
from dit_moe.extractors import EXTRACTORS, FeatureExtractor, trained_cnn
from dit_moe.extractors.inception import InceptionConfig, missing_weights
from dit_moe.extractors.trained_cnn import TrainedCNNConfig, TrainedCNNSpace, TrainedFacts, resized
from dit_moe.progress import work_bar
from dit_moe.weights import sha256_of_tensors

FOLDER = "extractor"  # in a run folder
MOST_LEARNED, MOST_HELD_OUT = 20_000, 5_000  # images
ROWS = 256  # that are read at a time


class NothingReserved(ConfigError):
    """No images are set aside for a network to learn from."""


def extractor_of(experiment: Experiment, home: Path) -> FeatureExtractor:
    """What the run in the folder `home` is evaluated with, on this process's device. All processes call it together.

    Raises ValueError, with a remedy, if there is none.
    """
    chosen = chosen_config(experiment.eval.extractor, home)
    train_missing(chosen, experiment, home)
    built: FeatureExtractor = EXTRACTORS.build(chosen)
    return built.to(join_processes().device)


def is_open(extractor: Any) -> bool:
    """Whether a config's ``eval.extractor`` names no network: it is null, or the CNN of the run, whichever that is."""
    return extractor in (None, TrainedCNNConfig())


def chosen_config(given: Any, home: Path) -> Any:
    """What a run's ``eval.extractor`` means, the folder of the run being `home`: as it says, if it names a network.

    Else the CNN in the run folder; else Inception, if its weights can be had; else that CNN, for `train_missing`.
    """
    own = home / FOLDER
    if not is_open(given):
        return given
    if given is None and not trained_cnn.is_trained(own):
        if (reason := from_main(missing_weights)) is None:
            return InceptionConfig()
        note(f"{reason}; features are those of a small CNN, kept in {own}")
    return TrainedCNNConfig(weights=str(own))


def train_missing(
    chosen: Any, experiment: Experiment, home: Path, check: Callable[[FeatureExtractor], object] = lambda space: None
) -> None:
    """If `chosen` is the CNN of the run in the folder `home`, and that is not there yet, train it.

    `check` gets its feature space before: it raises ValueError if that does not suit.
    """
    own = home / FOLDER
    if chosen == TrainedCNNConfig(weights=str(own)) and not trained_cnn.is_trained(own):
        train_extractor(experiment, own, check)


@no_downloads()
def describe_choice(experiment: Experiment) -> str:
    """What `chosen_config` would choose for a new run whose config leaves it open; trains nothing.

    ConfigError if there is nothing to choose.
    """
    inception = experiment.eval.extractor is None
    if inception and missing_weights() is None:
        return "inception"
    try:
        learned = f"the {len(_reserved(experiment)):,} images of the split `extractor`"
    except NotDownloaded:
        learned = "images of the split `extractor`"
    except ValueError as error:
        if not inception:
            raise
        remedy = "set data.reserve=0.1 for a small CNN to learn from, or name eval.extractor"
        otherwise = remedy if isinstance(error, NothingReserved) else str(error)
        return f"inception, if its weights can be downloaded; otherwise {otherwise}"
    first = "inception, if its weights can be downloaded, otherwise " if inception else ""
    return f"{first}trained_cnn, which learns from {learned}"


def train_extractor(experiment: Experiment, folder: Path, check: Callable[[FeatureExtractor], object]) -> None:
    """Train a CNN on the split `extractor` of a run's images, and keep it in `folder`; `check` as in `train_missing`.

    NothingReserved if there is no such split.
    """
    reserved = _reserved(experiment)
    check(TrainedCNNSpace(reserved.image_shape[0], reserved.class_names if len(reserved.class_names) > 1 else ()))
    try:
        heldout: Dataset | None = open_data(experiment.images, "heldout", "data")
    except ValueError:  # is told when it is needed
        heldout = None
    with locked(folder.parent, folder.name):
        on_main(lambda: _train(reserved, heldout, folder, experiment.seed))


def _reserved(experiment: Experiment) -> Dataset:
    try:
        return open_data(experiment.images, "extractor", "data")
    except NoSuchSplit:
        problem = " is not set, Inception's weights are missing, and no images are reserved for a network to learn from"
        remedy = "set data.reserve=0.1 in a new run, or name an extractor (--extractor for dit-moe eval)"
        raise NothingReserved("eval.extractor", f"{problem}; {remedy}") from None


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
    told = "" if right is None else f", and tells {right:.1%} of {count:,} held-out ones (chance: {1 / classes:.1%})"
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
