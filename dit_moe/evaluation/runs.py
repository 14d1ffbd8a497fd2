"""Runs as sources of samples, and what they are compared with: the images that they were trained on, and held out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_moe import config
from dit_moe.autoencoders import FIRST_STAGES, FirstStage
from dit_moe.autoencoders.base import IdentityConfig
from dit_moe.data.latents import LatentsConfig
from dit_moe.data.listing import note
from dit_moe.distributed import join_processes
from dit_moe.evaluation.comparison import Comparison
from dit_moe.evaluation.own_extractor import extractor_of
from dit_moe.evaluation.sources import open_input
from dit_moe.evaluation.sources.base import (
    EvaluationInput,
    ReadOptions,
    Reconstructed,
    Source,
    converted,
    sha256_of_labels,
)
from dit_moe.evaluation.sources.dataset import DatasetSource, open_dataset, open_heldout
from dit_moe.experiments.image import Experiment
from dit_moe.experiments.run import ImageRun
from dit_moe.extractors import FeatureExtractor
from dit_moe.extractors.trained_cnn import TrainedCNNExtractor
from dit_moe.moe import measure_active
from dit_moe.moe.compute_budget import ComputeBudget
from dit_moe.progress import images_bar
from dit_moe.randomness import generator, normal_like_images
from dit_moe.sampling.generator import Generator, SampleConfig

SEEDED = ("experiment.sample.seed", "labels_sha256")  # of a run's identity: what differs between sampling seeds
ROUNDING_ONLY = ("sample.batch_size", "sample.decode_batch", "sample.compile")  # no part in what the images are
PLACES = ("first_stage.model", "first_stage.subfolder", "first_stage.statistics")  # hashes say what is there
# Options that came after features were first kept, which are no part of the identity where they have these values.
LATER = {
    "sample.p": None,
    "sample.vary": "layer",
    "objective.direction": "to_noise",
    "first_stage.statistics": None,
    "first_stage.statistics_sha256": None,
    "model.position_embedding": "absolute",
    "model.rotary_grid": None,
    "model.norm": "layer_norm",
    "model.activation": "gelu",
    "model.qk_norm_eps": None,
    "model.mlp_norm_eps": 1e-6,
    "model.freq_shift": 0,
    "model.moe.shared_hidden": None,
    "model.moe.bias": False,
    "model.moe.recompute": False,
    "model.moe.capacity_factor": None,
}


class GeneratedSource(Source):
    """What a generator makes for these labels.

    Args:
        generator: with its sampler, seed and network.
        labels_N: the label of every image.
        name: what messages and results call it.
        identity: all that decides the images, JSON-ready.
        facts: what else a result should record.
        class_names: of the labels; None: not known.
    """

    labels_N: Tensor

    def __init__(
        self,
        generator: Generator,
        labels_N: Tensor,
        *,
        name: str,
        identity: dict[str, Any],
        facts: dict[str, Any] | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        self.generator, self.labels_N, self.name = generator, labels_N, name
        self.model_classes = tuple(class_names or ()) or None
        self.image_shape = decoded_shape(generator, generator.latent_shape, generator.device)
        self.batch_size = generator.config.batch_size
        self._identity, self._facts = identity, facts or {}
        self._counts = {"pairs": 0, "tokens": 0}  # of experts and tokens; tokens

    def __len__(self) -> int:
        return len(self.labels_N)

    def identity(self) -> dict[str, Any]:
        return {"kind": "run", **self._identity, "labels_sha256": sha256_of_labels(self.labels_N)}

    def facts(self) -> dict[str, Any]:
        return self._facts

    def batches(self, parts: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        for part in parts:
            with measure_active(self.generator.model) as active:
                images = torch.cat(list(self.generator.batches(part, self.labels_N)))
            self._counts["pairs"] += active.pairs
            self._counts["tokens"] += active.tokens
            yield images

    def take_counts(self) -> dict[str, int]:
        counts, self._counts = self._counts, {"pairs": 0, "tokens": 0}
        return counts


class DecodedNoise(Source):
    """The noise that the images of a run are sampled from, decoded as if it were latents: far from all real images."""

    name = "noise"

    def __init__(self, experiment: Experiment, count: int) -> None:
        self.stage: FirstStage = FIRST_STAGES.build(experiment.first_stage).to(join_processes().device)
        model, self.seed, self.count = experiment.model, experiment.sample.seed, count
        self.latent_shape = (model.in_channels, model.input_size, model.input_size)
        self.image_shape = decoded_shape(self.stage, self.latent_shape, join_processes().device)
        self.batch_size = experiment.sample.decode_batch or experiment.sample.batch_size

    def __len__(self) -> int:
        return self.count

    def identity(self) -> dict[str, Any]:
        stage: Any = self.stage.resolved()
        about = {"count": self.count, "seed": self.seed, "latent_shape": list(self.latent_shape)}
        return {"kind": "noise", **about, "first_stage": config.dump(stage)}

    def batches(self, parts: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        for part in parts:
            generators = [generator(self.seed, "image", i) for i in part]
            noise_BCHW = normal_like_images(generators, self.latent_shape, join_processes().device)
            with torch.no_grad():
                yield self.stage.decode(noise_BCHW).cpu()


def decoded_shape(
    decoder: Generator | FirstStage, latent_shape: Sequence[int], device: torch.device
) -> tuple[int, int, int]:
    """(C, H, W) of the images that latents become."""
    with torch.no_grad():
        decoded = decoder.decode(torch.zeros(1, *latent_shape, device=device))
    channels, height, width = decoded.shape[1:]
    return channels, height, width


def run_source(
    opened: ImageRun, sample: SampleConfig | None = None, budget: ComputeBudget | None = None
) -> GeneratedSource:
    """The images that a run makes by its section `sample`, or by another one, whose `budget` may be solved already."""
    sample = sample or opened.experiment.sample
    experiment = replace(opened.experiment, sample=sample)
    generator = opened.generator(sample, budget)
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
        class_names=opened.class_names,
    )


def decisive(experiment: Experiment) -> config.Tree:
    """What of an experiment decides which images a network makes."""
    tree = config.dump(experiment)
    found = {name: tree[name] for name in ("model", "objective", "first_stage", "sample")}
    return _without(found, (*ROUNDING_ONLY, *(PLACES if found["first_stage"].get("sha256") else ())))


def _without(tree: config.Tree, dropped: Sequence[str], path: str = "") -> config.Tree:
    """A tree without some keys, given with their sections, and without those that LATER leaves out."""
    kept: config.Tree = {}
    for name, value in tree.items():
        key = f"{path}{name}"
        if isinstance(value, dict):
            kept[name] = _without(value, dropped, f"{key}.")
        elif key not in dropped and (key not in LATER or value != LATER[key]):
            kept[name] = value
    return kept


def training_images(experiment: Experiment, options: ReadOptions = ReadOptions()) -> EvaluationInput:  # noqa: B008 (frozen)
    """What a run is compared with: as its section `eval` says, or the images that it was trained on."""
    if experiment.eval.reference is not None:
        return open_input(experiment.eval.reference, options)
    if isinstance(experiment.images, LatentsConfig):
        problem = f"the run was trained on latents in {experiment.images.path} and does not say of which images"
        raise ValueError(f"{problem}; name a REFERENCE, or set eval.reference")
    reference = open_dataset(experiment.images, options=options)
    trained, source = getattr(experiment.data, "fingerprint", None), reference.source
    in_pixels = experiment.images is experiment.data
    if isinstance(source, DatasetSource) and in_pixels and trained not in (None, source.dataset.fingerprint):
        told = f"{source.name} holds other images than the run was trained on"
        note(f"{told}; it is compared with those that are there now")
    return converted(reference, options)


def with_heldout_of(experiment: Experiment, reference: EvaluationInput, options: ReadOptions) -> EvaluationInput:
    """A reference that names no held-out images, with those of the run's data, if these can be opened."""
    if reference.heldout is not None:
        return reference
    if isinstance(experiment.images, LatentsConfig):
        return replace(
            reference, no_heldout=f"{reference.no_heldout}, nor does the run say of which images its latents are"
        )
    try:
        heldout, why_not = open_heldout(experiment.images, options)
    except ValueError as error:
        heldout, why_not = None, str(error)
    if heldout is None:
        return replace(reference, no_heldout=f"{reference.no_heldout}, and of the run, {why_not}")
    found = converted(EvaluationInput(heldout=heldout), options)
    return replace(reference, heldout=found.heldout, heldout_of_run=True)


