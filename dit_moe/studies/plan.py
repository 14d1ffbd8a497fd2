"""The runs of a study, with their folders and configs, and whether they can be compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

from dit_moe import checkpoint, config
from dit_moe.config import ConfigError, Tree
from dit_moe.distributed import from_main
from dit_moe.evaluation.sources import open_input
from dit_moe.experiments.image import EvalConfig
from dit_moe.files import write_atomically
from dit_moe.json_files import read_if_good
from dit_moe.studies.study import Study, Variant, experiments_of, of_variant
from dit_moe.tasks import AnyExperiment, task_of
from dit_moe.tasks.train import prepare
from dit_moe.training.run_start import differing

DIVERGED_FILE = "diverged.json"  # in the folder of a run
TRAINING_ONLY = ("label_dropout", "flip", "document_mask")  # keys of objective and data without a part in the scores
NOT_OF_SCORES = ("batch_size", "light_every", "light_images", "light_documents")  # … and keys of `eval`


class Diverged(TypedDict):
    """What diverged.json holds."""

    config: Tree


@dataclass(frozen=True)
class PlannedRun:
    """One variant with one seed."""

    variant: Variant
    seed: int
    folder: Path
    experiment: AnyExperiment  # resolved
    heldout: str | None = None  # fingerprint of the split that is scored, if it has one
    reference: str | None = None  # … of what eval.reference names, which the metric compares with; None: not there

    @property
    def name(self) -> str:
        """How --only calls it."""
        return f"{self.variant.name}/{self.seed}"

    def is_trained(self) -> bool:
        """Whether its last checkpoint is there."""
        newest = checkpoint.latest(self.folder)
        return newest is not None and checkpoint.open_checkpoint(newest).step >= self.experiment.train.steps

    def has_diverged(self) -> bool:
        """Whether a training by this config was stopped by numbers that were not finite."""
        found = read_if_good(self.folder / DIVERGED_FILE, Diverged)
        return found is not None and found["config"] == config.dump(self.experiment)

    def note_divergence(self) -> None:
        write_atomically(self.folder / DIVERGED_FILE, json.dumps(Diverged(config=config.dump(self.experiment))))

    def weights_sha256(self) -> str:
        """Of the weights that are scored."""
        return checkpoint.open_checkpoint(self.folder).sha256(self.experiment.sample.weights)

    def precision(self) -> str:
        """That it was trained in."""
        return str(checkpoint.open_checkpoint(self.folder).state.get("precision", "unknown"))


def run_folder(out: Path, variant: Variant, seed: int) -> Path:
    """Where in the folder `out` of a study the run of a variant lies."""
    return out / variant.name / f"seed-{seed}"


def first_of_variants(runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """The first run of each variant."""
    return list({run.variant.name: run for run in reversed(runs)}.values())


def resolve(experiment: AnyExperiment) -> AnyExperiment:
    """With what follows from its data, which are there."""
    return prepare(experiment)[0]


def plan(
    study: Study,
    folder: Path,
    out: Path,
    only: str | None = None,
    resolved: Callable[[AnyExperiment], AnyExperiment] = resolve,
) -> list[PlannedRun]:
    """All runs of a study in the order of its seeds, so that the first seed is there first; or the one called `only`.

    All processes call it together.

    `resolved` fills in what follows from the data. ConfigError for any mistake in one of them, and for a run folder of
    another config: results are never mixed.
    """
    variants, seeds = study.variants, study.seeds
    if only is not None:
        name, _, seed = only.rpartition("/")
        if name in {variant.name for variant in variants}:
            seeds = study.seeds_of(study.variant(name))
        if seed not in map(str, seeds):
            raise ConfigError("--only", f"={only} must be VARIANT/SEED, with a seed of {', '.join(map(str, seeds))}")
        variants, seeds = (study.variant(name),), (int(seed),)
    experiments, heldout, references = experiments_of(study, folder, variants), {}, dict[str, str | None]()
    for name, experiment in experiments.items():
        with of_variant(name):
            experiments[name] = resolved(experiment)
        heldout[name] = _heldout_fingerprint(experiments[name])
        named = reference_of(study, experiments[name])
        if named is not None and named not in references:
            references[named] = _reference_fingerprint(named)
    _require_comparable(study, experiments, heldout)
    runs = [
        PlannedRun(
            variant,
            seed,
            run_folder(out, variant, seed),
            replace(experiments[variant.name], seed=seed),
            heldout[variant.name],
            references.get(reference_of(study, experiments[variant.name]) or ""),
        )
        for seed in seeds
        for variant in variants
        if seed in study.seeds_of(variant)
    ]
    for run in runs:
        _require_same_config(run)
    return runs


def _require_comparable(
    study: Study, experiments: Mapping[str, AnyExperiment], heldout: Mapping[str, str | None]
) -> None:
    """ConfigError for a variant that is scored in another way than its baseline."""
    for variant in study.variants:
        baseline = study.baseline_of(variant)
        if not {variant.name, baseline} <= experiments.keys():
            continue  # only one run was asked for
        own, other = (
            _scored_by(experiments[name], study.metric is not None) | {"held-out data": heldout[name]}
            for name in (variant.name, baseline)
        )
        found = dict(config.differences(own, other))
        if found:
            key = "objective.name" if "objective.name" in found else min(found)
            mine, its = found[key]
            problem = f"={mine}, but its baseline {baseline} has {its}, and their scores cannot be compared"
            remedy = "give it the same, or another `baseline`, itself for one"
            raise ConfigError(f"variant {variant.name}: {key}", f"{problem}; {remedy}")


def _scored_by(experiment: AnyExperiment, metric: bool) -> Tree:
    """The parts of a config that decide what a score is, whatever the network."""
    tree, text = config.dump(experiment), task_of(experiment).kind == "text"
    parts = {name: _without(tree[name], TRAINING_ONLY) for name in ("objective", "data")}
    if text:
        parts["sample"] = {"precision": tree["sample"]["precision"]}
    else:
        parts["first_stage"] = tree["first_stage"]
    if text or metric:
        parts["eval"] = _without(tree["eval"], NOT_OF_SCORES)
    return parts


def _without(section: Tree, keys: Iterable[str]) -> Tree:
    return {key: value for key, value in section.items() if key not in keys}


def _heldout_fingerprint(experiment: AnyExperiment) -> str | None:
    """Of the held-out split; None where it has none, and where the split is missing, which `check_scoring` reports."""
    try:
        return task_of(experiment).heldout_fingerprint(experiment)
    except ValueError:
        return None


def reference_of(study: Study, experiment: AnyExperiment) -> str | None:
    """What eval.reference names, if the study's metric compares with it."""
    settings = experiment.eval
    return settings.reference if study.metric is not None and isinstance(settings, EvalConfig) else None


