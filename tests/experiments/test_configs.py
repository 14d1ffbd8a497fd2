"""A whole config, resolved against its data."""

from dataclasses import replace
from pathlib import Path

import pytest

from dit_moe.config import ConfigError, build, dump
from dit_moe.data import DATASETS
from dit_moe.data.latents import LatentsConfig
from dit_moe.data.torchvision_sets import TorchvisionConfig
from dit_moe.experiments.image import Experiment, load_experiment, resolve, resolve_without_data
from dit_moe.experiments.text import TextExperiment, resolve_text_without_data
from dit_moe.tasks.train import load

ROOT = Path(__file__).parents[2]
CONFIGS = [
    path
    for path in sorted((ROOT / "configs").glob("**/*.yaml"))
    # Those are of `dit-moe train-autoencoder`, `dit-moe lm-eval` and `dit-moe compare`, or have tests of their own.
    if not path.stem.startswith(("base", "autoencoder", "tasks", "DiT-", "LM-", "my_images"))
    and path.parent.name not in ("tasks", "studies")
]
DIGITS = ROOT / "configs" / "digits.yaml"


def resolved(*overrides: str) -> Experiment:
    experiment = load_experiment(DIGITS, overrides)
    return resolve(experiment, DATASETS.build(experiment.data, "train"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_config_in_the_repository_is_valid(path):
    experiment = load(path, [])
    if isinstance(experiment, TextExperiment):
        resolved = resolve_text_without_data(experiment, experiment.model.vocab_size or 320)
    elif isinstance(experiment.data, LatentsConfig):  # to be encoded first
        resolved = resolve_without_data(with_shapes(experiment))
    elif isinstance(experiment.data, TorchvisionConfig):  # to be downloaded first
        resolved = resolve_without_data(with_shapes(experiment, in_channels=3, input_size=32))
    else:
        resolved = resolve(experiment, DATASETS.build(experiment.data, "train"))
    assert resolved.model.footprint().total_params > 0


def with_shapes(experiment: Experiment, in_channels: int = 4, input_size: int = 8) -> Experiment:
    shapes = {"in_channels": in_channels, "input_size": input_size, "num_classes": 10}
    missing = {name: value for name, value in shapes.items() if getattr(experiment.model, name) is None}
    return replace(experiment, model=replace(experiment.model, **missing))


def test_what_follows_from_data_and_objective_is_filled_in():
    experiment = resolved("sample.sampler=null")
    model = experiment.model
    assert (model.in_channels, model.input_size, model.num_classes, model.learn_sigma) == (1, 8, 10, False)
    assert type(experiment.sample.sampler).__name__ == "HeunConfig"
    assert build(Experiment, dump(experiment)) == experiment
    ddpm = resolved("objective=ddpm", "sample.sampler=null")
    assert ddpm.model.learn_sigma is True and type(ddpm.sample.sampler).__name__ == "DDPMSamplerConfig"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("model.num_classes=7", r"model\.num_classes=7 contradicts the data, which has 10"),
        ("model.name=DiT-custom/3-8E2A", r"model\.patch_size=3 does not divide input_size=8"),
        ("sample.sampler=ddim", r"sample\.sampler\.name=ddim .* trained with flow; choose one of euler"),
        ("sample.guidance.channels=2", r"sample\.guidance\.channels=2 exceeds the 1 channel"),
        ("sample.count=0", r"sample\.count=0 must be at least 1"),
        ("data=mnist", r"data\.name=mnist: unknown dataset 'mnist'"),
        ("sample.labels=[12]", r"sample\.labels=\[12\] must lie in 0\.\.9"),
        ("sample.target=20", r"sample\.target=20 is outside what the router allows, 1 to 8"),
        ("model.moe.expert_hidden=5", r"model\.moe\.expert_hidden=5 must be a multiple of 8"),
        ("model.moe.offset=10", r"model\.moe\.offset=10 leaves no block of depth=4 with experts"),
        ("objective.cosine_weight=0.5", r"objective\.cosine_weight=0\.5 .* one channel"),
        (
            "seed=99999999999999999999999",
            r"seed=99999999999999999999999 is out of range; give a whole number of 64 bits",
        ),
        ("train.lr=.inf", r"train\.lr=inf must be a finite number"),
        ("sample.guidance.scale=2 objective.label_dropout=0", r"sample\.guidance\.scale=2 needs a null class"),
        ("sample.target=2.5 model.moe.router=topk", r"sample\.target=2\.5 must be a whole number for top-k"),
        ("sample.p=0.5 model.moe.router=topk", r"sample\.p=0\.5 needs routers with a threshold"),
        ("sample.target=3 model.name=DiT-custom/2 model.moe=null", r"sample\.target=3 needs a model whose"),
        ("sample.target=[1,2,3]", r"sample\.target=\[1, 2, 3\] has 3 values for 4 MoE layers; give 4"),
        ("sample.target=[1,2] model.moe.every=2 sample.p=0.5", r"sample\.p=0\.5 and target exclude each other"),
    ],
)
def test_impossible_combinations_are_refused_before_anything_is_built(changes, message):
    with pytest.raises(ConfigError, match=message):
        resolved(*changes.split())


def test_values_by_layer_are_as_many_as_there_are_layers_with_experts():
    assert resolved("sample.target=[1,2]", "model.moe.every=2").sample.target == (1.0, 2.0)
    assert resolved("sample.target=[1,2,3]", "sample.vary=time").sample.vary == "time"


def test_an_option_of_the_default_entry_needs_no_name():
    router = resolved("model.moe.router.layerwise=true", "model.moe.router.controller.p0=0.7").model.moe.router
    assert router.layerwise and router.controller.p0 == 0.7
