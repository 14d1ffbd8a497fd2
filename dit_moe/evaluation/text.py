"""How well a language model predicts text: a trained run on held-out text or on files, and a run while it trains."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from dit_moe.distributed import join_processes, on_main
from dit_moe.experiments.run import TextRun, open_text_run
from dit_moe.experiments.text import open_heldout, scoring_options
from dit_moe.files import missing, require_regular, require_writable, write_atomically
from dit_moe.formatting import tell
from dit_moe.moe.compute_budget import thresholds
from dit_moe.progress import work_bar
from dit_moe.text.corpora import MARK
from dit_moe.text.corpora.files import read_text
from dit_moe.text.losses import NO_LOSSES, TextLosses, losses_of, not_comparable
from dit_moe.text.perplexity import ScoringError, score
from dit_moe.text.tokenizer import Document, TextTokenizer

RESULT = "perplexity.json"


def score_run(folder: Path, changes: Sequence[str], files: Sequence[Path], out: Path | None = None) -> dict[str, Any]:
    """Score `files`, each a document, or else the run's held-out text, and write the report as JSON.

    All processes call it together, and get the same report.

    Args:
        folder: of a run, or one of its checkpoints.
        changes: ``key=value``, of the sections `eval` and `sample`.
        out: where the report goes; None: perplexity.json in the run folder.

    Raises ValueError for bad input, before the work starts.
    """
    texts = [_read(path) for path in files]
    run = open_text_run(folder, changes, scoring=True, device=join_processes().device)
    place = out or run.home / RESULT
    on_main(lambda: _require_place(place, files))
    report = perplexity(run, _text_of_files(files, texts, run.tokenizer) if files else heldout_text(run))
    if join_processes().is_main_process:
        write_atomically(place, json.dumps(report, indent=1, allow_nan=False) + "\n")
    return report


def _require_place(out: Path, files: Sequence[Path]) -> None:
    if out.is_dir():
        raise ValueError(f"--out={out} is a folder; name a file, for instance {out / RESULT}")
    if any(out.absolute() == path.absolute() for path in files):
        raise ValueError(f"--out={out} is a text to score; name another file")
    require_regular(out)
    require_writable(out.parent)


# ------------------------------------------------------------------------------------------------------------ the text


@dataclass(frozen=True)
class EvaluationText:
    """Documents to score."""

    documents: Iterable[Document]
    tokens: int | None  # as far as it is known
    identity: dict[str, Any]  # which documents they are; JSON-ready
    losses: TextLosses | None  # what the tokenizer lost of them; None: it is not known


def _read(path: Path) -> str:
    """The text of a file; ValueError if it is not there, empty or not UTF-8."""
    if not path.is_file():
        problem = f"{path} is a folder" if path.is_dir() else missing(path)
        raise ValueError(f"{problem}; name files of UTF-8 text")
    text = read_text(path).removeprefix(MARK)
    if not text:
        raise ValueError(f"{path} is empty; leave it out")
    return text


def _text_of_files(files: Sequence[Path], texts: Sequence[str], tokenizer: TextTokenizer) -> EvaluationText:
    ids = tokenizer.encode_batch(texts)
    documents = [Document(each, len(text.encode())) for each, text in zip(ids, texts, strict=True)]
    hashes = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
    named = [{"file": str(path), "sha256": sha256} for path, sha256 in zip(files, hashes, strict=True)]
    return EvaluationText(
        documents, sum(map(len, ids)), {"files": named}, sum(losses_of(tokenizer, texts, ids), NO_LOSSES)
    )


def heldout_text(run: TextRun) -> EvaluationText:
    """The held-out split of the run's data. Raises what `open_heldout` raises."""
    shards = open_heldout(run.experiment, run.tokenizer, run.trained_on)
    predicted = shards.manifest.tokens - shards.manifest.documents  # all but the end of text before each document
    everything = run.experiment.eval.max_documents is None
    identity = {"folder": str(shards.folder), "fingerprint": shards.manifest.fingerprint}
    return EvaluationText(shards.documents(), predicted if everything else None, identity, shards.manifest.losses)


# ------------------------------------------------------------------------------------------------------------- scoring


def perplexity(run: TextRun, text: EvaluationText) -> dict[str, Any]:
    """What perplexity.json holds: the same on all processes, which call it together, however many they are."""
    experiment, tokenizer = run.experiment, run.tokenizer
    options, most = scoring_options(experiment), experiment.eval.max_documents
    with work_bar("scoring", text.tokens, "tokens") as advance:
        scores = score(run.model, text.documents, eos=tokenizer.eos, max_documents=most, on_progress=advance, **options)
    footprint, moe, sample = experiment.model.footprint(), experiment.model.moe, experiment.sample
    reasons = not_comparable(text.losses, tokenizer.name)
    return scores.report() | {
        "comparable_between_tokenizers": not reasons,
        "not_comparable_because": reasons,
        "target_experts": None if moe is None or sample.p is not None else sample.target or moe.target,
        "thresholds": thresholds(run.model),
        "text": text.identity,
        "run": str(run.folder),
        "step": run.step,
        "weights": sample.weights,
        "weights_sha256": run.sha256,
        "model": experiment.model.name,
        "parameters": footprint.total_params,
        "active_parameters": footprint.active_params,
        "tokenizer": {"name": tokenizer.name, "sha256": tokenizer.config.sha256},
        "settings": {**options, "stride": options["stride"] or options["length"], "max_documents": most},
        "device": next(run.model.parameters()).device.type,
        "versions": {name: version(name) for name in ("dit_moe", "torch", "transformers", "tokenizers")},
    }


class HeldoutTextHook:
    """A hook of the trainer that scores some documents: loss, bits per byte and active experts.

    It keeps the documents in memory. Arguments as of `score`. ValueError at once if there are no documents.
    """

    def __init__(self, documents: Iterable[Document], **how: Any) -> None:
        self.documents, self.how = list(documents), how
        if not any(len(ids) for ids, _ in self.documents):
            raise ValueError("there is no held-out text to score; name some, or do not ask for its loss")

    def __call__(self, step: int, network: nn.Module) -> dict[str, Any] | None:
        """The numbers, on the main process; if scoring fails, a warning and None: training goes on."""
        main = join_processes().is_main_process
        try:
            scores = score(network, self.documents, **self.how)
        except (ValueError, ScoringError) as error:
            if main:
                tell(f"warning: no held-out loss at step {step}: {error}")
            return None
        numbers = {"loss": scores.loss, "bits_per_byte": scores.bits_per_byte, "active_experts": scores.active.mean}
        return {f"heldout_{name}": value for name, value in numbers.items()} if main else None
