"""Encode if the config has latents, train, sample with several seeds, evaluate, and show what came out.

A language model's text is tokenised; it is trained, scored on held-out documents beside a trigram model, and writes.

    dit-moe quickstart configs/digits.yaml
    dit-moe quickstart configs/lm_tiny.yaml

Everything goes into runs/<name of the config>/; a second call goes on where the first one stopped.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dit_moe.cli.config_arguments import add_config_arguments
from dit_moe.cli.encode import encode
from dit_moe.cli.sample import sample
from dit_moe.cli.train import load, prepare, run_folder, train
from dit_moe.config import ConfigError
from dit_moe.data.latents import LatentsConfig
from dit_moe.distributed import join_processes, locked, on_main
from dit_moe.evaluation.comparability import vouched
from dit_moe.evaluation.report_table import print_table
from dit_moe.evaluation.runs import compare, how_many, seeds_of, training_images
from dit_moe.evaluation.sources.base import ReadOptions
from dit_moe.evaluation.sources.open import IMAGES_FILE, open_word
from dit_moe.experiments.image import Experiment
from dit_moe.experiments.image_run import open_run
from dit_moe.experiments.text import TextExperiment
from dit_moe.files import write_atomically
from dit_moe.pictures import read_log, save_curves
from dit_moe.tasks.run_summary import training_rows
from dit_moe.training.run_folder import WRITTEN, require_own_run
from dit_moe.training.summary import active_experts, train_seconds

FILES = (IMAGES_FILE, "grid.png", "sample.json", "curves.png", "metrics.json")  # beside those of the training


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `run` reads."""
    add_config_arguments(parser, "configs/digits.yaml")
    parser.add_argument(
        "--run", dest="folder", type=Path, metavar="FOLDER", help="run folder; default runs/<name of the config>"
    )
    parser.add_argument(
        "--skip-broken", action="store_true", help="encode without the images that cannot be read, as dit-moe encode"
    )


def run(args: argparse.Namespace) -> None:
    """Do all of it and write metrics.json, curves.png and grid.png, or sample.json of text, into the run folder."""
    folder = run_folder(args.config, args.folder)
    raw = load(args.config, args.overrides)
    on_main(lambda: require_own_run(folder, [*WRITTEN, *FILES]))  # rather than after the training
    if isinstance(raw, TextExperiment):
        if args.skip_broken:
            raise ConfigError("--skip-broken", " is of images, and the config of a language model; leave it out")
        from dit_moe.tasks.quickstart_text import quickstart_text  # and with it transformers

        with locked(folder):
            quickstart_text(raw, folder, args.config.name)
        return
    if isinstance(raw.images, LatentsConfig):
        wanted = "results are compared with the images that were encoded; say which, in encode.images"
        raise ConfigError("encode", f" is missing; {wanted}")
    with locked(folder):
        _quickstart(raw, folder, args)


def _quickstart(raw: Experiment, folder: Path, args: argparse.Namespace) -> None:
    if isinstance(raw.data, LatentsConfig):
        encode(raw, skip_broken=args.skip_broken)
    experiment, dataset = prepare(raw)
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
        "active_experts": active_experts(log, experiment.model.moe),
        "train_seconds": train_seconds(log, "images"),
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


def _print_rest(metrics: dict[str, Any], folder: Path) -> None:
    table = Table(show_header=False)
    for row in training_rows(metrics):
        table.add_row(*row)
    for name in ("grid.png", "curves.png", "metrics.json"):
        table.add_row(name.partition(".")[0], str(folder / name))
    Console(stderr=True).print(table)
