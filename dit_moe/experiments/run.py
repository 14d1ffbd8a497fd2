"""A run folder, opened to be used: its experiment, its network, and what belongs to that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, TypedDict

import torch
from torch import Tensor, nn

from dit_moe import checkpoint, config
from dit_moe.autoencoders import FIRST_STAGES, FirstStage
from dit_moe.autoencoders.own_copy import with_own_copy
from dit_moe.config import ConfigError, Keys, Tree, section
from dit_moe.data.listing import note
from dit_moe.diffusion import OBJECTIVES, Objective
from dit_moe.experiments.image import Experiment, image_experiment, resolve_sampling, with_fingerprint
from dit_moe.experiments.text import TextEvalConfig, TextExperiment, TextSampleConfig, open_tokens, text_experiment
from dit_moe.formats import Weights, open_model
from dit_moe.models import LM, MODELS
from dit_moe.moe.compute_budget import ComputeBudget, solve_budget
from dit_moe.sampling.generator import Generator, SampleConfig
from dit_moe.sampling.labels import choose_labels
from dit_moe.text.sequences import TokenSequences
from dit_moe.text.token_shards import Origin
from dit_moe.text.tokenizer import TextTokenizer, TokenizerConfig, open_tokenizer
from dit_moe.training.run_start import note_edited_config

TOKENIZER = "tokenizer"  # folder of a language model's run that holds it
BUDGET_ROWS, BUDGET_BATCH = 128, 16  # of tokens that a language model's compute budget is solved on
WRITTEN_IN_FULL = ("first_stage.", "data.", "encode.")  # changes that are not to the section `sample`


@dataclass
class Run:
    """What a checkpoint holds, built and loaded."""

    folder: Path  # of the checkpoint, or the weights of another suite
    home: Path = field(kw_only=True)  # the run folder that the checkpoint lies in, or where results go
    step: int
    sha256: str  # of the weights' file
    experiment: Any
    model: nn.Module

    def facts(self) -> dict[str, Any]:
        """What results say of the run that they are of; JSON-ready."""
        return {
            "run": str(self.folder),
            "step": self.step,
            "weights_sha256": self.sha256,
            "experiment": config.dump(self.experiment),
        }


@dataclass
class ImageRun(Run):
    """A model of images, with its objective and its first stage."""

    experiment: Experiment
    objective: Objective
    stage: FirstStage
    class_counts: list[int] | None  # images of each class that it was trained on; None: it did not record them
    class_names: list[str] | None = None  # in the order of the label table; None: as before

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        network = self.experiment.model
        return network.in_channels, network.input_size, network.input_size

    def generator(self, sample: SampleConfig | None = None, budget: ComputeBudget | None = None) -> Generator:
        """A generator by the experiment's section `sample`, or by another one; `budget` is its own, solved before."""
        sample = sample or self.experiment.sample
        return Generator(self.model, self.objective, self.stage, sample, self.latent_shape, budget)

    def labels(self, sample: SampleConfig | None = None) -> Tensor:
        """The label of every image, int64, by the experiment's section `sample`, or by another one.

        ConfigError if that wants the class frequencies of the data, and the run did not record them.
        """
        sample, classes = sample or self.experiment.sample, self.experiment.model.num_classes
        with section("sample"):
            return choose_labels(sample, classes, self.class_counts, self.class_names)


@dataclass
class TextRun(Run):
    """A language model, with its tokenizer."""

    experiment: TextExperiment
    model: LM
    tokenizer: TextTokenizer
    trained_on: Tree  # `TokenManifest.origin` of the tokens it was trained on


def note_unfinished(run: Run, given: Path) -> None:
    """Say how far the run in the folder `given` is, unless it is finished; a checkpoint folder was meant as it is.

    Weights of another suite do not say how long they were trained: they are at step 0.
    """
    steps = run.experiment.train.steps
    if 0 < run.step < steps and not (given / checkpoint.STATE).is_file():
        note(f"{given} is at step {run.step:,} of {steps:,}")


class _TextState(TypedDict):
    """What is read of a language model's state.json, too."""

    tokenizer: TokenizerConfig
    trained_on: Annotated[Tree, Keys(Origin)]


def open_image_run(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    sample: SampleConfig | None = None,
    device: str | torch.device = "cpu",
) -> ImageRun:
    """Open the newest checkpoint of a run folder, or a checkpoint folder, for sampling.

    Its autoencoder is the copy in the run folder, if there is one.

    Args:
        path: the folder.
        overrides: ``key=value`` changes to the section ``sample`` ("guidance.scale=2"), whose name may stand before
            them, and, written in full, to ``data``, ``encode`` and ``first_stage`` ("first_stage.tiling=true").
        sample: what takes the place of that section, before the changes; None is the run's own.
        device: where the network goes.

    Raises ValueError if there is no such run, if a file of it is damaged, or for a mistake in the overrides.
    """
    opened = open_model(path)
    tree = _located_config(opened, path, image_experiment)
    if sample is not None:
        tree["sample"] = config.dump(sample)
    whole = [each if each.startswith(WRITTEN_IN_FULL) else f"sample.{each}" for each in sampling_changes(overrides)]
    experiment = image_experiment(config.override(tree, whole))
    named = [change.partition("=")[0] for change in whole]
    experiment = replace(experiment, first_stage=with_own_copy(experiment.first_stage, opened.run, named))
    objective = OBJECTIVES.build(experiment.objective, num_classes=experiment.model.num_classes)
    opened.require_classes(experiment.model.num_classes)
    class_names = opened.state.get("class_names")
    experiment = replace(experiment, sample=resolve_sampling(experiment, objective, class_names))
    stage: FirstStage = FIRST_STAGES.build(experiment.first_stage).to(device)
    stage.load()
    return ImageRun(
        **_loaded(opened, experiment, device),
        objective=objective,
        stage=stage,
        class_counts=opened.state.get("class_counts"),
        class_names=class_names,
    )


