"""Train the experiment of a config file.

Running the same command again goes on where it stopped. Started by torchrun or accelerate it uses every process.

    dit-moe train configs/digits.yaml train.steps=200 --dry-run
"""

from __future__ import annotations

import argparse
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dit_moe import checkpoint, config
from dit_moe.cli.config_arguments import add_config_arguments
from dit_moe.costs import add_cost_arguments, describe
from dit_moe.data.manifest import NoLatents
from dit_moe.distributed import locked
from dit_moe.experiments.image import Experiment, image_experiment, is_text, open_data, resolve, resolve_model
from dit_moe.experiments.text import TextExperiment, open_tokens, resolve_text, resolve_text_model, text_experiment
from dit_moe.models import MODELS
from dit_moe.tasks.images import image_parts
from dit_moe.tasks.parts import TrainingParts
from dit_moe.text.token_shards import NoTokens
from dit_moe.training import Trainer
from dit_moe.training.fine_tune import open_start

AnyExperiment = Experiment | TextExperiment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `run` reads."""
    add_config_arguments(parser, "configs/digits.yaml")
    parser.add_argument(
        "--run", dest="folder", type=Path, metavar="FOLDER", help="run folder; default runs/<name of the config>"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config, sizes and costs, and stop")
    add_cost_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Train, or with --dry-run only say what would be trained."""
    experiment = load(args.config, args.overrides)
    if args.dry_run:
        print(describe(predict(experiment), args.gpu, args.gpus, args.mfu))
        return
    experiment, dataset = prepare(experiment)
    train(experiment, dataset, run_folder(args.config, args.folder))


def run_folder(config_path: Path, folder: Path | None) -> Path:
    """Where a config's run lives unless the user says otherwise: configs/a/b.yaml in runs/a/b."""
    if folder is not None:
        return folder
    parts = config_path.with_suffix("").parts
    below = parts[parts.index("configs") + 1 :] if "configs" in parts else parts[-1:]
    return Path("runs", *below)


def load(path: Path, overrides: list[str]) -> AnyExperiment:
    """The experiment of a config file, of whichever kind; fields that follow from the data are still open."""
    tree = config.load(path, overrides)
    return text_experiment(tree) if is_text(tree) else image_experiment(tree)


def prepare(experiment: AnyExperiment) -> tuple[Any, Any]:
    """The experiment with all fields resolved, and its training data. ValueError for any mistake in either."""
    if isinstance(experiment, TextExperiment):
        tokens = open_tokens(experiment)
        return resolve_text(experiment, tokens), tokens
    dataset = open_data(experiment.data, "train")
    return resolve(experiment, dataset), dataset


def predict(experiment: AnyExperiment) -> AnyExperiment:
    """What would be trained, also where its data are yet to be made, if the config states what follows from them."""
    try:
        return prepare(experiment)[0]
    except (NoLatents, NoTokens) as missing:
        _note(f"{missing}; sizes are as the config states them")
        return resolve_text_model(experiment) if isinstance(experiment, TextExperiment) else resolve_model(experiment)


@lru_cache
def _note(text: str) -> None:
    """Once, also where many experiments have the same to say."""
    print(f"note: {text}", file=sys.stderr)


def train(experiment: AnyExperiment, dataset: Any, folder: Path) -> None:
    """Train `experiment` into the run folder `folder`, from its newest checkpoint if it has one."""
    with locked(folder):
        _train(experiment, dataset, folder)


def _train(experiment: AnyExperiment, dataset: Any, folder: Path) -> None:
    start = open_start(experiment.train, folder)
    newest = checkpoint.latest(folder)
    earlier = start if newest is None else checkpoint.open_checkpoint(newest)
    parts = parts_of(experiment, dataset, folder, earlier)
    torch.manual_seed(experiment.seed)  # the weights' initialisation is the only use of the global generator
    model: nn.Module = MODELS.build(experiment.model)
    Trainer(
        experiment.train,
        model=model,
        dataset=dataset,
        run=folder,
        config_yaml=config.to_yaml(experiment),
        seed=experiment.seed,
        start=start,
        **vars(parts),
    ).train()


def parts_of(
    experiment: AnyExperiment, dataset: Any, folder: Path, earlier: checkpoint.Checkpoint | None
) -> TrainingParts:
    """What the trainer needs beside the model, for a run in `folder` that goes on, or starts, from `earlier`."""
    if isinstance(experiment, TextExperiment):
        from dit_moe.tasks.text import text_parts  # and with it transformers

        return text_parts(experiment, dataset, folder, earlier)
    return image_parts(experiment, dataset, folder, earlier)
