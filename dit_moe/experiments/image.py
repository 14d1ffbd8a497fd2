"""The whole config of an experiment: the sections of all parts, read, resolved and checked before anything is built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

from dit_moe import config
from dit_moe.autoencoders import FIRST_STAGES
from dit_moe.autoencoders.base import IdentityConfig
from dit_moe.autoencoders.encoder import EncodeConfig
from dit_moe.autoencoders.latent_space import require_encoded_so, resolve_first_stage
from dit_moe.config import ConfigError, Place, Tree, require, section
from dit_moe.data import DATASETS, Dataset
from dit_moe.data.held_out import names_heldout, require_held_out
from dit_moe.data.latents import LatentsConfig, LatentShards
from dit_moe.data.listing import note
from dit_moe.diffusion import OBJECTIVES, SAMPLERS, Objective, check_fit
from dit_moe.experiments import own_images
from dit_moe.experiments.autoencoder import AutoencoderSettings
from dit_moe.extractors import EXTRACTORS
from dit_moe.metrics import METRICS
from dit_moe.models import MODELS
from dit_moe.moe.compute_budget import ComputeBudgetConfig
from dit_moe.plugins import asked, require_loaded
from dit_moe.sampling.generator import SampleConfig
from dit_moe.sampling.labels import describe_listed, listed_classes
from dit_moe.training import TrainConfig

NOTHING_HELD_OUT = "train (nothing was held out)"  # how results call the split

MOST_SEEDS = 10_000  # sampling seeds of an evaluation


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How a run is evaluated: how many images of how many sampling seeds, in which feature space, against what."""

    extractor: Annotated[Any, EXTRACTORS] | None = None  # None: chosen by the images, see `evaluation.own_extractor`
    metrics: tuple[Annotated[Any, METRICS], ...] | None = None  # None: those that suit the extractor
    seeds: int = 3  # sampling seeds; the spread over them is reported
    images: int | None = None  # per seed; None: as many as there are held-out images, what they are compared with
    reference: Annotated[str, Place()] | None = None  # as of `dit-moe eval`; None: the images trained on
    light_every: int | None = None  # steps of training between evaluations of a few images; None: none
    light_images: int = 200

    def __post_init__(self) -> None:
        require(self.seeds >= 1, self, "seeds", "must be at least 1")
        require(self.seeds <= MOST_SEEDS, self, "seeds", f"must be at most {MOST_SEEDS:,}")
        require(self.images is None or self.images >= 2, self, "images", "must be at least 2; a spread needs two")
        require(self.metrics != (), self, "metrics", "is empty; name at least one, or leave the line out")
        every = self.light_every is None or self.light_every >= 1
        require(every, self, "light_every", "must be at least 1, or null for none")
        require(self.light_images >= 2, self, "light_images", "must be at least 2; a spread needs two")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One training run and how it is sampled and evaluated. See docs/configuration.md."""

    model: Annotated[Any, MODELS]
    objective: Annotated[Any, OBJECTIVES]
    data: Annotated[Any, DATASETS]
    first_stage: Annotated[Any, FIRST_STAGES] | None = None  # None: what the latents were made by, pixels otherwise
    first_stage_training: AutoencoderSettings | None = None  # how `quickstart` makes the first stage if it is not there
    encode: EncodeConfig | None = None
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    seed: int = 0
    plugins: tuple[str, ...] = field(default_factory=asked)  # modules of the user's that it needs

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**63, self, "seed", "must be a whole number from 0 to 2^63 − 1")

    @property
    def images(self) -> Any:
        """The section that names the images themselves, where `data` holds what was encoded of them."""
        encoded = self.encode if isinstance(self.data, LatentsConfig) else None
        return self.data if encoded is None else encoded.images


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read a config file with its bases and ``key=value`` overrides. ConfigError for any mistake in it.

    Fields that follow from the data are still open; see `resolve`.
    """
    return image_experiment(own_images.load(path, overrides))


