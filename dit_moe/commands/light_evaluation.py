"""A few images judged every so many steps of training: enough to see a run fail, too few to be quoted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dit_moe.commands.judging import compare, training_images
from dit_moe.diffusion import Objective
from dit_moe.evaluation.comparison import silent
from dit_moe.evaluation.sources.base import Opened, Source
from dit_moe.evaluation.sources.generated import GeneratedSource
from dit_moe.experiment import Experiment
from dit_moe.generate import Generator, choose_labels
from dit_moe.latents import FirstStage
from dit_moe.metrics.frechet import FrechetDistanceConfig

MOST = 10_000  # real images on either side


class LightEvaluation:
    """Fréchet distance of `eval.light_images` samples. Every name ends in their number, as small sets read high.

    The features of the real images, at most 10 000 of them, are made at once, by all processes together.
    """

    def __init__(
        self, experiment: Experiment, objective: Objective, stage: FirstStage, class_counts: Sequence[int] | None
    ) -> None:
        self.experiment, self.objective, self.stage = experiment, objective, stage
        self.sample = replace(experiment.sample, count=experiment.eval.light_images)
        self.labels_N = choose_labels(self.sample, experiment.model.num_classes, class_counts)
        self.comparison = compare(light(experiment), thinned(training_images(experiment)), silent)
        self.comparison.prepare()

    def __call__(self, step: int, network: nn.Module) -> dict[str, Any] | None:
        """The numbers, on the main process."""
        model = self.experiment.model
        shape = (model.in_channels, model.input_size, model.input_size)
        generator = Generator(network, self.objective, self.stage, self.sample, shape)
        source = GeneratedSource(generator, self.labels_N, name=f"step {step}", identity={"step": step})
        report = self.comparison.judge([Opened(source=source)])
        return None if report is None else named(report)


def light(experiment: Experiment) -> Experiment:
    """With the distance alone, on the pixels as they are."""
    return replace(experiment, eval=replace(experiment.eval, metrics=(FrechetDistanceConfig(),)))


def named(report: dict[str, Any]) -> dict[str, Any]:
    """Distance, floor and active experts of a report under names that say how many images they are of."""
    facts, numbers = report["provenance"], dict[str, Any]()
    for key, value in report.items():
        if isinstance(value, dict) and "generated" in value:
            name = f"{key}_n{value['n']}"
            numbers |= {name: value["generated"], f"{name}_floor": value["floor"] or value["floor_estimate"]}
    return numbers | {"sampled_active_experts": facts["samples"][0].get("active_experts")}


def thinned(opened: Opened) -> Opened:
    """At most `MOST` images on either side."""
    return replace(opened, source=_thinned(opened.source), heldout=_thinned(opened.heldout))


def _thinned(source: Source | None) -> Source | None:
    return source if source is None or len(source) <= MOST else Thinned(source, MOST)


class Thinned(Source):
    """n of the images, evenly spaced."""

    def __init__(self, images: Source, n: int) -> None:
        self.images, self.name, self.image_shape = images, f"{n} of {images.name}", images.image_shape
        self.rows = torch.linspace(0, len(images) - 1, n, dtype=torch.float64).round().long()
        self.labels_N = None if images.labels_N is None else images.labels_N[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def identity(self) -> dict[str, Any]:
        return {"kind": "thinned", "count": len(self), "images": self.images.identity()}

    def batches(self, parts: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        return self.images.batches([self.rows[list(part)].tolist() for part in parts])
