"""A small evaluation of a run while it trains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dit_moe.autoencoders import FirstStage
from dit_moe.diffusion import Objective, SamplingError
from dit_moe.distributed import join_processes
from dit_moe.evaluation.comparison import Comparison
from dit_moe.evaluation.own_extractor import extractor_of
from dit_moe.evaluation.report import Report
from dit_moe.evaluation.runs import GeneratedSource, decoded_shape, training_images
from dit_moe.evaluation.sources.base import EvaluationInput, Source, Thinned
from dit_moe.experiments.image import Experiment
from dit_moe.formatting import tell
from dit_moe.metrics.frechet import FrechetDistanceConfig
from dit_moe.sampling.generator import Generator
from dit_moe.sampling.labels import choose_labels

MOST = 10_000  # real images on either side


class EvaluationDuringTraining:
    """Fréchet distance of `eval.light_images` samples. Every name ends in their number, as small sets read high.

    The features of the real images, at most 10 000 of them, are made at once, by all processes together. ValueError if
    the extractor does not take such images, or if the run's are of another size.
    """

    def __init__(
        self,
        experiment: Experiment,
        objective: Objective,
        stage: FirstStage,
        class_counts: Sequence[int] | None,
        class_names: Sequence[str] | None,
        home: Path,
    ) -> None:
        self.experiment, self.objective, self.stage = experiment, objective, stage
        self.sample = replace(experiment.sample, count=experiment.eval.light_images)
        self.labels_N = choose_labels(self.sample, experiment.model.num_classes, class_counts, class_names)
        real, extractor = training_images(experiment), extractor_of(experiment, home)
        real = replace(real, source=_thinned(real.source), heldout=_thinned(real.heldout))
        self.comparison = Comparison(real, extractor, [FrechetDistanceConfig()])
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
                tell(f"warning: no evaluation at step {step}: {error}")
            return None
        return None if report is None else _with_counts(report)


class Blank(Source):
    """What stands for the images of a network that is yet to be trained: their shape."""

    name = "the run's images"

    def __init__(self, stage: FirstStage, latent_shape: tuple[int, int, int]) -> None:
        self.image_shape = decoded_shape(stage, latent_shape, join_processes().device)

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


def _thinned(images: Source | None) -> Source | None:
    """At most `MOST` of them."""
    return images if images is None or len(images) <= MOST else Thinned(images, MOST)