def image_experiment(tree: Tree) -> Experiment:
    """A config as read from a file or a checkpoint. ConfigError for any mistake in it, a language model among them."""
    if kind_of(tree) == "text":
        remedy = "dit-moe tokenize, train, sample, perplexity, export and lm-eval are for those"
        raise ConfigError("model", f" is a language model, and this needs a model of images; {remedy}")
    experiment = config.build(Experiment, tree)
    made_for = getattr(experiment.images, "extractor", None)
    if experiment.eval.extractor is not None or made_for is None:
        return experiment
    return replace(experiment, eval=replace(experiment.eval, extractor=EXTRACTORS.config_class(made_for)()))


def kind_of(tree: Tree) -> str:
    """What the model of a config, not yet typed, is trained on: "images" or "text".

    ConfigError if the config names no model that there is, or needs a plugin that is not loaded.
    """
    require_loaded(tree)
    model: Any = tree.get("model")
    name = model.get("name") if isinstance(model, dict) else model
    if not isinstance(name, str):
        raise ConfigError("model.name", f" is missing; name a model: {', '.join(MODELS.names())}")
    try:
        config_class: Any = MODELS.config_class(name)
    except ValueError as error:
        raise ConfigError("model.name", f"={name}: {error}") from None
    kind: str = config_class.KIND
    return kind


def open_data(description: Any, split: str, name: str = "data") -> Dataset:
    """A split of the dataset that the section `name` of a config describes; ConfigError with the field's whole path."""
    with section(name):
        return DATASETS.build(description, split)


def open_split(data: Any, split: str | None) -> tuple[Dataset, str]:
    """A split of the data of a section `data`, and what to call it; None: what was held out, if anything was.

    Raises what opening it raises, also for a held-out split that the config names and that cannot be opened. One that
    is only a default may not suit the data: then what was trained on is opened, and its name says why.
    """
    if split is not None:
        return open_data(data, split), split
    default = next((field.default for field in fields(data) if field.name == "heldout"), MISSING)
    heldout = getattr(data, "heldout", MISSING)
    if heldout is None:
        return open_data(data, "train"), NOTHING_HELD_OUT
    try:
        return open_data(data, "heldout"), "heldout"
    except ValueError as error:
        if default is MISSING or heldout != default:
            raise
        return open_data(data, "train"), f"train (held-out data cannot be opened: {error})"


def resolve(experiment: Experiment, dataset: Dataset) -> Experiment:
    """Fill in what follows from the data and the objective, and check that all parts fit together.

    ConfigError names the field that does not.
    """
    if experiment.encode is not None and isinstance(dataset, LatentShards):
        require_encoded_so(experiment.encode, dataset)
    first_stage, latent_shape = resolve_first_stage(experiment.first_stage, dataset)
    data = with_fingerprint(experiment.data, dataset.fingerprint)
    experiment = replace(experiment, first_stage=first_stage, data=data)
    channels, height, width = latent_shape
    if height != width:
        raise ConfigError("data", f" has latents of {height}×{width}; the model needs square ones, crop the images")
    found = {"in_channels": channels, "input_size": height, "num_classes": len(dataset.class_names)}
    for name, value in found.items():
        given = getattr(experiment.model, name)
        if given not in (None, value):
            raise ConfigError(f"model.{name}", f"={given} contradicts the data, which has {value}; drop the line")
    _require_held_out(experiment.data, dataset)
    resolved = replace(experiment, model=_with(experiment.model, **found))
    return resolve_without_data(resolved, dataset.class_names)


def _require_held_out(data: Any, trained: Dataset) -> None:
    """ConfigError if the held-out images that the section `data` names are trained on; some may not be there yet."""
    if not names_heldout(data):
        return
    names = {field.name for field in fields(data)}
    if {"classes", "class_names"} <= names:  # which are then not read again
        data = replace(data, classes=None, class_names=trained.class_names)
    try:
        heldout: Dataset = DATASETS.build(data, "heldout")
    except ValueError:  # is told when they are needed
        return
    with section("data"):
        require_held_out(trained, heldout)


