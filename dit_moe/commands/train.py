"""Train the experiment of a config file.

Running the same command again goes on where it stopped. Started by torchrun or accelerate it uses every process.

    dit-moe train configs/digits.yaml train.steps=200 --dry-run
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from dit_moe import config
from dit_moe.commands.sharing import generate_together
from dit_moe.data import DATASETS, Dataset
from dit_moe.diffusion import OBJECTIVES, SAMPLERS, SamplingError
from dit_moe.experiment import Experiment, load_experiment, settle
from dit_moe.generate import Generator, choose_labels
from dit_moe.latents import FIRST_STAGES, FirstStage
from dit_moe.models import MODELS
from dit_moe.pictures import save_grid
from dit_moe.processes import join_processes
from dit_moe.randomness import BatchRandom
from dit_moe.training import Hook, Trainer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `run` reads."""
    parser.add_argument("config", type=Path, help="a YAML file, for instance configs/digits.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="changes to the config, for instance train.lr=1e-3"
    )
    parser.add_argument(
        "--run", dest="folder", type=Path, metavar="FOLDER", help="run folder; default runs/<name of the config>"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config, sizes and costs, and stop")


def run(args: argparse.Namespace) -> None:
    """Train, or with --dry-run only say what would be trained."""
    experiment, dataset = prepare(args.config, args.overrides)
    if args.dry_run:
        print(describe(experiment))
        return
    train(experiment, dataset, run_folder(args.config, args.folder))


def run_folder(config_path: Path, folder: Path | None) -> Path:
    """Where a config's run lives unless the user says otherwise."""
    return folder or Path("runs") / config_path.stem


def prepare(path: Path, overrides: list[str]) -> tuple[Experiment, Dataset]:
    """The settled experiment of a config file, and its training data. ValueError for any mistake in either."""
    experiment = load_experiment(path, overrides)
    dataset: Dataset = DATASETS.build(experiment.data, "train")
    return settle(experiment, dataset), dataset


def train(experiment: Experiment, dataset: Dataset, folder: Path) -> None:
    """Train `experiment` into the run folder `folder`, from its newest checkpoint if it has one."""
    torch.manual_seed(experiment.seed)  # the weights' initialisation is the only use of the global generator
    model: nn.Module = MODELS.build(experiment.model)
    objective = OBJECTIVES.build(experiment.objective, num_classes=experiment.model.num_classes)
    stage: FirstStage = FIRST_STAGES.build(experiment.first_stage)

    def prepare_batch(rows: dict[str, Tensor], random: BatchRandom) -> dict[str, Tensor]:
        moments = stage.to(rows["images"].device).encode(rows["images"])
        return {"latents": moments.sample(lambda like: random.normal(*like.shape[1:])), "labels": rows["labels"]}

    def save_samples(step: int, network: nn.Module) -> None:
        shape = stage.latent_shape(dataset.image_shape)
        labels = choose_labels(experiment.sample, experiment.model.num_classes)
        try:
            made = generate_together(Generator(network, objective, stage, experiment.sample, shape), labels)
            if made is not None:
                (folder / "samples").mkdir(exist_ok=True)
                save_grid(made.images, made.labels, folder / "samples" / f"step_{step:08d}.png")
        except (ValueError, SamplingError) as error:  # a preview is not worth a run
            if join_processes().is_main_process:
                print(f"warning: no samples at step {step}: {error}", file=sys.stderr)

    every = experiment.train.sample_every
    Trainer(
        experiment.train,
        model=model,
        objective=objective,
        dataset=dataset,
        prepare_batch=prepare_batch,
        run=folder,
        config_yaml=config.to_yaml(experiment),
        seed=experiment.seed,
        hooks=[Hook(every=every, call=save_samples)] if every else [],
    ).train()


def describe(experiment: Experiment) -> str:
    """The resolved config and, as YAML comments below it, what it will cost."""
    footprint = experiment.model.footprint()
    objective = OBJECTIVES.build(experiment.objective, num_classes=experiment.model.num_classes)
    model = experiment.model
    shape = (model.in_channels, model.input_size, model.input_size)
    evaluations = SAMPLERS.build(experiment.sample.sampler, objective).evaluations(experiment.sample.guidance, shape)
    images = experiment.train.steps * experiment.train.batch_size
    flops = footprint.forward_flops
    training = (4 if model.recompute else 3) * flops  # a backward pass costs two forward ones
    lines = [
        f"parameters        {footprint.total_params:,} in all, {footprint.active_params:,.0f} active per token",
        f"FLOPs per image   {flops:.4g} forward, {training:.4g} in training, {evaluations * flops:.4g} to sample it",
        f"training          {experiment.train.steps:,} steps, {images:,} images, {training * images:.4g} FLOPs",
    ]
    return config.to_yaml(experiment) + "\n".join(f"# {line}" for line in lines)