def _reference_fingerprint(named: str) -> str | None:
    """Of the content of a reference, which is read; None where it is missing, which `check_scoring` reports."""
    try:
        opened = open_input(named)
        sources = {"source": opened.source, "heldout": opened.heldout}
        statistics = None if opened.statistics is None else opened.statistics.sha256

        def fingerprint() -> str:
            parts = {name: source and source.identity() for name, source in sources.items()}
            found = json.dumps(parts | {"statistics": statistics}, sort_keys=True)
            return hashlib.sha256(found.encode()).hexdigest()

        return from_main(fingerprint)
    except ValueError:
        return None


def _require_same_config(run: PlannedRun) -> None:
    """ConfigError if the run folder holds a run that was trained, in any of its steps, with another config."""
    newest = checkpoint.latest(run.folder)
    if newest is None:
        return
    saved = checkpoint.open_checkpoint(newest)
    kept = config.completed(saved.config(), type(run.experiment))
    found = differing(kept, config.dump(run.experiment), fixed=("train.steps",))
    remedy = "name another --out, or remove that folder to train it anew"
    if found:
        (key, (old, new)), *others = found.items()
        also = f" ({', '.join(key for key, _ in others)} differ too)" if others else ""
        raise ConfigError(
            key, f"={new} in the study, but the run in {run.folder} was trained with {old}{also}; {remedy}"
        )
    for change in saved.state.get("changes", ()):
        for key in sorted(change.keys() - {"step"}):
            problem = f" was changed after step {change['step']} of the run in {run.folder}, as its log.jsonl says"
            raise ConfigError(key, f"{problem}, and a study compares runs with one value for all steps; {remedy}")


def prepare_data(experiments: Iterable[AnyExperiment]) -> None:
    """Encode or tokenise what is trained on, where configs say of what; finished data are kept, and not looked into."""
    done: list[Any] = []
    for experiment in experiments:
        if experiment.data not in done:
            done.append(experiment.data)
            task_of(experiment).make_missing_data(experiment)
