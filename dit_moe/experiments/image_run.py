"""A run folder, opened to be used: its experiment, network, objective and first stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dit_moe import checkpoint, config
from dit_moe.autoencoders import FIRST_STAGES, FirstStage
from dit_moe.diffusion import OBJECTIVES, Objective
from dit_moe.experiments.image import Experiment, image_experiment, resolve_sampling
from dit_moe.models import MODELS
from dit_moe.sampling.generator import Generator, SampleConfig, choose_labels

SAID_OTHERWISE = {  # of the section `eval`, on the command line
    "eval.seeds": "--seeds {value}",
    "eval.metrics": "--metrics",
    "eval.extractor": "--extractor",
    "eval.images": "count={value}",
    "eval.reference": "a REFERENCE behind the run",
}


@dataclass
class Run:
    """What a checkpoint holds, built and loaded."""

    folder: Path
    step: int
    sha256: str  # of the weights' file
    experiment: Experiment
    model: nn.Module
    objective: Objective
    stage: FirstStage
    class_counts: list[int] | None  # images of each class that it was trained on; None: it did not record them

    def generator(self, sample: SampleConfig | None = None) -> Generator:
        """A generator by the experiment's section `sample`, or by another one."""
        network = self.experiment.model
        shape = (network.in_channels, network.input_size, network.input_size)
        return Generator(self.model, self.objective, self.stage, sample or self.experiment.sample, shape)

    def labels(self, sample: SampleConfig | None = None) -> Tensor:
        """The label of every image, int64, by the experiment's section `sample`, or by another one.

        ConfigError if that wants the class frequencies of the data, and the run did not record them.
        """
        classes = self.experiment.model.num_classes
        try:
            return choose_labels(sample or self.experiment.sample, classes, self.class_counts)
        except config.ConfigError as error:
            raise error.below("sample") from None


def open_run(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    sample: SampleConfig | None = None,
    device: str | torch.device = "cpu",
) -> Run:
    """Open the newest checkpoint of a run folder, or a checkpoint folder, for sampling.

    Args:
        path: the folder.
        overrides: ``key=value`` changes to the section ``sample`` ("guidance.scale=2"), and, written in full, to
            ``first_stage`` ("first_stage.tiling=true"). The name of the former may stand before them, too.
        sample: what takes the place of that section, before the changes; None is the run's own.
        device: where the network goes.

    Raises ValueError if there is no such run, if a file of it is damaged, or for a mistake in the overrides.
    """
    opened = checkpoint.open_checkpoint(path)
    tree: config.Tree = opened.config()
    if sample is not None:
        tree["sample"] = config.dump(sample)
    whole = [change if change.startswith("first_stage.") else f"sample.{change}" for change in of_sample(overrides)]
    experiment = image_experiment(config.override(tree, whole))
    model_config: Any = experiment.model
    objective = OBJECTIVES.build(experiment.objective, num_classes=model_config.num_classes)
    resolved = resolve_sampling(experiment, objective)
    stage: FirstStage = FIRST_STAGES.build(experiment.first_stage).to(device)
    stage.load()
    model = MODELS.build(model_config)
    checkpoint.load_into(model, opened.weights(resolved.weights), opened.folder)
    return Run(
        folder=opened.folder,
        step=opened.step,
        sha256=opened.state["files"][f"{resolved.weights}.safetensors"]["sha256"],
        experiment=replace(experiment, sample=resolved),
        model=model.to(device).eval(),
        objective=objective,
        stage=stage,
        class_counts=opened.state.get("class_counts"),
    )


def of_sample(overrides: Sequence[str]) -> list[str]:
    """Changes to the section ``sample``, without its name before them; those to ``first_stage`` as they are.

    Raises ConfigError for what is said by an option of the command.
    """
    for change in overrides:
        key, _, value = change.partition("=")
        if key in SAID_OTHERWISE:
            remedy = SAID_OTHERWISE[key].format(value=value)
            raise config.ConfigError(key, f"={value} is no option of sampling; for dit-moe eval give {remedy}")
    return [change.removeprefix("sample.") for change in overrides]
