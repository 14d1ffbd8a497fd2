"""Runs as sources of samples, and what they are compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dit_moe import config
from dit_moe.commands.progress import images_bar
from dit_moe.data.latents import LatentsConfig
from dit_moe.evaluation.comparison import Comparison, Progress
from dit_moe.evaluation.recipes import Conditions, not_comparable
from dit_moe.evaluation.sources.base import Opened, ReadOptions, Source
from dit_moe.evaluation.sources.dataset import open_dataset
from dit_moe.evaluation.sources.generated import GeneratedSource
from dit_moe.evaluation.sources.words import open_word
from dit_moe.experiment import Experiment
from dit_moe.extractors import EXTRACTORS, FeatureExtractor
from dit_moe.generate import SampleConfig
from dit_moe.latents import FIRST_STAGES, FirstStage
from dit_moe.latents.identity import IdentityConfig
from dit_moe.processes import join_processes
from dit_moe.runs import Run

ROUNDING_ONLY = ("batch_size", "decode_batch")  # of the section `sample`: no part in what the images are


def run_source(opened: Run, sample: SampleConfig | None = None) -> GeneratedSource:
    """The images that a run makes by its section `sample`, or by another one."""
    sample = sample or opened.experiment.sample
    experiment = replace(opened.experiment, sample=sample)
    generator = opened.generator(sample)
    tree = config.dump(experiment)
    decisive = {name: tree[name] for name in ("model", "objective", "first_stage", "sample")}
    decisive["sample"] = {name: value for name, value in tree["sample"].items() if name not in ROUNDING_ONLY}
    for where in ("model", "subfolder"):  # the autoencoder's hash says which it is, wherever it lies
        if decisive["first_stage"].get("sha256"):
            decisive["first_stage"] = {k: v for k, v in decisive["first_stage"].items() if k != where}
    footprint = experiment.model.footprint()
    return GeneratedSource(
        generator,
        opened.labels(sample),
        name=f"{opened.folder} (seed {sample.seed})",
        identity={
            "step": opened.step,
            "weights": sample.weights,
            "weights_sha256": opened.sha256,
            "experiment": decisive,
        },
        facts={
            "run": str(opened.folder),
            "experiment": tree,
            "evaluations": generator.evaluations(),
            "parameters": footprint.total_params,
            "active_parameters": footprint.active_params,
        },
    )


def training_images(experiment: Experiment) -> Opened:
    """What a run is compared with: as its section `eval` says, or the images that it was trained on."""
    if experiment.eval.reference is not None:
        return open_word(experiment.eval.reference, ReadOptions())
    if isinstance(experiment.images, LatentsConfig):
        problem = f"the run was trained on latents in {experiment.images.path} and does not say of which images"
        raise ValueError(f"{problem}; name a REFERENCE, or set eval.reference")
    return open_dataset(experiment.images)


def reconstructed(experiment: Experiment, heldout: Source | None) -> Source | None:
    """The held-out images as the run's autoencoder gives them back; None if it has none, or there are none."""
    if heldout is None or isinstance(experiment.first_stage, IdentityConfig):
        return None
    return Reconstructed(heldout, FIRST_STAGES.build(experiment.first_stage).to(join_processes().device))


class Reconstructed(Source):
    """Images, encoded and decoded."""

    def __init__(self, images: Source, stage: FirstStage) -> None:
        self.images, self.stage = images, stage
        self.name = f"{images.name}, reconstructed"
        self.image_shape, self.labels_N = images.image_shape, images.labels_N

    def __len__(self) -> int:
        return len(self.images)

    def identity(self) -> dict[str, Any]:
        stage: Any = self.stage.settled()
        return {"kind": "reconstructed", "images": self.images.identity(), "first_stage": config.dump(stage)}

    def batches(self, parts: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        device = join_processes().device
        for images in self.images.batches(parts):
            with torch.no_grad():
                yield self.stage.decode(self.stage.encode(images.to(device)).mean).cpu()


def compare(experiment: Experiment, reference: Opened, progress: Progress = images_bar) -> Comparison:
    """The comparison that a config's section `eval` describes."""
    extractor: FeatureExtractor = EXTRACTORS.build(experiment.eval.extractor).to(join_processes().device)
    own = experiment.eval.reference is None
    return Comparison(
        reference,
        extractor,
        experiment.eval.metrics,
        reconstructed=reconstructed(experiment, reference.heldout) if own else None,
        progress=progress,
    )


def how_many(experiment: Experiment, reference: Opened) -> int:
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


def reasons_not_comparable(
    samples: Sequence[Opened],
    reference: Opened,
    extractor: FeatureExtractor,
    metrics: Sequence[str],
    options: ReadOptions,
) -> list[str]:
    """Why published numbers may not stand beside the result; empty if they may. Known before the work."""
    first = samples[0].source
    given, images = reference.statistics, reference.source
    conditions = Conditions(
        extractor=extractor.name,
        is_fid=extractor.is_fid,
        metrics=metrics,
        n_generated=0 if first is None else len(first),
        seeds=len(samples),
        image_shape=(0, 0, 0) if first is None else first.image_shape,
        resized=options.size is not None,
        reference_statistics=given is not None and given.extractor is None,  # those made here say by what
        reference_images=0 if images is None else len(images),
        balanced_labels=first.generator.config.labels == "balanced" if isinstance(first, GeneratedSource) else None,
    )
    return not_comparable(conditions)
