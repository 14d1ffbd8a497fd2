"""Encode if the config has latents, train, sample with several seeds, evaluate, and show what came out.

    dit-moe quickstart configs/digits.yaml

Everything goes into runs/<name of the config>/; a second call goes on where the first one stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dit_moe.commands import evaluate as evaluation
from dit_moe.commands.encode import encode, is_encoded
from dit_moe.commands.sample import sample
from dit_moe.commands.train import prepare, run_folder, train
from dit_moe.data import DATASETS
from dit_moe.evaluate import Reference, dataset_reference, evaluate, with_reconstructions
from dit_moe.experiment import Experiment, load_experiment
from dit_moe.files import write_atomically
from dit_moe.latents import FIRST_STAGES, FirstStage
from dit_moe.latents.identity import IdentityConfig
from dit_moe.metrics import EXTRACTORS, read_images
from dit_moe.pictures import read_log, save_curves
from dit_moe.processes import join_processes
from dit_moe.runs import open_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `run` reads."""
    parser.add_argument("config", type=Path, help="a YAML file, for instance configs/digits.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the config")
    parser.add_argument(
        "--run", dest="folder", type=Path, metavar="FOLDER", help="run folder; default runs/<name of the config>"
    )


def run(args: argparse.Namespace) -> None:
    """Do all of it and write metrics.json, grid.png and curves.png into the run folder."""
    folder = run_folder(args.config, args.folder)
    raw = load_experiment(args.config, args.overrides)
    if raw.encode is not None and not is_encoded(raw):
        encode(raw)
    experiment, dataset = prepare(args.config, args.overrides)
    train(experiment, dataset, folder)
    folders = _sample(experiment, folder)
    if not join_processes().is_main_process:
        return
    log = read_log(folder / "log.jsonl")
    samples = [read_images(each) for each in folders]
    report = evaluate(samples, _reference(experiment), EXTRACTORS.build(experiment.eval.extractor))
    metrics = report | {
        "active_experts": active_experts(log, experiment),
        "train_seconds": train_seconds(log),
        "config": args.config.name,
    }
    save_curves(log, experiment.model.moe and experiment.model.moe.target, folder / "curves.png")
    write_atomically(folder / "metrics.json", json.dumps(metrics, indent=1, allow_nan=False) + "\n")
    evaluation.print_table(report)
    _print_rest(metrics, folder)


def _sample(experiment: Experiment, folder: Path) -> list[Path]:
    """One folder of samples for each sampling seed; the first is the run folder itself."""
    count = experiment.eval.images or len(DATASETS.build(experiment.images, "heldout"))
    folders = []
    for seed in range(experiment.eval.seeds):
        settings = replace(experiment.sample, count=count, seed=experiment.sample.seed + seed)
        folders.append(folder if seed == 0 else folder / "samples" / f"seed_{settings.seed}")
        sample(open_run(folder, sample=settings, device=join_processes().device), folders[-1])
    return folders


def _reference(experiment: Experiment) -> Reference:
    """The images that were trained on, in whatever form, and what an autoencoder leaves of the held-out ones."""
    reference = dataset_reference(experiment.images)
    if isinstance(experiment.first_stage, IdentityConfig):
        return reference
    device = join_processes().device
    stage: FirstStage = FIRST_STAGES.build(experiment.first_stage).to(device)
    return with_reconstructions(reference, lambda images: stage.decode(stage.encode(images.to(device)).mean).cpu())


def active_experts(log: list[dict[str, Any]], experiment: Experiment) -> dict[str, float] | None:
    """Target, and mean and std over the logged steps of the last quarter of training; None for a dense model."""
    if experiment.model.moe is None:
        return None
    last = [line["active"] for line in log if line["step"] > 0.75 * log[-1]["step"]]
    return {
        "target": experiment.model.moe.target,
        "mean": statistics.fmean(last),
        "std": statistics.pstdev(last),
    }


def train_seconds(log: list[dict[str, Any]]) -> float:
    """Time spent in training steps over all starts of the run, without checkpoints and sample grids."""
    images = [0, *[line["images"] for line in log]]
    return sum(
        (after - before) / line["images_per_s"] for before, after, line in zip(images, images[1:], log, strict=False)
    )


def _print_rest(metrics: dict[str, Any], folder: Path) -> None:
    console, active = Console(stderr=True), metrics["active_experts"]
    table = Table(show_header=False)
    if active:
        shown = f"{active['mean']:.3f} ± {active['std']:.3f} over the last quarter, target {active['target']:g}"
        table.add_row("active experts per token", shown)
    table.add_row("training", f"{metrics['train_seconds']:.0f} s")
    for name in ("grid.png", "curves.png", "metrics.json"):
        table.add_row(name.partition(".")[0], str(folder / name))
    console.print(table)