def without_few_heldout(reference: EvaluationInput, samples: Sequence[EvaluationInput]) -> EvaluationInput:
    """Without held-out images of the run that are fewer than the samples, or of another shape: the rest is as it is."""
    heldout = reference.heldout
    if heldout is None or not reference.heldout_of_run:
        return reference
    most = max((len(one.images) for one in samples if one.images is not None), default=0)
    shapes = {one.images.image_shape for one in [*samples, reference] if one.images is not None}
    if len(heldout) < most:
        why_not = f"the run has {len(heldout)} held-out images, fewer than {most} samples; give count={len(heldout)}"
    elif shapes - {heldout.image_shape}:
        why_not = f"the held-out images of the run, {heldout.name}, are of another shape"
    else:
        return reference
    return replace(reference, heldout=None, no_heldout=why_not)


def reconstructed(experiment: Experiment, reference: EvaluationInput) -> Source | None:
    """The held-out images of the run's own data as its autoencoder gives them back; None if there is no such thing."""
    if experiment.eval.reference is not None or reference.heldout is None:
        return None
    if isinstance(experiment.first_stage, IdentityConfig):
        return None
    stage = FIRST_STAGES.build(experiment.first_stage).to(join_processes().device)
    return Reconstructed(reference.heldout, stage, experiment.sample.decode_batch)


def noise_for(experiment: Experiment, extractor: FeatureExtractor, count: int) -> Source | None:
    """So many images of noise in the feature space of a CNN of the run's own, where no one knows what is far."""
    return DecodedNoise(experiment, count) if isinstance(extractor, TrainedCNNExtractor) else None


def comparison_of(
    experiment: Experiment, reference: EvaluationInput, home: Path, count: int | None = None
) -> Comparison:
    """The comparison that the section `eval` of the run in the folder `home` describes, of `count` samples."""
    extractor = extractor_of(experiment, home)
    decoded = reconstructed(experiment, reference)
    noise = None if count is None else noise_for(experiment, extractor, count)
    metrics = experiment.eval.metrics
    return Comparison(reference, extractor, metrics, reconstructed=decoded, noise=noise, progress=images_bar)


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
