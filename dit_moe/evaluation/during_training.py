"""Evaluation of a few images every so many steps of training: enough to see a run fail, too few to be quoted."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dit_moe.autoencoders import FirstStage
from dit_moe.diffusion import Objective, SamplingError
from dit_moe.distributed import join_processes
from dit_moe.evaluation.comparison import Comparison
from dit_moe.evaluation.report import Report
from dit_moe.evaluation.runs import training_images
from dit_moe.evaluation.sources.base import EvaluationInput, Source
from dit_moe.evaluation.sources.generated import GeneratedSource
from dit_moe.experiments.image import Experiment
from dit_moe.extractors import EXTRACTORS, FeatureExtractor
from dit_moe.metrics.frechet import FrechetDistanceConfig
from dit_moe.sampling.generator import Generator, choose_labels

MOST = 10_000  # real images on either side


class EvaluationDuringTraining:
    """Fréchet distance of `eval.light_images` samples. Every name ends in their number, as small sets read high.

    The features of the real images, at most 10 000 of them, are made at once, by all processes together. ValueError if
    the extractor does not take such images, or if the run's are of another size.
    """

    def __init__(
        self, experiment: Experiment, objective: Objective, stage: FirstStage, class_counts: Sequence[int] | None
    ) -> None:
        self.experiment, self.objective, self.stage = experiment, objective, stage
        self.sample = replace(experiment.sample, count=experiment.eval.light_images)
        self.labels_N = choose_labels(self.sample, experiment.model.num_classes, class_counts)
        extractor: FeatureExtractor = EXTRACTORS.build(experiment.eval.extractor).to(join_processes().device)
        self.comparison = Comparison(_thinned(training_images(experiment)), extractor, [FrechetDistanceConfig()])
        self.comparison.check([EvaluationInput(source=Blank(stage, self._latent_shape()))])
        self.comparison.prepare()

    def _latent_shape(self) -> tuple[int, int, int]:
        model = self.experiment.model
        return model.in_channels, model.input_size, model.input_size

    def __call__(self, step: int, network: nn.Module) -> dict[str, Any] | None:
        """The numbers, on the main process; None, and a warning, if there are none: they are not worth a run."""
        try:
            generator = Generator(network, self.objective, self.stage, self.sample, self._latent_shape())
            source = GeneratedSource(generator, self.labels_N, name=f"step {step}", identity={"step": step})
            report = self.comparison.evaluate([EvaluationInput(source=source)])
        except (ValueError, SamplingError, OSError) as error:
            if join_processes().is_main_process:
                print(f"warning: no evaluation at step {step}: {error}", file=sys.stderr)
            return None
        return None if report is None else _with_counts(report)


class Blank(Source):
    """What stands for the images of a network that is yet to be trained: their shape."""

    name = "the run's images"

    def __init__(self, stage: FirstStage, latent_shape: tuple[int, int, int]) -> None:
        with torch.no_grad():
            decoded = stage.decode(torch.zeros(1, *latent_shape, device=join_processes().device))
        channels, height, width = decoded.shape[1:]
        self.image_shape = (channels, height, width)

    def __len__(self) -> int:
        return 2

    def identity(self) -> dict[str, Any]:
        return {"kind": "blank"}

    def batches(self, parts: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        return iter(())


def _with_counts(report: Report) -> dict[str, Any]:
    """Distances, floors and active experts of a report under names that say how many images they are of."""
    numbers = dict[str, Any]()
    for key, distance in report.distances.items():
        name = f"{key}_n{distance.n}"
        floors = {f"{name}_floor": distance.floor, f"{name}_floor_estimate": distance.floor_estimate}
        numbers |= {name: distance.generated, **floors}
    return numbers | {"sampled_active_experts": report.provenance.samples[0].get("active_experts")}


def _thinned(opened: EvaluationInput) -> EvaluationInput:
    """At most `MOST` images on either side."""
    sides = (one if one is None or len(one) <= MOST else Thinned(one, MOST) for one in (opened.source, opened.heldout))
    source, heldout = sides
    return replace(opened, source=source, heldout=heldout)


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
