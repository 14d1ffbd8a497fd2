"""Show where the experts of a trained network go: count what its routers do on held-out data, draw it, tell it.

Of images: active experts by layer, noise level, class and patch, maps of single images, the load of the experts, which
of them work together, and which serve which classes and noise levels. Of a language model: by layer, position and kind
of token, and along a passage. From the run's log: thresholds, θ and active experts over training.

Overrides change the run's section `sample` (weights=model; target=3 or p=0.6 for another compute budget), a language
model's `eval`, and where the data are now, for instance data.path=FOLDER.

In the output folder, by default RUN/routing: report.html (a single file), the pictures as PNGs, routing.json with the
numbers, and routing.npz with all of them.

    dit-moe routing runs/digits
    dit-moe routing runs/imagenet256/DiT-B-2-8E2A --images 5000 --times 50 batch_size=256 precision=bf16
    dit-moe routing runs/lm_tiny --tokens 50000
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dit_moe import config
from dit_moe.analysis import collect_images, collect_text
from dit_moe.analysis.collect import experts_of, spaced
from dit_moe.analysis.report import REPORT, write_report
from dit_moe.analysis.statistics import JSON, NPZ, RoutingStats, write_stats
from dit_moe.checkpoint import find
from dit_moe.config import ConfigError
from dit_moe.distributed import join_processes
from dit_moe.experiments.image import open_split
from dit_moe.experiments.run import ImageRun, TextRun, open_image_run, open_text_run
from dit_moe.files import read_object, require_own
from dit_moe.locks import exclusive
from dit_moe.pictures import read_log, router_curves
from dit_moe.progress import images_bar, work_bar
from dit_moe.rounding import rounded
from dit_moe.tasks import task_of

OF_IMAGES, OF_TEXT = ("images", "times"), ("tokens",)  # options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `run` reads."""
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="a run folder, or one of its checkpoint folders")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the section `sample`; see above")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the results go; default RUN/routing")
    parser.add_argument(
        "--split", metavar="NAME", help="of the data; default heldout, or train if there is no such one"
    )
    images, times = collect_images.IMAGES, collect_images.TIMES
    parser.add_argument("--images", type=int, metavar="N", help=f"images, evenly spaced; default at most {images}")
    parser.add_argument("--times", type=int, metavar="N", help=f"noise levels of each image; default {times}")
    tokens = f"tokens of text; default at most {collect_text.TOKENS:,}"
    parser.add_argument("--tokens", type=int, metavar="N", help=tokens)


def run(args: argparse.Namespace) -> None:
    """Count, write, and print a summary to stderr. ValueError for bad input, before the work starts."""
    if not join_processes().is_main_process:  # one process is enough, and the others would write the same files
        return
    text = task_of(args.run_folder).kind == "text"
    _require_options(args, text)
    home = _run_folder(find(args.run_folder))
    out = args.out or home / "routing"
    require_own(out, (REPORT, JSON, NPZ), "pictures" in read_object(out / JSON))
    with exclusive(out, JSON):
        _write(args, text, home, out)


def _write(args: argparse.Namespace, text: bool, home: Path, out: Path) -> None:
    start = time.perf_counter()
    stats = (_of_text if text else _of_images)(args)
    facts = {"device": join_processes().device.type, "seconds": round(time.perf_counter() - start, 1)}
    facts["versions"] = ", ".join(f"{name} {version(name)}" for name in ("dit_moe", "torch", "numpy"))
    training = router_curves(read_log(home / "log.jsonl"), stats.facts["step"])
    stats = replace(stats, facts=stats.facts | facts, training=training)
    write_stats(stats, out, pictures=write_report(stats, out))
    print_table(stats)
    Console(stderr=True, soft_wrap=True).print(f"report: {out / 'report.html'}")


def _require_options(args: argparse.Namespace, text: bool) -> None:
    """ConfigError for an option of the other kind of model, or a count of nothing."""
    kind, others = ("text", OF_IMAGES) if text else ("images", OF_TEXT)
    for option in others:
        if getattr(args, option) is not None:
            raise ConfigError(f"--{option}", f": {args.run_folder} is a model of {kind}; leave it out")
    for option in (*OF_IMAGES, *OF_TEXT):
        if (count := getattr(args, option)) is not None and count < 1:
            raise ConfigError(f"--{option}", f"={count} must be at least 1")


def _run_folder(checkpoint: Path) -> Path:
    """The run that a checkpoint folder is of; of a copy that lies by itself, the folder that it is in."""
    parent = checkpoint.absolute().parent
    return parent.parent if parent.name == "checkpoints" else parent


def _counts(**options: int | None) -> dict[str, Any]:
    """Those that were given."""
    return {name: value for name, value in options.items() if value is not None}


def _relocated(experiment: Any, changes: Sequence[str]) -> Any:
    """The experiment with changes to its section `data`."""
    return config.build(type(experiment), config.override(config.dump(experiment), changes))


def _parted(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Changes to the section `data`, and all others."""
    of_data = [each for each in overrides if each.startswith("data.")]
    return of_data, [each for each in overrides if each not in of_data]


# -------------------------------------------------------------------------------------------------------------- images


def _of_images(args: argparse.Namespace) -> RoutingStats:
    of_data, others = _parted(args.overrides)
    opened: ImageRun = open_image_run(args.run_folder, others, device=join_processes().device)
    experts_of(opened)
    dataset, split = open_split(_relocated(opened.experiment, of_data).data, args.split)
    options = _counts(images=args.images, times=args.times)
    images, times = options.get("images", collect_images.IMAGES), options.get("times", collect_images.TIMES)
    with images_bar("routing", len(spaced(len(dataset), images)) * times) as on_progress:
        stats = collect_images.collect_images(opened, dataset, on_progress=on_progress, **options)
    return replace(stats, facts=stats.facts | {"split": split})


# ---------------------------------------------------------------------------------------------------------------- text


def _of_text(args: argparse.Namespace) -> RoutingStats:
    of_data, others = _parted(args.overrides)
    opened: TextRun = open_text_run(args.run_folder, others, scoring=True, device=join_processes().device)
    experts_of(opened)
    relocated = replace(opened, experiment=_relocated(opened.experiment, of_data))
    shards, split = task_of(opened.experiment).open_split(relocated, args.split)
    most = opened.experiment.eval.max_documents
    wanted = collect_text.TOKENS if args.tokens is None else args.tokens
    step = max(1, len(shards) // wanted) if most is None else 1
    documents = shards.documents(stop=most, step=step)
    with work_bar("routing", min(wanted, len(shards)), "tokens") as on_progress:
        stats = collect_text.collect_text(opened, documents, tokens=wanted, on_progress=on_progress)
    return replace(stats, facts=stats.facts | {"split": split})


# ------------------------------------------------------------------------------------------------------------- summary


def print_table(stats: RoutingStats, console: Console | None = None) -> None:
    """Active experts and balance of every layer, on stderr."""
    facts = stats.facts
    table = Table("MoE layer", title=f"{facts['model']}, step {facts['step']}, {facts['split']}", pad_edge=False)
    for name in ("active experts", "± over tokens", "balance of load"):
        table.add_column(name, justify="right")
    layers = zip(stats.layers_L, stats.active_L, stats.active_std_L, stats.balance_L, strict=True)
    for layer, active, std, balance in layers:
        table.add_row(str(layer), *(rounded(value, 4) for value in (active, std, balance)))
    table.add_row("all", f"{stats.active:.4f}", "", str(stats.target))
    (console or Console(stderr=True)).print(table)
