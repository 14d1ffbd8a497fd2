"""Text scored by a language model's run: bits per byte, perplexity, and the experts that it takes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dit_moe.experiments.run import TextRun
from dit_moe.experiments.text import open_heldout, scoring_options
from dit_moe.moe.compute_budget import thresholds
from dit_moe.progress import work_bar
from dit_moe.text.corpora.base import decoded
from dit_moe.text.perplexity import Document, score
from dit_moe.text.scores import Scores
from dit_moe.text.tokenizer import TextTokenizer


@dataclass(frozen=True)
class Text:
    """Documents to score."""

    documents: Iterable[Document]
    tokens: int | None  # as far as it is known
    identity: dict[str, Any]  # JSON-ready: what they are


def read_text(path: Path) -> str:
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
