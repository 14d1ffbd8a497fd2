"""Which runs a study consists of, where each lies, and whether what lies there is of this study."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dit_moe import checkpoint, config
from dit_moe.config import ConfigError
from dit_moe.experiments.image import Experiment
from dit_moe.experiments.text import TextExperiment
from dit_moe.studies.study import Study, Variant
from dit_moe.training.run_folder import differing

SCORE = "score.json"


@dataclass(frozen=True)
class PlannedRun:
    """One variant with one seed."""

    variant: Variant
    seed: int
    folder: Path
    experiment: Experiment | TextExperiment  # resolved
    heldout: str | None = None  # fingerprint of the split that is scored, if it has one

    @property
    def name(self) -> str:
        """How --only calls it."""
        return f"{self.variant.name}/{self.seed}"

    def is_trained(self) -> bool:
        """Whether its last checkpoint is there."""
        newest = checkpoint.latest(self.folder)
        return newest is not None and checkpoint.open_checkpoint(newest).step >= self.experiment.train.steps

    def weights_sha256(self) -> str:
        """Of the weights that are scored."""
        files = checkpoint.open_checkpoint(self.folder).state["files"]
        return str(files[f"{self.experiment.sample.weights}.safetensors"]["sha256"])

    def precision(self) -> str:
        """That it was trained in."""
        return str(checkpoint.open_checkpoint(self.folder).state["precision"])


def run_folder(out: Path, variant: Variant, seed: int) -> Path:
    return out / variant.name / f"seed-{seed}"


def require_unmixed(runs: Sequence[PlannedRun]) -> None:
    """ConfigError if a run folder holds a run of another config than the study has now: results are never mixed."""
    for run in runs:
        newest = checkpoint.latest(run.folder)
        if newest is None:
            continue
        was = checkpoint.open_checkpoint(newest).config()
        found = differing(was, config.dump(run.experiment), fixed=("train.steps",))
        if found:
            (key, (old, new)), *others = found.items()
            also = f" ({', '.join(key for key, _ in others)} differ too)" if others else ""
            problem = f"={new} in the study, but the run in {run.folder} was trained with {old}{also}"
            raise ConfigError(key, f"{problem}; name another --out, or remove that folder to train it anew")


def loss_identity(study: Study, run: PlannedRun) -> dict[str, Any]:
    """What a run's held-out loss, experts and FLOPs depend on: they are measured anew when any of this changes."""
    tree = config.dump(run.experiment)
    if isinstance(run.experiment, TextExperiment):
        how = {name: tree["eval"][name] for name in ("stride", "batch_size", "max_documents")}
        how["precision"] = tree["sample"]["precision"]
    else:
        how = config.dump(study.heldout)
    return {
        "weights_sha256": run.weights_sha256(),
        "heldout": how | {"data": run.heldout or tree["data"].get("heldout")},
        "dit_moe": version("dit_moe"),
    }


def metric_identity(study: Study, run: PlannedRun) -> dict[str, Any]:
    """What the metric depends on beside that."""
    tree = config.dump(run.experiment)
    text = isinstance(run.experiment, TextExperiment)  # whose metrics come with the loss
    return {"metric": study.metric} | ({} if text else {"eval": tree["eval"], "sample": tree["sample"]})


def read_loss(study: Study, run: PlannedRun) -> dict[str, Any] | None:
    """What score.json holds of a run that is trained to its end, if its loss is of this study; its metric may not be.

    None if there is no such thing.
    """
    path = run.folder / SCORE
    if not path.exists() or not run.is_trained():
        return None
    try:
        score: dict[str, Any] = json.loads(path.read_text())
    except ValueError:
        return None  # it is made anew
    return score if score.get("identity") == loss_identity(study, run) else None


def read_score(study: Study, run: PlannedRun) -> dict[str, Any] | None:
    """The score of a finished run; None if it is not trained to its end, or not scored, or in another way."""
    score = read_loss(study, run)
    if score is None or study.metric is None:
        return None if score is None else score | {"metric": None}
    metric = score["metric"]
    return score if metric is not None and metric["identity"] == metric_identity(study, run) else None
