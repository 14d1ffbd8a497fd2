"""What `dit-moe quickstart` does with a language model's config: tokenise, train, score, write."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dit_moe.cli.sample_text import sample_text
from dit_moe.cli.tokenize_text import tokenize_all
from dit_moe.cli.train import prepare, train
from dit_moe.config import ConfigError
from dit_moe.distributed import join_processes
from dit_moe.evaluation.text import heldout_text, open_heldout, perplexity
from dit_moe.experiments.text import TextExperiment
from dit_moe.experiments.text_run import open_text_run
from dit_moe.files import write_atomically
from dit_moe.pictures import read_log, save_curves
from dit_moe.rounding import rounded
from dit_moe.tasks.run_summary import training_rows
from dit_moe.text.ngram import TrigramModel
from dit_moe.text.sequences import open_shards
from dit_moe.text.tokenizer import TextTokenizer
from dit_moe.training.summary import active_experts, train_seconds

TRIGRAM_BYTES = 2**25  # of training text that the trigram model counts: 32 MiB take it some 2 GiB of memory


def quickstart_text(raw: TextExperiment, folder: Path, config_name: str) -> None:
    """Do all of it and write metrics.json, sample.json and curves.png into the run folder."""
    if raw.tokenize is None:
        raise ConfigError("tokenize", " is missing; say there which text the tokens of `data` are made of")
    if raw.data.heldout is None:
        raise ConfigError("data.heldout", " is missing; name a folder for the tokens of held-out text")
    tokenize_all(raw)
    experiment, tokens = prepare(raw)
    # Before training, as mistakes in it should show first.
    open_heldout(experiment, tokens.tokenizer(), tokens.manifest.origin)
    train(experiment, tokens, folder)
    run = open_text_run(folder, experiment=experiment, device=join_processes().device)
    report = perplexity(run, heldout_text(run))
    passage = sample_text(run, folder)
    if passage is None:  # not the main process
        return
    trigram = TrigramModel(_texts(experiment, run.tokenizer, "train", most=TRIGRAM_BYTES))
    heldout = islice(_texts(experiment, run.tokenizer, "heldout"), experiment.eval.max_documents)
    log = read_log(folder / "log.jsonl")
    metrics = report | {
        "bits_per_byte": {
            "model": report["bits_per_byte"],
            "model_std_error": report["bits_per_byte_std_error"],
            "trigram": trigram.bits_per_byte(heldout),
        },
        "active_experts": active_experts(log, experiment.model.moe),
        "heldout_active_experts": report["active_experts"],
        "train_seconds": train_seconds(log, "tokens"),
        "config": config_name,
    }
    target = experiment.model.moe and experiment.model.moe.target
    save_curves(log, target, folder / "curves.png", read_log(folder / "evaluations.jsonl"))
    write_atomically(folder / "metrics.json", json.dumps(metrics, indent=1, allow_nan=False) + "\n")
    _print(metrics, folder)


def _texts(experiment: TextExperiment, tokenizer: TextTokenizer, split: str, most: float = math.inf) -> Iterator[bytes]:
    """The documents of a split, from its tokens: what the model saw. They end when there are `most` bytes."""
    for ids, size in open_shards(experiment.data, split).documents():
        yield tokenizer.decode(ids).encode()
        most -= size
        if most <= 0:
            return


def _print(metrics: dict[str, Any], folder: Path) -> None:
    table, bits = Table(show_header=False), metrics["bits_per_byte"]
    error = bits["model_std_error"]  # None of a single document
    spread = "" if error is None else f" ± {rounded(error, 3)}"
    table.add_row("held-out bits per byte", f"{bits['model']:.3f}{spread}")
    table.add_row("… of a trigram model of the same text", f"{bits['trigram']:.3f}")
    for row in training_rows(metrics):
        table.add_row(*row)
    for name in ("sample.json", "curves.png", "metrics.json"):
        table.add_row(name.partition(".")[0], str(folder / name))
    Console(stderr=True).print(table)