def resolve_without_data(experiment: Experiment, class_names: Sequence[str] | None = None) -> Experiment:
    """`resolve` without data, for a config that tells the latents' shape and the classes."""
    experiment = replace(experiment, model=_with(experiment.model, **_known(experiment)))
    with section("model"):
        classes, channels, size = map(experiment.model.need, ("num_classes", "in_channels", "input_size"))
    objective: Objective = OBJECTIVES.build(experiment.objective, num_classes=classes)
    learns_sigma = experiment.model.learn_sigma
    if objective.learns_sigma and learns_sigma is False:
        raise ConfigError("model.learn_sigma", "=False, but the objective learns the variance; drop the line")
    learn_sigma = objective.learns_sigma if learns_sigma is None else learns_sigma
    model = _with(experiment.model, learn_sigma=learn_sigma)
    with section("objective"):
        objective.check((channels, size, size))
    experiment = replace(experiment, model=model)
    return replace(experiment, sample=resolve_sampling(experiment, objective, class_names))


def _known(experiment: Experiment) -> dict[str, int]:
    """Of the fields that the model leaves open those that its data set is known for, before it is downloaded."""
    found, data = {"num_classes": getattr(experiment.data, "num_classes", None)}, experiment.data
    if isinstance(experiment.first_stage, IdentityConfig | None):
        found["in_channels"], _, found["input_size"] = getattr(data, "image_shape", None) or (None, None, None)
    return {name: value for name, value in found.items() if value and getattr(experiment.model, name) is None}


def _with(model: Any, **fields: object) -> Any:
    with section("model"):
        return replace(model, **fields)


def with_fingerprint(data: Any, found: str | None) -> Any:
    """The section `data` with the fingerprint of what it names, if that has one; ConfigError if it states another."""
    if found is None:
        return data
    if data.fingerprint not in (None, found):
        problem = f"={data.fingerprint} is of other data than what is there, {found}"
        raise ConfigError("data.fingerprint", f"{problem}; name the right data, or drop the line")
    return replace(data, fingerprint=found)


def resolve_sampling(
    experiment: Experiment, objective: Objective, class_names: Sequence[str] | None = None
) -> SampleConfig:
    """The section `sample` with a sampler that fits the objective; ConfigError if its options cannot work.

    `class_names` are those of the data; None: not known. Which classes listed numbers mean is said on stderr.
    """
    sample, channels = experiment.sample, experiment.model.in_channels
    sampler: Any = sample.sampler or SAMPLERS.config_class(objective.default_sampler)()
    sample = replace(sample, sampler=sampler)
    with section("sample.sampler"):
        check_fit(sampler, objective.name)
        SAMPLERS.build(sampler, objective)
    guidance = sample.guidance
    if guidance.channels is not None and guidance.channels > channels:
        wanted = f"={guidance.channels} exceeds the {channels} channels of the latents; lower it"
        raise ConfigError("sample.guidance.channels", wanted)
    if guidance.scale != 1 and experiment.objective.label_dropout == 0:
        wanted = f"={guidance.scale:g} needs a null class; set objective.label_dropout above 0"
        raise ConfigError("sample.guidance.scale", wanted)
    with section("sample"):
        if class_names is not None or not any(isinstance(label, str) for label in sample.listed or ()):
            listed_classes(sample, objective.num_classes, class_names)
    said = describe_listed(sample, objective.num_classes, class_names)
    if said is not None:
        note(f"sample.{said}")
    check_compute_budget(sample, experiment.model)
    return sample


def check_compute_budget(sample: ComputeBudgetConfig, model: Any) -> None:
    """ConfigError unless the section `sample` asks for experts that a model of the section `model` can use."""
    with section("sample"):
        sample.check(model.moe, model.need("depth") - model.dense_blocks)
