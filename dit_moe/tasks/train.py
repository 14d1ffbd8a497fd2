"""Training the experiment of a config, whatever its task; and all of it in one go, from the data to the results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn

from dit_moe import built_in, checkpoint, config
from dit_moe.config import Tree
from dit_moe.costs.estimate import peak_of_this_machine, training_flops
from dit_moe.costs.memory import require_room
from dit_moe.data.latents import NoLatents
from dit_moe.distributed import locked, on_main
from dit_moe.downloads import NotDownloaded, no_downloads
from dit_moe.experiments import own_images
from dit_moe.files import require_utf8, write_atomically
from dit_moe.formats.writing import OF_TRAINING
from dit_moe.formatting import PlainConsole, first_few, rounded, tell
from dit_moe.models import MODELS
from dit_moe.tasks import AnyExperiment, task_of
from dit_moe.text.token_shards import NoTokens
from dit_moe.training import Trainer
from dit_moe.training.curves_of_runs import CURVES, CurvesPicture
from dit_moe.training.devices import require_packages
from dit_moe.training.log import active_experts, read_log, train_seconds
from dit_moe.training.profile import StepProfile
from dit_moe.training.run_start import WRITTEN, open_start, require_fit_start, require_own_run

SUMMARY_FILES = (CURVES, "metrics.json")  # of the quick start, beside those of the training and the samples


def run_folder(config_path: Path, folder: Path | None = None, overrides: Sequence[str] = ()) -> Path:
    """Where a config's run lives unless the user says otherwise: configs/a/b.yaml, or a/b, in runs/a/b.

    That of own images is called as their folder.
    """
    if folder is not None:
        return folder
    if (name := own_images.run_name(own_images.read(config_path, overrides))) is not None:
        return Path("runs", name)
    path = built_in.find(config_path)
    if name := built_in.name_of(path):
        return Path("runs", name)
    parts = path.with_suffix("").parts
    below = parts[parts.index("configs") + 1 :] if "configs" in parts else parts[-1:]
    return Path("runs", *below)


def load(path: str | Path, overrides: Sequence[str] = ()) -> AnyExperiment:
    """The experiment of a config file, of whichever task; fields that follow from the data are still open."""
    tree = own_images.load(path, overrides)
    experiment: AnyExperiment = task_of(tree).build_experiment(tree)
    return experiment


def prepare(experiment: AnyExperiment) -> tuple[Any, Any]:
    """The experiment with all fields resolved, and its training data. ValueError for any mistake in either."""
    task = task_of(experiment)
    dataset = task.open_data(experiment)
    experiment = task.resolve(experiment, dataset)
    require_room(experiment)
    return experiment, dataset


@no_downloads()
def dry_run(experiment: AnyExperiment, folder: Path) -> Any:
    """What would be trained into the run folder `folder`, as `resolve_for_dry_run` says.

    ValueError for what the training, or the evaluation of its run, would be refused for; nothing is made.
    """
    resolved, dataset = _resolved(experiment)
    require_packages(resolved.train)
    start = _open_start(resolved, folder)
    task_of(resolved).check_parts(resolved, dataset, start)
    if start is not None:
        with torch.device("meta"):
            require_fit_start(MODELS.build(resolved.model), start, _other_settings(start, resolved))
    return resolved


@no_downloads()
def resolve_for_dry_run(experiment: AnyExperiment) -> Any:
    """What would be trained, also where its data are yet to be made, if the config states what follows from them."""
    return _resolved(experiment)[0]


def _resolved(experiment: AnyExperiment) -> tuple[Any, Any]:
    """That, and its training data, None where they are yet to be made."""
    task = task_of(experiment)
    try:
        dataset = task.open_data(experiment)
        resolved = task.resolve(experiment, dataset)
    except (NoLatents, NoTokens, NotDownloaded) as missing:
        _note(f"{missing}; sizes are as the config states them")
        resolved, dataset = task.resolve_without_data(experiment), None
    if (judged := task.describe_evaluation(resolved)) is not None:
        _note(judged)
    return resolved, dataset


@lru_cache
def _note(text: str) -> None:
    """Once, also where many experiments have the same to say."""
    tell(f"note: {text}")


def train(experiment: AnyExperiment, dataset: Any, folder: Path, profile: int | None = None) -> None:
    """Train `experiment` into the run folder `folder`, from its newest checkpoint if it has one.

    Args:
        experiment, dataset: as `prepare` returns them.
        profile: how many steps to time by their parts; None: none.
    """
    require_utf8(folder)
    with locked(folder):
        trainer = build_trainer(experiment, dataset, folder)
        if profile is not None:
            rows, processes = experiment.train.batch_size, trainer.accelerator.num_processes
            trainer.profile = StepProfile(
                profile,
                flops=rows * training_flops(experiment),
                peak=peak_of_this_machine(processes, trainer.precision),
                count=rows * trainer.unit.per_row,
                unit=trainer.unit.name,
            )
        trainer.train()


def build_trainer(experiment: AnyExperiment, dataset: Any, folder: Path) -> Trainer:
    """What trains `experiment`. ValueError if it cannot go on, or start, from what the config or the folder says."""
    start = _open_start(experiment, folder)
    newest = checkpoint.latest(folder)
    earlier = start if newest is None else checkpoint.open_checkpoint(newest)
    parts = task_of(experiment).training_parts(experiment, dataset, folder, earlier)
    torch.manual_seed(experiment.seed)  # the weights' initialisation is the only use of the global generator
    model: nn.Module = MODELS.build(experiment.model)
    return Trainer(
        experiment.train,
        model=model,
        dataset=dataset,
        run=folder,
        config_yaml=config.to_yaml(experiment),
        config_class=type(experiment),
        seed=experiment.seed,
        start=start,
        start_settings="" if start is None else _other_settings(start, experiment),
        curves=CurvesPicture(folder),
        **vars(parts),
    )


def _other_settings(start: checkpoint.Checkpoint, experiment: AnyExperiment) -> str:
    """Settings of the network and the objective that `start` was trained with and that are others here, in words."""
    task = task_of(experiment)
    try:
        before = config.dump(task.resolve_without_data(task.build_experiment(start.config())))
    except ValueError:  # of a version that is not read any more, whose weights may be
        return ""

    def settings(tree: Tree) -> Tree:
        return config.flatten({key: tree[key] for key in ("model", "objective") if key in tree})

    found = {
        key: values
        for key, values in config.differences(settings(before), settings(config.dump(experiment)))
        if key != "model.num_classes" and not OF_TRAINING.fullmatch(key)
    }
    found = config.without_options_of_others(found)
    return first_few([f"{key}={old} (here {new})" for key, (old, new) in sorted(found.items())], 4)


def _open_start(experiment: AnyExperiment, folder: Path) -> checkpoint.Checkpoint | None:
    """As `open_start`; ConfigError for a run of another kind of model."""
    start = open_start(experiment.train, folder)
    if start is not None and (found := task_of(start.config()).kind) != (wanted := task_of(experiment).kind):
        problem = f"={experiment.train.init_from} is a run of {found}, and this model is one of {wanted}"
        raise config.ConfigError("train.init_from", f"{problem}; name a run of {wanted}")
    return start


# ---------------------------------------------------------------------------------------------------------- quick start


def quickstart(raw: AnyExperiment, folder: Path, config_name: str, *, skip_broken: bool = False) -> None:
    """Do all of it, or go on where it stopped, and write metrics.json into the run folder.

    Args:
        raw: fields that follow from the data may still be open.
        config_name: what metrics.json calls the config.
        skip_broken: do without the images that cannot be read.

    Raises ValueError for bad input, before the training.
    """
    task = task_of(raw)
    on_main(lambda: require_own_run(folder, [*WRITTEN, *task.sample_files, *SUMMARY_FILES]))
    task.check_quickstart(raw, skip_broken=skip_broken)
    with locked(folder):
        task.make_data(raw, skip_broken=skip_broken)
        raw = task.without_broken(raw) if skip_broken else raw
        experiment, dataset = prepare(raw)
        evaluate = task.evaluation(experiment, folder)
        train(experiment, dataset, folder)
        report = evaluate()
        if report is not None:  # on the main process
            log, moe = read_log(folder / "log.jsonl"), experiment.model.moe
            training = {"active_experts": active_experts(log, moe), "train_seconds": train_seconds(log, task.unit)}
            metrics = report | training | {"config": config_name}
            write_atomically(folder / "metrics.json", json.dumps(metrics, indent=1, allow_nan=False) + "\n")
            task.print_report(report)
            _print(metrics)


def _print(metrics: dict[str, Any]) -> None:
    table = Table(show_header=False)
    if active := metrics["active_experts"]:
        shown = f"{active['mean']:.3f} ± {rounded(active['std'], 3)} over the last quarter, target {active['target']:g}"
        table.add_row("active experts per token", shown)
        if "dropped" in active:
            table.add_row("of these dropped", f"{active['dropped']:.3g} over the whole training")
    table.add_row("training", f"{rounded(metrics['train_seconds'], 0)} s")
    PlainConsole(stderr=True).print(table)
