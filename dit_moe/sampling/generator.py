"""A trained network and a seed → images. Image i depends on (seed, i, its label) and on nothing else."""

# N images of the run, B images of a batch, C channels, H height, W width

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from dit_moe.autoencoders import FirstStage
from dit_moe.config import require, section
from dit_moe.diffusion import SAMPLERS, GuidanceConfig, Objective, Sampler, SamplingError
from dit_moe.diffusion.base import Network
from dit_moe.distributed import enough_memory, join_processes, on_all, on_main
from dit_moe.models.compilation import compiled_blocks, require_compiler
from dit_moe.moe import measure_active, routers_of
from dit_moe.moe.compute_budget import ComputeBudget, ComputeBudgetConfig, solve_budget, thresholds
from dit_moe.randomness import generator, normal_like_images
from dit_moe.sampling.labels import WORDS, choose_labels

CALIBRATION_IMAGES, CALIBRATION_BATCH = 64, 16  # whatever the batch size, so that rounding is the same
MOST_IMAGES = 10**9  # of a set
LESS_MEMORY = "lower sample.batch_size or sample.decode_batch, or set first_stage.slicing=true"


@dataclass(frozen=True, kw_only=True)
class SampleConfig(ComputeBudgetConfig):
    """How to sample."""

    sampler: Annotated[Any, SAMPLERS] | None = None  # None: Heun for flow, ancestral DDPM for ddpm
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    count: int = 100
    seed: int = 0
    labels: int | str | tuple[int | str, ...] = "balanced"  # one of WORDS, a class, or classes to take in turn
    batch_size: int = 100
    decode_batch: int | None = None  # latents that the first stage decodes at a time; None: batch_size
    weights: Literal["ema", "model"] = "ema"
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False  # have torch.compile fuse each block; takes a minute at the start

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.count >= 1, self, "count", "must be at least 1")
        require(self.count <= MOST_IMAGES, self, "count", f"must be at most {MOST_IMAGES:,} images")
        require(0 <= self.seed < 2**63, self, "seed", "must be a whole number from 0 to 2^63 − 1")
        require(self.batch_size >= 1, self, "batch_size", "must be at least 1")
        fits = self.decode_batch is None or self.decode_batch >= 1
        require(fits, self, "decode_batch", "must be at least 1, or null for batch_size")
        require(self.labels not in ((), ""), self, "labels", "is empty; list at least one class")

    @property
    def listed(self) -> tuple[int | str, ...] | None:
        """The classes that `labels` names; None where it is one of `WORDS`, which no class of that name changes."""
        if isinstance(self.labels, tuple):
            return self.labels
        return None if self.labels in WORDS else (self.labels,)


def require_means(config: SampleConfig, device: torch.device) -> None:
    """ConfigError unless a network can be sampled on this device as the section `sample` says."""
    if config.compile:
        require_compiler(device.type, "sample.compile")


@dataclass
class Generated:
    """Images uint8 [N, C, H, W], the labels they were asked for, and the mean experts a token used to make them."""

    images: Tensor
    labels: Tensor
    active_experts: float | None


