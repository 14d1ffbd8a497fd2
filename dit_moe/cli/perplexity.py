"""Score text by a language model: bits per byte, perplexity, and the experts that it takes.

By default that is the held-out split of the run's data; or else files of UTF-8 text, each a document. Every document is
scored by itself, in windows as lm-evaluation-harness cuts them. `key=value` changes the sections `eval` and `sample`;
`data.heldout=FOLDER` names other held-out tokens, or where they have moved to.

The result is JSON on stdout and in a file, and a table on stderr. Started by torchrun or accelerate the command uses
every process; the result is the same.

    dit-moe perplexity runs/lm_tiny
    dit-moe perplexity runs/lm_tiny README.md docs/language.md --stride 64 --out readme.json precision=bf16
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dit_moe.config import Tree, section
from dit_moe.distributed import join_processes, on_main
from dit_moe.experiments.text import TextEvalConfig, TextExperiment
from dit_moe.experiments.text_run import TextRun, open_text_run
from dit_moe.files import require_writable, write_atomically
from dit_moe.moe.compute_budget import thresholds
from dit_moe.progress import work_bar
from dit_moe.rounding import rounded
from dit_moe.text.corpora.base import decoded
from dit_moe.text.perplexity import Document, score
from dit_moe.text.scores import Scores
from dit_moe.text.sequences import open_shards
from dit_moe.text.token_shards import TokenShards, require_held_out
from dit_moe.text.tokenizer import TextTokenizer

OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")
OF_EVAL = {field.name for field in fields(TextEvalConfig)}
OPTIONS = ("stride", "batch_size", "max_documents")  # of the section `eval` that have one of the command's own
FILE = "perplexity.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `run` reads."""
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="a run folder, or one of its checkpoint folders")
    parser.add_argument("words", nargs="*", metavar="TEXT", help="files of UTF-8 text; or key=value; see above")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"where the result goes; default RUN/{FILE}")
    parser.add_argument("--stride", metavar="N", help="tokens that each window predicts; fewer see more context")
    parser.add_argument("--batch-size", metavar="N", help="windows at a time")
    parser.add_argument("--max-documents", metavar="N", help="score the first so many only")


def run(args: argparse.Namespace) -> None:
    """Score, write JSON, print it to stdout and a table to stderr. ValueError for bad input, before the work starts."""
    words = [word for word in args.words if OVERRIDE.match(word) and not Path(word).exists()]
    files = [Path(word) for word in args.words if word not in words]
    texts = [_read(path) for path in files]
    stated = [f"{name}={value}" for name in OPTIONS if (value := getattr(args, name)) is not None]
    changes = [whole_key(each) for each in [*words, *stated]]
    opened = open_text_run(args.run_folder, changes, scoring=True, device=join_processes().device)
    out = args.out or opened.folder.absolute().parent.parent / FILE
    on_main(lambda: _require_place(out, files))
    text = of_files(files, texts, opened.tokenizer) if files else heldout_text(opened)
    report = perplexity(opened, text)
    if join_processes().is_main_process:
        told = json.dumps(report, indent=1, allow_nan=False)
        write_atomically(out, told + "\n")
        print(told)
        print_table(report)


def whole_key(change: str) -> str:
    """With the section's name before a key of `eval`; other keys are those of `sample`."""
    return f"eval.{change}" if change.partition("=")[0] in OF_EVAL else change


def _require_place(out: Path, files: Sequence[Path]) -> None:
    if out.is_dir():
        raise ValueError(f"--out={out} is a folder; name a file, for instance {out / FILE}")
    if any(out.absolute() == path.absolute() for path in files):
        raise ValueError(f"--out={out} is a text to score; name another file")
    require_writable(out.parent)


# ------------------------------------------------------------------------------------------------------------ the text


@dataclass(frozen=True)
class Text:
    """Documents to score."""

    documents: Iterable[Document]
    tokens: int | None  # as far as it is known
    identity: dict[str, Any]  # JSON-ready: what they are


def _read(path: Path) -> str:
    """The text of a file; ValueError if it is not there, empty or no UTF-8."""
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(f"{path} {found}; name files of UTF-8 text")
    text = decoded(path.read_bytes(), str(path))
    if not text:
        raise ValueError(f"{path} is empty; leave it out")
    return text


