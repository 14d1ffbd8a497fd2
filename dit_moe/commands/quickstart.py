"""Encode if the config has latents, train, sample with several seeds, evaluate, and show what came out.

    dit-moe quickstart configs/digits.yaml

Everything goes into runs/<name of the config>/; a second call goes on where the first one stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dit_moe.commands.comparability import vouched
from dit_moe.commands.encode import encode
from dit_moe.commands.judging import compare, how_many, seeds_of, training_images
from dit_moe.commands.report_table import print_table
from dit_moe.commands.sample import sample
from dit_moe.commands.train import prepare, run_folder, train
from dit_moe.config import ConfigError
from dit_moe.data.latents import LatentsConfig
from dit_moe.evaluation.sources.base import ReadOptions
from dit_moe.evaluation.sources.words import IMAGES_FILE, open_word
from dit_moe.experiment import Experiment, load_experiment
from dit_moe.files import write_atomically
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
    parser.add_argument(
        "--skip-broken", action="store_true", help="encode without the images that cannot be read, as dit-moe encode"
    )


def run(args: argparse.Namespace) -> None:
    """Do all of it and write metrics.json, grid.png and curves.png into the run folder."""
    folder = run_folder(args.config, args.folder)
    raw = load_experiment(args.config, args.overrides)
    if isinstance(raw.images, LatentsConfig):
        wanted = "results are compared with the images that were encoded; say which, in encode.images"
        raise ConfigError("encode", f" is missing; {wanted}")
    if isinstance(raw.data, LatentsConfig):
        encode(raw, skip_broken=args.skip_broken)
    experiment, dataset = prepare(args.config, args.overrides)
    reference = training_images(experiment)
    count = how_many(experiment, reference)
    comparison = compare(experiment, reference)
    comparison.check()  # before training, as mistakes in it should show first
    comparison.prepare()
    train(experiment, dataset, folder)
    samples = [open_word(str(each / IMAGES_FILE), ReadOptions()) for each in _sample(experiment, folder, count)]
    report = comparison.judge(samples)
    if report is None:
        return
    report = vouched(report, samples, reference, ReadOptions(), comparison.metrics)
    log = read_log(folder / "log.jsonl")
    metrics = report | {
        "active_experts": active_experts(log, experiment),
        "train_seconds": train_seconds(log),
        "config": args.config.name,
    }
    target = experiment.model.moe and experiment.model.moe.target
    save_curves(log, target, folder / "curves.png", read_log(folder / "evaluations.jsonl"))
    write_atomically(folder / "metrics.json", json.dumps(metrics, indent=1, allow_nan=False) + "\n")
    print_table(report)
    _print_rest(metrics, folder)


def _sample(experiment: Experiment, folder: Path, count: int) -> list[Path]:
    """One folder of samples for each sampling seed; the first is the run folder itself."""
    folders = []
    for seed, settings in enumerate(seeds_of(experiment.sample, count, experiment.eval.seeds)):
        folders.append(folder if seed == 0 else folder / "samples" / f"seed_{settings.seed}")
        sample(open_run(folder, sample=settings, device=join_processes().device), folders[-1])
    return folders


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
