"""All of an experiment in one go: make its data, train, sample, evaluate, and show what came out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dit_moe.distributed import locked, on_main
from dit_moe.files import write_atomically
from dit_moe.formatting import rounded
from dit_moe.tasks import AnyExperiment, task_of
from dit_moe.tasks.train import prepare, train
from dit_moe.training.curves import save_curves
from dit_moe.training.log import active_experts, read_log, train_seconds
from dit_moe.training.run_start import WRITTEN, require_own_run

FILES = ("curves.png", "metrics.json")  # beside those of the training and the samples


def quickstart(raw: AnyExperiment, folder: Path, config_name: str, *, skip_broken: bool = False) -> None:
    """Do all of it, or go on where it stopped, and write metrics.json and curves.png into the run folder.

    Args:
        raw: fields that follow from the data may still be open.
        config_name: what metrics.json calls the config.
        skip_broken: encode without the images that cannot be read.

    Raises ValueError for bad input, before the training.
    """
    task = task_of(raw)
    on_main(lambda: require_own_run(folder, [*WRITTEN, *task.sample_files, *FILES]))
    task.check_quickstart(raw, skip_broken=skip_broken)
    with locked(folder):
        task.make_data(raw, skip_broken=skip_broken)
        experiment, dataset = prepare(raw)
        evaluate = task.evaluation(experiment, dataset)
        train(experiment, dataset, folder)
        report = evaluate(folder)
        if report is not None:  # on the main process
            metrics = report | _of_training(experiment, folder, task.unit) | {"config": config_name}
            write_atomically(folder / "metrics.json", json.dumps(metrics, indent=1, allow_nan=False) + "\n")
            task.print_report(report)
            _print(metrics, [folder / name for name in (task.sample_files[0], *FILES)])


def _of_training(experiment: AnyExperiment, folder: Path, unit: str) -> dict[str, Any]:
    """What the log says of the training, which is drawn as curves.png, too."""
    log, moe = read_log(folder / "log.jsonl"), experiment.model.moe
    save_curves(log, moe and moe.target, folder / "curves.png", read_log(folder / "evaluations.jsonl"))
    return {"active_experts": active_experts(log, moe), "train_seconds": train_seconds(log, unit)}


def _print(metrics: dict[str, Any], files: Sequence[Path]) -> None:
    table = Table(show_header=False)
    if active := metrics["active_experts"]:
        shown = f"{active['mean']:.3f} ± {rounded(active['std'], 3)} over the last quarter, target {active['target']:g}"
        table.add_row("active experts per token", shown)
    table.add_row("training", f"{rounded(metrics['train_seconds'], 0)} s")
    for path in files:
        table.add_row(path.stem, str(path))
    Console(stderr=True).print(table)