def of_files(files: Sequence[Path], texts: Sequence[str], tokenizer: TextTokenizer) -> Text:
    """Each file as a document."""
    raw = [text.encode() for text in texts]
    documents = [(tokenizer.encode(text), len(each)) for text, each in zip(texts, raw, strict=True)]
    hashes = [hashlib.sha256(each).hexdigest() for each in raw]
    named = [{"file": str(path), "sha256": sha256} for path, sha256 in zip(files, hashes, strict=True)]
    return Text(documents, sum(len(ids) for ids, _ in documents), {"files": named})


def heldout_text(opened: TextRun) -> Text:
    """The held-out split of the run's data. ValueError if there is none, it is of another tokenizer, or no held-out."""
    shards = open_heldout(opened.experiment, opened.tokenizer, opened.trained)
    counted = shards.manifest.tokens - shards.manifest.documents  # one by one they stand behind an end of text
    whole = opened.experiment.eval.max_documents is None
    identity = {"folder": str(shards.folder), "fingerprint": shards.manifest.fingerprint}
    return Text(shards.documents(), counted if whole else None, identity)


def open_heldout(experiment: TextExperiment, tokenizer: TextTokenizer, trained: Tree) -> TokenShards:
    """The tokens of held-out text. ValueError unless they are of this tokenizer, and not of what is trained on.

    `trained` is the `TokenManifest.origin` of that.
    """
    with section("data"):
        shards = open_shards(experiment.data, "heldout")
    try:
        shards.manifest.require_tokenizer(tokenizer)
    except ValueError as error:
        raise ValueError(f"data.heldout={shards.folder}: {error}") from None
    require_held_out(trained, shards.manifest)
    return shards


# ------------------------------------------------------------------------------------------------------------- scoring


def scoring_options(experiment: TextExperiment) -> dict[str, Any]:
    """Arguments of `score` and `HeldoutLoss` that an experiment states."""
    return {
        "length": experiment.data.length,
        "vocab_size": experiment.model.vocab_size,
        "stride": experiment.eval.stride,
        "batch_size": experiment.eval.batch_size,
        "precision": experiment.sample.precision,
    }


def perplexity(opened: TextRun, text: Text) -> dict[str, Any]:
    """What perplexity.json holds: the same on all processes, which call it together, and however many they are."""
    experiment = opened.experiment
    options, most = scoring_options(experiment), experiment.eval.max_documents
    with work_bar("scoring", text.tokens, "tokens") as on_progress:
        scores: Scores = score(
            opened.model,
            text.documents,
            eos=opened.tokenizer.eos,
            max_documents=most,
            on_progress=on_progress,
            **options,
        )
    footprint, moe, sample = experiment.model.footprint(), experiment.model.moe, experiment.sample
    settings = {**options, "stride": options["stride"] or options["length"], "max_documents": most}
    return scores.report() | {
        "target_experts": None if moe is None or sample.p is not None else sample.target or moe.target,
        "thresholds": thresholds(opened.model),
        "text": text.identity,
        "run": str(opened.folder),
        "step": opened.step,
        "weights": experiment.sample.weights,
        "weights_sha256": opened.sha256,
        "model": experiment.model.name,
        "parameters": footprint.total_params,
        "active_parameters": footprint.active_params,
        "tokenizer": {"name": opened.tokenizer.name, "sha256": opened.tokenizer.config.sha256},
        "settings": settings,
        "device": next(opened.model.parameters()).device.type,
        "versions": {name: version(name) for name in ("dit_moe", "torch", "transformers", "tokenizers")},
    }


def print_table(report: dict[str, Any], console: Console | None = None) -> None:
    """The numbers of a report, on stderr."""
    counts = f"{report['documents']:,} documents, {report['tokens']:,} tokens, {report['bytes']:,} bytes"
    table = Table("", title=counts, pad_edge=False)
    table.add_column(f"step {report['step']}", justify="right")
    table.add_column("± standard error", justify="right")
    for name, label in (("bits_per_byte", "bits per byte"), ("perplexity", "perplexity per token"), ("loss", "loss")):
        table.add_row(label, *(_shown(report[key]) for key in (name, f"{name}_std_error")))
    if report["active_experts"] is not None:
        table.add_row("active experts", f"{report['active_experts']:.4f}", _target(report["target_experts"]))
    (console or Console(stderr=True)).print(table)


def _target(asked: float | Sequence[float] | None) -> str:
    if asked is None:
        return ""
    return f"target {asked:g}" if isinstance(asked, float) else f"targets {', '.join(f'{one:g}' for one in asked)}"


def _shown(value: float | None) -> str:
    return "" if value is None else rounded(value, 4, 2)
