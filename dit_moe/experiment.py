"""The whole config of an experiment: the sections of all parts, read, settled and checked before anything is built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from dit_moe import config
from dit_moe.config import ConfigError, require
from dit_moe.data import DATASETS, Dataset
from dit_moe.diffusion import OBJECTIVES, SAMPLERS, Objective, check_fit
from dit_moe.evaluate import EvalConfig
from dit_moe.generate import SampleConfig, choose_labels
from dit_moe.latents import FIRST_STAGES, FirstStage
from dit_moe.latents.identity import IdentityConfig
from dit_moe.models import MODELS
from dit_moe.moe import MoEConfig
from dit_moe.moe.routers.dtopp import DTopPConfig
from dit_moe.training import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One training run and how its results are sampled and judged. See docs/configuration.md."""

    model: Annotated[Any, MODELS]
    objective: Annotated[Any, OBJECTIVES]
    data: Annotated[Any, DATASETS]
    first_stage: Annotated[Any, FIRST_STAGES] = field(default_factory=IdentityConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**63, self, "seed", "must be a whole number from 0 to 2^63 − 1")


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read a config file with its bases and ``key=value`` overrides. ConfigError for any mistake in it.

    Fields that follow from the data are still open; see `settle`.
    """
    return config.build(Experiment, config.load(path, overrides))


def settle(experiment: Experiment, dataset: Dataset) -> Experiment:
    """Fill in what follows from the data and the objective, and check that all parts fit together.

    ConfigError names the field that does not.
    """
    objective: Objective = OBJECTIVES.build(experiment.objective, num_classes=len(dataset.class_names))
    stage: FirstStage = FIRST_STAGES.build(experiment.first_stage)
    channels, height, width = stage.latent_shape(dataset.image_shape)
    if height != width:
        raise ConfigError("data", f" has latents of {height}×{width}; the model needs square ones, crop the images")
    found = {"in_channels": channels, "input_size": height, "num_classes": len(dataset.class_names)}
    for name, value in found.items():
        given = getattr(experiment.model, name)
        if given not in (None, value):
            raise ConfigError(f"model.{name}", f"={given} contradicts the data, which has {value}; drop the line")
    learns_sigma = experiment.model.learn_sigma
    if objective.learns_sigma and learns_sigma is False:
        raise ConfigError("model.learn_sigma", "=False, but the objective learns the variance; drop the line")
    learn_sigma = objective.learns_sigma if learns_sigma is None else learns_sigma
    try:
        model = replace(experiment.model, **found, learn_sigma=learn_sigma)
    except ConfigError as error:
        raise error.below("model") from None
    try:
        objective.check((channels, height, width))
    except ConfigError as error:
        raise error.below("objective") from None
    experiment = replace(experiment, model=model)
    return replace(experiment, sample=settle_sampling(experiment, objective))


def settle_sampling(experiment: Experiment, objective: Objective) -> SampleConfig:
    """The section `sample` with a sampler that fits the objective; ConfigError if its options cannot work."""
    sample, channels = experiment.sample, experiment.model.in_channels
    sampler: Any = sample.sampler or SAMPLERS.config_class(objective.default_sampler)()
    sample = replace(sample, sampler=sampler)
    try:
        check_fit(sampler, objective.name)
        SAMPLERS.build(sampler, objective)
    except ConfigError as error:
        raise error.below("sample.sampler") from None
    guidance = sample.guidance
    if guidance.channels is not None and guidance.channels > channels:
        wanted = f"={guidance.channels} exceeds the {channels} channels of the latents; lower it"
        raise ConfigError("sample.guidance.channels", wanted)
    if guidance.scale != 1 and experiment.objective.label_dropout == 0:
        wanted = f"={guidance.scale:g} needs a null class; set objective.label_dropout above 0"
        raise ConfigError("sample.guidance.scale", wanted)
    try:
        choose_labels(sample, objective.num_classes)
    except ConfigError as error:
        raise error.below("sample") from None
    if sample.target is not None:
        _check_target(sample.target, experiment.model.moe)
    return sample


def _check_target(target: float, moe: MoEConfig | None) -> None:
    """ConfigError unless sampling can be given another mean number of active experts."""
    if moe is None or not isinstance(moe.router, DTopPConfig):
        wanted = "needs a model with dtopp routers, which have a threshold to solve; drop the line"
        raise ConfigError("sample.target", f"={target:g} {wanted}")
    try:
        moe.router.check(moe.experts, target)
    except ConfigError as error:
        raise error.below("sample") from None
