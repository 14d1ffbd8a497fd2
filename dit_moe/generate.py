"""A trained network and a seed → images. Image i depends on (seed, i, its label) and on nothing else."""

# N images of the run, B images of a batch, C channels, H height, W width

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from dit_moe.config import ConfigError, require
from dit_moe.diffusion import SAMPLERS, GuidanceConfig, Objective, Sampler, SamplingError
from dit_moe.latents import FirstStage
from dit_moe.moe import calibrate, measure_active, steered_routers
from dit_moe.randomness import generator, normal_like_images

CALIBRATION_IMAGES = 64


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How to sample."""

    sampler: Annotated[Any, SAMPLERS] | None = None  # None: Heun for flow, ancestral DDPM for ddpm
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    count: int = 100
    seed: int = 0
    labels: Literal["balanced", "random", "data"] | tuple[int, ...] = "balanced"  # or the classes to take in turn
    batch_size: int = 100
    decode_batch: int | None = None  # latents that the first stage decodes at a time; None: batch_size
    weights: Literal["ema", "model"] = "ema"
    precision: Literal["fp32", "bf16"] = "fp32"
    target: float | None = None  # solve the thresholds anew for so many mean active experts; None: as trained

    def __post_init__(self) -> None:
        require(self.count >= 1, self, "count", "must be at least 1")
        require(0 <= self.seed < 2**63, self, "seed", "must be a whole number from 0 to 2^63 − 1")
        require(self.batch_size >= 1, self, "batch_size", "must be at least 1")
        fits = self.decode_batch is None or self.decode_batch >= 1
        require(fits, self, "decode_batch", "must be at least 1, or null for batch_size")
        require(self.labels != (), self, "labels", "is empty; list at least one class")
        require(self.target is None or self.target > 0, self, "target", "must be above 0")


@dataclass
class Generated:
    """Images uint8 [N, C, H, W], the labels they were asked for, and the mean experts a token used to make them."""

    images: Tensor
    labels: Tensor
    active_experts: float | None


def check_labels(config: SampleConfig, num_classes: int) -> None:
    """ConfigError if the config lists a class that there is not."""
    if not isinstance(config.labels, str) and not 0 <= min(config.labels) <= max(config.labels) < num_classes:
        raise ConfigError("labels", f"={list(config.labels)} must lie in 0..{num_classes - 1}, the model's classes")


def choose_labels(config: SampleConfig, num_classes: int, class_counts: Sequence[int] | None = None) -> Tensor:
    """The label of every image of a run, int64 [count]; label i is the same whatever the count.

    Drawn labels are uniform ("random"), or as frequent as in the training data ("data"), of which `class_counts` says
    how many images each class has. ConfigError if the config lists a class that there is not, or needs those counts.
    """
    check_labels(config, num_classes)
    if config.labels in ("random", "data"):
        counts = [1] * num_classes if config.labels == "random" else class_counts
        if counts is None:
            problem = "=data needs the class frequencies of the training data, which this run did not record"
            raise ConfigError("labels", f"{problem}; choose random or balanced, or train it for one more checkpoint")
        total, ends_K = sum(counts), torch.tensor(counts).cumsum(0)
        draws = [torch.randint(total, (), generator=generator(config.seed, "label", i)) for i in range(config.count)]
        return torch.searchsorted(ends_K, torch.stack(draws), right=True)  # of images in the order of their classes
    classes = torch.arange(num_classes) if config.labels == "balanced" else torch.tensor(config.labels)
    return classes[torch.arange(config.count) % len(classes)]


class Generator:
    """Samples images with one network.

    Args:
        model: the network, on its device; it is put in evaluation mode.
        objective: what it was trained with.
        stage: decodes its latents.
        config: a settled section ``sample`` (with a sampler).
        latent_shape: (C, H, W).
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        stage: FirstStage,
        config: SampleConfig,
        latent_shape: Sequence[int],
    ) -> None:
        self.model, self.objective, self.stage, self.config = model.eval(), objective, stage, config
        self.latent_shape = tuple(latent_shape)
        self.device = next(model.parameters()).device
        self.sampler: Sampler = SAMPLERS.build(config.sampler, objective)
        if config.target is not None:
            self._recalibrate(config.target)
        self.thresholds = [router.controller.p.item() for router in steered_routers(model)]

    def latents(self, indices: Sequence[int], labels_B: Tensor, on_step: Callable[..., Any] | None = None) -> Tensor:
        """Latents of the images number `indices`, [B, C, H, W], with one label each."""
        generators = [generator(self.config.seed, "image", i) for i in indices]
        noise = normal_like_images(generators, self.latent_shape, self.device)
        with self._precision():
            return self.sampler(
                self.model, noise, labels_B.to(self.device), generators, self.config.guidance, on_step=on_step
            )

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """uint8 images on the CPU, by `decode_batch` latents at a time."""
        parts = latents_BCHW.split(self.config.decode_batch or len(latents_BCHW))
        return torch.cat([self.stage.decode(part).cpu() for part in parts])

    def batches(
        self, indices: Sequence[int], labels_N: Tensor, on_step: Callable[..., Any] | None = None
    ) -> Iterator[Tensor]:
        """uint8 images [B, C, H, W] on the CPU, batch by batch, in the order of `indices` into `labels_N`."""
        size = self.config.batch_size
        for start in range(0, len(indices), size):
            part = list(indices[start : start + size])
            with torch.no_grad(), _enough_memory():
                images = self.decode(self.latents(part, labels_N[part], on_step))
            yield images

    def generate(self, labels_N: Tensor, on_step: Callable[..., Any] | None = None) -> Generated:
        """All images at once, in memory; `on_step(done, steps)` after every step of the sampler."""
        with measure_active(self.model) as active:
            images = torch.cat(list(self.batches(range(len(labels_N)), labels_N, on_step)))
        return Generated(images, labels_N, active.mean)

    def evaluations(self) -> int:
        """Network evaluations per image."""
        return self.sampler.evaluations(self.config.guidance, self.latent_shape)

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        enabled = self.config.precision == "bf16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    def _recalibrate(self, target: float) -> None:
        """Solve the thresholds on the whole way of some images from noise to data: the compute that is paid.

        Always the same images, so that what is sampled later depends neither on the batch size nor on the count.
        """
        settings = replace(self.config, count=CALIBRATION_IMAGES, seed=0, labels="balanced")
        labels_N = choose_labels(settings, self.objective.num_classes)
        size = min(self.config.batch_size, CALIBRATION_IMAGES)
        parts = [range(start, min(start + size, len(labels_N))) for start in range(0, len(labels_N), size)]
        calibrate(self.model, lambda: [self.latents(part, labels_N[list(part)]) for part in parts], target)


@contextlib.contextmanager
def _enough_memory() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        remedy = "lower sample.batch_size or sample.decode_batch, or set first_stage.slicing=true"
        raise SamplingError(f"out of memory; {remedy}") from error
