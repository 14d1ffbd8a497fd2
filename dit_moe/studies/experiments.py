"""The runs of a study: their experiments, checked against each other, and the data that they need."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from dit_moe import config
from dit_moe.config import ConfigError, Tree
from dit_moe.experiments.text import TextExperiment
from dit_moe.studies.plan import PlannedRun, run_folder
from dit_moe.studies.study import Study, Variant, experiment_tree
from dit_moe.tasks import task_of
from dit_moe.tasks.train import prepare

AnyExperiment = Any
TRAINING_ONLY = ("label_dropout", "flip", "document_mask")  # of objective and data: held-out losses know none of them
NO_PART = ("batch_size", "light_every", "light_images", "light_documents")  # of `eval`, in what is scored at the end


def experiments_of(study: Study, folder: Path, variants: Iterable[Variant] | None = None) -> dict[str, AnyExperiment]:
    """By the variant's name; fields that follow from the data are open. ConfigError, naming the variant, for mistakes.

    `folder` is the study's, which its files are named relative to.
    """
    experiments = {}
    for variant in study.variants if variants is None else variants:
        with of_variant(variant.name):
            tree = experiment_tree(study, variant, study.seeds[0], folder)
            experiments[variant.name] = task_of(tree).build_experiment(tree)
    return experiments


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

    `resolved` fills in what follows from the data. ConfigError, naming the variant, for any mistake in one of them.
    """
    variants, seeds = study.variants, study.seeds
    if only is not None:
        name, _, seed = only.rpartition("/")
        if seed not in map(str, seeds):
            raise ConfigError("--only", f"={only} must be VARIANT/SEED, with a seed of {', '.join(map(str, seeds))}")
        variants, seeds = (study.variant(name),), (int(seed),)
    experiments, heldout = experiments_of(study, folder, variants), {}
    for variant in variants:
        with of_variant(variant.name):
            experiments[variant.name] = resolved(experiments[variant.name])
        heldout[variant.name] = _heldout_fingerprint(experiments[variant.name])
    require_comparable(study, experiments, heldout)
    return [
        PlannedRun(
            variant,
            seed,
            run_folder(out, variant, seed),
            replace(experiments[variant.name], seed=seed),
            heldout[variant.name],
        )
        for seed in seeds
        for variant in variants
    ]


def require_comparable(
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
    tree, text = config.dump(experiment), isinstance(experiment, TextExperiment)
    parts = {name: _without(tree[name], TRAINING_ONLY) for name in ("objective", "data")}
    if text:
        parts["sample"] = {"precision": tree["sample"]["precision"]}
    else:
        parts["first_stage"] = tree["first_stage"]
    if text or metric:
        parts["eval"] = _without(tree["eval"], NO_PART)
    return parts


def _without(section: Tree, keys: Iterable[str]) -> Tree:
    return {key: value for key, value in section.items() if key not in keys}


def _heldout_fingerprint(experiment: AnyExperiment) -> str | None:
    """Of the held-out split; None where code makes it, and where there is none, of which `check_scoring` tells."""
    try:
        return task_of(experiment).heldout_fingerprint(experiment)
    except ValueError:
        return None


@contextmanager
def of_variant(name: str) -> Iterator[None]:
    """Within it a mistake in a config says whose it is."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"variant {name}: {error.path}", error.problem) from None


def prepare_data(experiments: Iterable[AnyExperiment]) -> None:
    """Encode or tokenise what is trained on, where configs say of what; finished data are kept, and not looked into."""
    done: list[Any] = []
    for experiment in experiments:
        if experiment.data in done:
            continue
        done.append(experiment.data)
        task_of(experiment).make_missing_data(experiment)
