"""Runs that were never trained: small networks whose routers are far from indifferent, opened as real ones are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dit_moe.autoencoders import FIRST_STAGES
from dit_moe.data import DATASETS
from dit_moe.diffusion import OBJECTIVES
from dit_moe.experiments.image import load_experiment, resolve
from dit_moe.experiments.run import ImageRun, TextRun
from dit_moe.experiments.text import load_text_experiment, resolve_text_without_data
from dit_moe.models import MODELS
from dit_moe.moe.routing import threshold_u
from dit_moe.text.tokenizer import TokenizerConfig, open_tokenizer

CONFIGS = Path(__file__).parents[2] / "configs"
SIZES = ["model.width=32", "model.depth=3", "model.heads=2"]
LENGTH = 32


@dataclass
class Chosen:
    """Some rows of the held-out digits."""

    rows: list[int]

    def __post_init__(self) -> None:
        self.whole = DATASETS.build(DATASETS.config_class("digits")(), "heldout")
        self.class_names, self.image_shape = self.whole.class_names, self.whole.image_shape
        self.fingerprint = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        return self.whole.__getitems__([self.rows[i] for i in indices])

    def class_counts(self) -> list[int]:
        return self.whole.class_counts()


def image_run(*changes: str, name: str = "DiT-custom/2-4E2A", p: float = 0.7) -> ImageRun:
    """On digits."""
    words = ["first_stage=identity", *SIZES, f"model.name={name}", "sample.sampler.steps=2", *changes]
    experiment = load_experiment(CONFIGS / "digits.yaml", words)
    experiment = resolve(experiment, Chosen([0]))
    model: Any = experiment.model
    return ImageRun(
        folder=Path("some/run"),
        home=Path("some"),
        step=7,
        sha256="ab" * 32,
        experiment=experiment,
        model=_lively(MODELS.build(model), p),
        objective=OBJECTIVES.build(experiment.objective, num_classes=10),
        stage=FIRST_STAGES.build(experiment.first_stage),
        class_counts=None,
    )


def text_run(*changes: str, name: str = "LM-custom-4E2A", p: float = 0.7) -> TextRun:
    """On bytes."""
    words = [*SIZES, f"model.name={name}", "model.mlp_hidden=64", f"data.length={LENGTH}", "eval.stride=null", *changes]
    experiment = resolve_text_without_data(load_text_experiment(CONFIGS / "lm_tiny.yaml", words))
    return TextRun(
        folder=Path("some/run"),
        home=Path("some"),
        step=7,
        sha256="ab" * 32,
        experiment=experiment,
        model=_lively(MODELS.build(experiment.model), p),
        tokenizer=open_tokenizer(TokenizerConfig()),
        trained_on={},
    )


def with_sample(run: Any, **changes: Any) -> Any:
    """The run with changes to its section `sample`."""
    sample = replace(run.experiment.sample, **changes)
    return replace(run, experiment=replace(run.experiment, sample=sample))


def _lively(model: Any, p: float) -> Any:
    """With random weights everywhere: time and label matter, which at the start of training they do not."""
    random = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.7 * parameter.shape[-1] ** -0.5, generator=random)
    for module in model.modules():
        if hasattr(module, "controller"):
            module.controller.restart(threshold_u(p))
    return model.eval()
