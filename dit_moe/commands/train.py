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

from dit_moe import checkpoint, config
from dit_moe.commands.light_evaluation import LightEvaluation
from dit_moe.commands.sharing import generate_together
from dit_moe.costs import add_cost_arguments, describe
from dit_moe.data import Dataset
from dit_moe.data.manifest import NoLatents
from dit_moe.diffusion import OBJECTIVES, SamplingError
from dit_moe.experiment import Experiment, load_experiment, open_data, settle, settle_model
from dit_moe.generate import Generator, choose_labels
from dit_moe.latents import FIRST_STAGES, FirstStage
from dit_moe.latents.settle import require_same_space
from dit_moe.models import MODELS
from dit_moe.pictures import save_grid
from dit_moe.processes import join_processes
from dit_moe.randomness import BatchRandom
from dit_moe.training import Hook, Trainer
from dit_moe.training.fine_tune import open_start


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
    add_cost_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Train, or with --dry-run only say what would be trained."""
    if args.dry_run:
        print(describe(_predict(args.config, args.overrides), args.gpu, args.gpus, args.mfu))
        return
    experiment, dataset = prepare(args.config, args.overrides)
    train(experiment, dataset, run_folder(args.config, args.folder))


def run_folder(config_path: Path, folder: Path | None) -> Path:
    """Where a config's run lives unless the user says otherwise: configs/a/b.yaml in runs/a/b."""
    if folder is not None:
        return folder
    parts = config_path.with_suffix("").parts
    below = parts[parts.index("configs") + 1 :] if "configs" in parts else parts[-1:]
    return Path("runs", *below)


def prepare(path: Path, overrides: list[str]) -> tuple[Experiment, Dataset]:
    """The settled experiment of a config file, and its training data. ValueError for any mistake in either."""
    experiment = load_experiment(path, overrides)
    dataset = open_data(experiment.data, "train")
    return settle(experiment, dataset), dataset


def _predict(path: Path, overrides: list[str]) -> Experiment:
    """What would be trained, also where its latents are yet to be encoded, if the config states their shape."""
    try:
        return prepare(path, overrides)[0]
    except NoLatents as missing:
        print(f"note: {missing}; sizes are as the config states them", file=sys.stderr)
        return settle_model(load_experiment(path, overrides))


def train(experiment: Experiment, dataset: Dataset, folder: Path) -> None:
    """Train `experiment` into the run folder `folder`, from its newest checkpoint if it has one."""
    start = open_start(experiment.train, folder)
    newest = checkpoint.latest(folder)
    earlier = start if newest is None else checkpoint.open_checkpoint(newest)
    if earlier is not None:
        before: Experiment = config.build(Experiment, earlier.config())
        require_same_space(before.first_stage, experiment.first_stage, "first_stage", f"the run in {earlier.folder}")
    class_counts = dataset.class_counts()
    torch.manual_seed(experiment.seed)  # the weights' initialisation is the only use of the global generator
    model: nn.Module = MODELS.build(experiment.model)
    objective = OBJECTIVES.build(experiment.objective, num_classes=experiment.model.num_classes)
    stage: FirstStage = FIRST_STAGES.build(experiment.first_stage).to(join_processes().device)

    def prepare_batch(rows: dict[str, Tensor], random: BatchRandom) -> dict[str, Tensor]:
        moments = stage.moments_of(rows)
        return {"latents": moments.sample(lambda like: random.normal(*like.shape[1:])), "labels": rows["labels"]}

    def save_samples(step: int, network: nn.Module) -> None:
        shape = (experiment.model.in_channels, experiment.model.input_size, experiment.model.input_size)
        labels = choose_labels(experiment.sample, experiment.model.num_classes, class_counts)
        try:
            made = generate_together(Generator(network, objective, stage, experiment.sample, shape), labels)
            if made is not None:
                (folder / "samples").mkdir(exist_ok=True)
                save_grid(made.images, made.labels, folder / "samples" / f"step_{step:08d}.png")
        except (ValueError, SamplingError) as error:  # a preview is not worth a run
            if join_processes().is_main_process:
                print(f"warning: no samples at step {step}: {error}", file=sys.stderr)

    hooks = []
    if experiment.train.sample_every or experiment.eval.light_every:
        stage.load()  # rather than after the first so many steps
    if every := experiment.train.sample_every:
        hooks.append(Hook(every=every, call=save_samples))
    if every := experiment.eval.light_every:
        judge = LightEvaluation(experiment, objective, stage, class_counts)
        hooks.append(Hook(every=every, call=judge, measures=True))
    Trainer(
        experiment.train,
        model=model,
        objective=objective,
        dataset=dataset,
        prepare_batch=prepare_batch,
        run=folder,
        config_yaml=config.to_yaml(experiment),
        seed=experiment.seed,
        start=start,
        facts={"class_names": dataset.class_names, "class_counts": class_counts},
        hooks=hooks,
    ).train()