def _located_config(opened: checkpoint.Checkpoint, path: str | Path, build: Callable[[Tree], Any]) -> Tree:
    """The config of a checkpoint, not yet typed, whose paths lead where they did in the folder the run was started in.

    Those that lead nowhere there are left as they are: the run may have been moved here together with its data.
    """
    if opened.folder != Path(path):  # the run was named, and not the checkpoint
        note_edited_config(opened)
    tree, started_in = opened.config(), opened.started_in
    return tree if started_in == Path.cwd() else config.dump(config.located(build(tree), started_in))


def trained_objective(path: str | Path) -> str:
    """The name of the objective that a run of images was trained with. Raises what opening it raises."""
    return OBJECTIVES.name_of(image_experiment(open_model(path).config()).objective)


def sampling_changes(overrides: Sequence[str]) -> list[str]:
    """Changes to the section ``sample``, without its name before them; those to other sections as they are.

    Raises ConfigError for a change to the section ``eval``.
    """
    for change in overrides:
        key, _, value = change.partition("=")
        if key.startswith("eval."):
            raise ConfigError(key, f"={value} is no option of sampling; dit-moe train, quickstart and eval take it")
    return [change.removeprefix("sample.") for change in overrides]


def open_text_run(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    scoring: bool = False,
    experiment: TextExperiment | None = None,
    device: str | torch.device = "cpu",
) -> TextRun:
    """Open the newest checkpoint of a run folder, or a checkpoint folder.

    Args:
        path: the folder.
        overrides: ``key=value`` changes to the section ``sample``, whose name may stand before them.
        scoring: take changes to ``eval``, whose name may be left out, and to all of ``data``, written in full;
            otherwise to ``data.path`` alone.
        experiment: what the run was started with last, in place of the checkpoint's own and of changes to that.
        device: where the network goes.

    Raises ValueError if there is no such run, if a file of it is damaged, or for a mistake in the overrides.
    """
    opened = open_model(path)
    changes = [_whole_key(each, scoring) for each in overrides]
    if experiment is None:
        experiment = text_experiment(config.override(_located_config(opened, path, text_experiment), changes))
    loaded = _loaded(opened, experiment, device)
    _set_experts(loaded["model"], experiment)
    return TextRun(**loaded, tokenizer=_tokenizer_of(opened), trained_on=opened.facts(_TextState)["trained_on"])


def _whole_key(change: str, scoring: bool) -> str:
    """With the name of its section before the key."""
    if change.startswith(("sample.", "data.", "eval.") if scoring else ("sample.", "data.path=")):
        return change
    of_eval = scoring and change.partition("=")[0] in {field.name for field in fields(TextEvalConfig)}
    return f"eval.{change}" if of_eval else f"sample.{change}"


def _loaded(opened: checkpoint.Checkpoint, experiment: Any, device: str | torch.device) -> dict[str, Any]:
    """The fields that every run has, with the weights that the section `sample` names."""
    weights = experiment.sample.weights
    model = MODELS.build(experiment.model)
    checkpoint.load_into(model, opened.weights(weights), opened.folder)
    return {
        "folder": opened.folder,
        "home": opened.run,
        "step": opened.step,
        "sha256": opened.sha256(weights),
        "experiment": experiment,
        "model": model.to(device).eval(),
    }


def _set_experts(model: LM, experiment: TextExperiment) -> None:
    """Let the model use as many experts as the section `sample` says, solved on tokens that it was trained on.

    ConfigError if they are needed and not there.
    """
    dataset = None
    if experiment.sample.target is not None:
        try:
            dataset = open_tokens(experiment)
            with_fingerprint(experiment.data, dataset.fingerprint)
        except ValueError as error:
            problem = f" is solved on the tokens that were trained on: {error}; or set sample.p"
            raise ConfigError("sample.target", problem) from None
    budget = solve_text_budget(experiment.sample, model, dataset)
    if budget is not None:
        budget.apply()


def solve_text_budget(sample: TextSampleConfig, model: LM, dataset: TokenSequences | None) -> ComputeBudget | None:
    """The compute budget that the section `sample` requests; None: as trained.

    A target is solved on rows from all over the tokens of training, always the same, so that the solution depends on
    nothing else.
    """

    def see_rows(budget: ComputeBudget) -> None:
        assert dataset is not None, "a target is solved on tokens"
        device, count = next(model.parameters()).device, min(BUDGET_ROWS, len(dataset))
        chosen = [number * len(dataset) // count for number in range(count)]
        autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=sample.precision == "bf16")
        with torch.no_grad(), budget.at(), autocast:
            for start in range(0, count, BUDGET_BATCH):
                batch = dataset.__getitems__(chosen[start : start + BUDGET_BATCH])
                model(*(each[:, :-1].to(device) for each in batch.values()), states=True)  # tokens, and documents

    return solve_budget(sample, model, see_rows)


def _tokenizer_of(opened: checkpoint.Checkpoint) -> TextTokenizer:
    """The tokenizer that lies in the run folder, or beside weights. ValueError if it is gone, or another one."""
    if isinstance(opened, Weights):
        return open_tokenizer(opened.facts(_TextState)["tokenizer"])
    folder = opened.run / TOKENIZER
    if not folder.is_dir():
        raise ValueError(f"{folder} is missing; restore it from a copy, or from the folder of tokens trained on")
    with section("tokenizer"):
        return open_tokenizer(opened.facts(_TextState)["tokenizer"], folder)
