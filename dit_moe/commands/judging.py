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
from dit_moe.evaluation.comparison import Comparison
from dit_moe.evaluation.recipes import Conditions, not_comparable
from dit_moe.evaluation.sources.base import Opened, ReadOptions, Source
from dit_moe.evaluation.sources.dataset import open_dataset
from dit_moe.evaluation.sources.generated import GeneratedSource
from dit_moe.evaluation.sources.words import open_word
from dit_moe.evaluation.stored import MANIFEST, read_manifest
from dit_moe.experiment import Experiment
from dit_moe.extractors import EXTRACTORS, FeatureExtractor
from dit_moe.generate import SampleConfig
from dit_moe.latents import FIRST_STAGES, FirstStage
from dit_moe.latents.identity import IdentityConfig
from dit_moe.metrics import METRICS
from dit_moe.processes import join_processes
from dit_moe.runs import Run

SEEDED = ("experiment.sample.seed", "labels_sha256")  # of a run's identity: what differs between sampling seeds
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


def compare(experiment: Experiment, reference: Opened) -> Comparison:
    """The comparison that a config's section `eval` describes."""
    extractor: FeatureExtractor = EXTRACTORS.build(experiment.eval.extractor).to(join_processes().device)
    own = experiment.eval.reference is None
    decoded = reconstructed(experiment, reference.heldout) if own else None
    return Comparison(reference, extractor, experiment.eval.metrics, reconstructed=decoded, progress=images_bar)


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
    metrics: Sequence[object],
    options: ReadOptions,
    *,
    extractor: str,
    is_fid: bool,
) -> list[str]:
    """Why published numbers may not stand beside the result; empty if they may. Needs no features."""
    first, given = samples[0], reference.statistics
    sample = _sampled(first.source)
    (count, shape), (reference_images, reference_shape) = _extent(first), _extent(reference)
    conditions = Conditions(
        extractor=extractor,
        is_fid=is_fid,
        metrics=[METRICS.name_of(each) for each in metrics],
        changed_metrics=[_described(each) for each in metrics if each != type(each)()],
        n_generated=first.statistics.moments.n if count is None and first.statistics else count,
        seeds=len(samples),
        image_shape=shape,
        altered=_altered(options),
        reference_statistics=given is not None and given.extractor is None,  # those made here say by what
        reference_count=None if given is None else given.moments.n,
        reference_images=reference_images or 0,
        reference_side=None if reference_shape is None else reference_shape[-1],
        labels=_labels_of(first.source) if sample is None else _plan_of(sample),
        weights=None if sample is None else sample.get("weights"),
        precision=None if sample is None else sample.get("precision"),
        target=None if sample is None else sample.get("target"),
    )
    return not_comparable(conditions)


def named_space(report: dict[str, Any]) -> dict[str, Any]:
    """The feature space of a report, as `reasons_not_comparable` takes it."""
    space = report["provenance"]["extractor"]
    return {"extractor": space["name"], "is_fid": space["is_fid"]}


def _extent(side: Opened) -> tuple[int | None, tuple[int, int, int] | None]:
    """Number and shape of its images, where it has any."""
    if side.features is not None:
        manifest = read_manifest(side.features / MANIFEST)
        channels, height, width = manifest["image_shape"]
        return manifest["count"], (channels, height, width)
    if side.source is None:
        return None, None
    return len(side.source), side.source.image_shape


def _sampled(source: Source | None) -> dict[str, Any] | None:
    """The section `sample` that images were made by, if that is known."""
    if source is None:
        return None
    facts = source.facts()
    facts = facts.get("sample", facts)  # of an npz that `sample` wrote, and of a run
    found = facts.get("experiment", {}).get("sample")
    return found if isinstance(found, dict) else None


def _plan_of(sample: dict[str, Any]) -> Any:
    labels = sample.get("labels")
    return labels if isinstance(labels, str) else "listed"


def _labels_of(source: Source | None) -> Any:
    """What the labels themselves tell of how they were chosen: only what a uniform draw cannot be."""
    if source is None or source.labels_N is None:
        return None
    counts = source.labels_N.unique(return_counts=True)[1]
    if len(counts) == 1:
        return "listed"
    return "balanced" if int(counts.max() - counts.min()) <= 1 else None


def _altered(options: ReadOptions) -> list[str]:
    changes = {
        f"resized to {options.size}": options.size,
        f"converted to {options.channels} channels": options.channels,
        f"mapped from {options.value_range}": options.value_range,
    }
    return [change for change, asked in changes.items() if asked is not None]


def _described(metric: Any) -> str:
    settings = ", ".join(f"{name}={value}" for name, value in config.dump(metric).items())
    return f"{METRICS.name_of(metric)} with {settings}"


def require_seeds_of_one(samples: Sequence[Opened]) -> None:
    """ValueError if several runs are averaged that differ in more than their sampling seed."""
    runs = [one.source.identity() for one in samples if isinstance(one.source, GeneratedSource)]
    for one in runs[1:]:
        found = [key for key, _ in config.differences(runs[0], one) if key not in SEEDED]
        if found:
            problem = f"SAMPLES are sampling seeds of one model, and two of them differ in {', '.join(sorted(found))}"
            raise ValueError(f"{problem}; evaluate them one by one, and compare them by dit-moe table")
