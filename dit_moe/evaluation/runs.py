"""Runs as sources of samples, and what they are compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dit_moe import config
from dit_moe.autoencoders import FIRST_STAGES, FirstStage
from dit_moe.autoencoders.base import IdentityConfig
from dit_moe.data.latents import LatentsConfig
from dit_moe.distributed import join_processes
from dit_moe.evaluation.comparison import Comparison
from dit_moe.evaluation.sources import open_input
from dit_moe.evaluation.sources.base import EvaluationInput, ReadOptions, Source, converted
from dit_moe.evaluation.sources.dataset import open_dataset
from dit_moe.evaluation.sources.generated import GeneratedSource
from dit_moe.experiments.image import Experiment
from dit_moe.experiments.run import ImageRun
from dit_moe.extractors import EXTRACTORS, FeatureExtractor
from dit_moe.progress import images_bar
from dit_moe.sampling.generator import SampleConfig

SEEDED = ("experiment.sample.seed", "labels_sha256")  # of a run's identity: what differs between sampling seeds
ROUNDING_ONLY = ("batch_size", "decode_batch")  # of the section `sample`: no part in what the images are


def run_source(opened: ImageRun, sample: SampleConfig | None = None) -> GeneratedSource:
    """The images that a run makes by its section `sample`, or by another one."""
    sample = sample or opened.experiment.sample
    experiment = replace(opened.experiment, sample=sample)
    generator = opened.generator(sample)
    footprint = experiment.model.footprint()
    return GeneratedSource(
        generator,
        opened.labels(sample),
        name=f"{opened.folder} (seed {sample.seed})",
        identity={
            "step": opened.step,
            "weights": sample.weights,
            "weights_sha256": opened.sha256,
            "experiment": decisive(experiment),
        },
        facts={
            "run": str(opened.folder),
            "experiment": config.dump(experiment),
            "evaluations": generator.evaluations(),
            "parameters": footprint.total_params,
            "active_parameters": footprint.active_params,
        },
    )


def decisive(experiment: Experiment) -> config.Tree:
    """What of an experiment decides which images a network makes."""
    tree = config.dump(experiment)
    found = {name: tree[name] for name in ("model", "objective", "first_stage", "sample")}
    found["sample"] = {
        name: value
        for name, value in tree["sample"].items()
        # Features that were kept before there were these options are still those of their images.
        if name not in ROUNDING_ONLY and (name, value) not in (("p", None), ("vary", "layer"))
    }
    for where in ("model", "subfolder"):  # the autoencoder's hash says which it is, wherever it lies
        if found["first_stage"].get("sha256"):
            found["first_stage"] = {k: v for k, v in found["first_stage"].items() if k != where}
    return found


def training_images(experiment: Experiment, options: ReadOptions = ReadOptions()) -> EvaluationInput:  # noqa: B008 (frozen)
    """What a run is compared with: as its section `eval` says, or the images that it was trained on."""
    if experiment.eval.reference is not None:
        return open_input(experiment.eval.reference, options)
    if isinstance(experiment.images, LatentsConfig):
        problem = f"the run was trained on latents in {experiment.images.path} and does not say of which images"
        raise ValueError(f"{problem}; name a REFERENCE, or set eval.reference")
    return converted(open_dataset(experiment.images, options=options), options)


def reconstructed(experiment: Experiment, reference: EvaluationInput) -> Source | None:
    """The held-out images of the run's own data as its autoencoder gives them back; None if there is no such thing."""
    if experiment.eval.reference is not None or reference.heldout is None:
        return None
    if isinstance(experiment.first_stage, IdentityConfig):
        return None
    return Reconstructed(reference.heldout, FIRST_STAGES.build(experiment.first_stage).to(join_processes().device))


class Reconstructed(Source):
    """Images, encoded and decoded."""

    def __init__(self, images: Source, stage: FirstStage) -> None:
        self.images, self.stage = images, stage
        self.name = f"{images.name}, reconstructed"
        self.image_shape, self.labels_N = images.image_shape, images.labels_N

    def __len__(self) -> int:
        return len(self.images)

    def identity(self) -> dict[str, Any]:
        stage: Any = self.stage.resolved()
        return {"kind": "reconstructed", "images": self.images.identity(), "first_stage": config.dump(stage)}

    def batches(self, parts: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        device = join_processes().device
        for images in self.images.batches(parts):
            with torch.no_grad():
                yield self.stage.decode(self.stage.encode(images.to(device)).mean).cpu()


def comparison_of(experiment: Experiment, reference: EvaluationInput) -> Comparison:
    """The comparison that a config's section `eval` describes."""
    extractor: FeatureExtractor = EXTRACTORS.build(experiment.eval.extractor).to(join_processes().device)
    decoded = reconstructed(experiment, reference)
    return Comparison(reference, extractor, experiment.eval.metrics, reconstructed=decoded, progress=images_bar)


def how_many(experiment: Experiment, reference: EvaluationInput) -> int:
    """Images of a sampling seed: as the config says, or as many as there are held-out ones."""
    if experiment.eval.images is not None:
        return experiment.eval.images
    if reference.heldout is None:
        problem = "the reference has no held-out images to say how many to sample"
        raise ValueError(f"{problem}; set eval.images, or for dit-moe eval add count=50000, say")
    return len(reference.heldout)


def seeds_of(sample: SampleConfig, count: int, seeds: int) -> list[SampleConfig]:
    """The section `sample` of each sampling seed."""
    return [replace(sample, count=count, seed=sample.seed + i) for i in range(seeds)]


def require_seeds_of_one(samples: Sequence[EvaluationInput]) -> None:
    """ValueError if several runs are averaged that differ in more than their sampling seed."""
    runs = [one.source.identity() for one in samples if isinstance(one.source, GeneratedSource)]
    for one in runs[1:]:
        found = [key for key, _ in config.differences(runs[0], one) if key not in SEEDED]
        if found:
            problem = f"SAMPLES are sampling seeds of one model, and two of them differ in {', '.join(sorted(found))}"
            raise ValueError(f"{problem}; evaluate them one by one, and compare them by dit-moe table")