class Generator:
    """Samples images with one network, whose thresholds, or k, are those of `config` only while it does.

    Args:
        model: the network, on its device; it is put in evaluation mode.
        objective: what it was trained with.
        stage: decodes its latents.
        config: a resolved section ``sample`` (with a sampler).
        latent_shape: (C, H, W).
        budget: that `config` asks for, where it is solved already.

    Raises ConfigError where `require_means` does, and for a compute budget that cannot be solved.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        stage: FirstStage,
        config: SampleConfig,
        latent_shape: Sequence[int],
        budget: ComputeBudget | None = None,
    ) -> None:
        self.model, self.objective, self.stage, self.config = model.eval(), objective, stage, config
        self.latent_shape = tuple(latent_shape)
        self.device = next(model.parameters()).device
        require_means(config, self.device)
        if config.compile:
            for router in routers_of(model):
                router.capacity_factor = None  # for training: here its layers would be compiled, and not be counted
        self.sampler: Sampler = SAMPLERS.build(config.sampler, objective)
        with section("sample"), enough_memory(SamplingError, "set sample.p in place of sample.target"):
            times = self.sampler.times(self.latent_shape)
            self.budget = budget or solve_budget(config, model, self._sample_some, times)  # None: as trained

    def latents(self, indices: Sequence[int], labels_B: Tensor, on_step: Callable[..., Any] | None = None) -> Tensor:
        """Latents of the images number `indices`, [B, C, H, W], with one label each."""
        return self._latents([generator(self.config.seed, "image", i) for i in indices], labels_B, self.budget, on_step)

    def _latents(
        self,
        generators: Sequence[torch.Generator],
        labels_B: Tensor,
        budget: ComputeBudget | None,
        on_step: Callable[..., Any] | None = None,
    ) -> Tensor:
        network = self.model if budget is None else self._with_budget(budget)
        noise = normal_like_images(generators, self.latent_shape, self.device)
        labels_B, guidance = labels_B.to(self.device), self.config.guidance
        compiled = compiled_blocks(self.model) if self.config.compile else nullcontext()
        with compiled, torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            return self.sampler(network, noise, labels_B, generators, guidance, on_step=on_step)

    def _with_budget(self, budget: ComputeBudget) -> Network:
        """The network with the routers set for the time that it is told, which samplers have equal for all images."""

        def network(x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor) -> Tensor:
            changes = len(budget.overrides_PL) > 1
            with budget.at(self.objective.place(t_B[0].item()) if changes else 1.0):
                return self.model(x_BCHW, t_B, labels_B)

        return network

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
            with torch.no_grad(), enough_memory(SamplingError, LESS_MEMORY):
                images = self.decode(self.latents(part, labels_N[part], on_step))
            yield images

    def generate(self, labels_N: Tensor, on_step: Callable[..., Any] | None = None) -> Generated | None:
        """All images at once, in memory, on the main process; None on the others, which make their share of them."""
        batches: list[Tensor] = []
        active_experts = stream_together(self, labels_N, batches.append, on_step)
        return Generated(torch.cat(batches), labels_N, active_experts) if batches else None

    def evaluations(self) -> int:
        """Network evaluations per image."""
        return self.sampler.evaluations(self.config.guidance, self.latent_shape)

    @property
    def thresholds(self) -> list[Any]:
        """In effect while sampling, by layer; where they change on the way, lists of these by part, noise first."""
        if self.budget is None:
            return thresholds(self.model)
        parts = [list(overrides_L) for overrides_L in self.budget.thresholds_PL]
        return parts[0] if len(parts) == 1 else parts

    def _sample_some(self, budget: ComputeBudget) -> None:
        """The whole way of some images from noise to data: the compute that is paid.

        Always the same images, so that what is sampled later depends on no batch size, count or seed.
        """
        settings = replace(self.config, count=CALIBRATION_IMAGES, labels="balanced")
        labels_N = choose_labels(settings, self.objective.num_classes)
        for part in torch.arange(CALIBRATION_IMAGES).split(CALIBRATION_BATCH):
            self._latents([generator("calibration", i) for i in part.tolist()], labels_N[part], budget)


# ---------------------------------------------------------------------------------------------- several processes


def stream_together(
    generator: Generator,
    labels_N: Tensor,
    take: Callable[[Tensor], object],
    on_step: Callable[..., Any] | None = None,
) -> float | None:
    """Sample an image for every label; ``take(images_BCHW)`` gets them on the main process, in order, as they come.

    Every process makes the images at its own strided indices, and hands them over batch by batch: no one waits for
    another for longer than a batch takes. Returns the mean experts that a token used, None for a model without. Raises
    on all processes what one of them raises, in `take` too.
    """
    state, count = join_processes(), len(labels_N)
    world, stride = state.num_processes, state.num_processes * generator.config.batch_size
    with measure_active(generator.model) as active:
        batches = generator.batches(range(state.process_index, count, world), labels_N, on_step)
        for _ in range(0, count, stride):
            parts = [part for part in on_all(lambda: next(batches, None)) if part is not None]
            on_main(partial(_hand_over, parts, take))
        counts = on_all(lambda: (active.pairs, active.tokens))
    active.pairs, active.tokens = map(sum, zip(*counts, strict=True))
    return active.mean


def _hand_over(parts: Sequence[Tensor], take: Callable[[Tensor], object]) -> None:
    """The strided parts of the processes that had any left, as one batch in order."""
    images_BCHW = parts[0].new_empty(sum(map(len, parts)), *parts[0].shape[1:])
    for rank, part in enumerate(parts):
        images_BCHW[rank :: len(parts)] = part
    take(images_BCHW)
