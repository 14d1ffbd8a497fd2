"""Where the experts of an image model go, by layer, noise level, class and patch."""

# B images of a batch, S tokens of an image, N = B·S, T noise levels, M example images, L MoE layers, E experts
# C channels, or classes, H height, W width

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from dit_moe.analysis.collect import RoutingCounts, active_of_tokens, experts_of, run_facts, shape_of, spaced
from dit_moe.analysis.statistics import Examples, RoutingStats
from dit_moe.config import ConfigError
from dit_moe.data import Dataset
from dit_moe.data.class_names import readable_names
from dit_moe.diffusion import DDPM, Objective, SamplingError
from dit_moe.distributed import enough_memory
from dit_moe.experiments.run import ImageRun
from dit_moe.randomness import generator, normal_like_images

IMAGES, TIMES = 1000, 20
EXAMPLES, EXAMPLE_TIMES = 8, 5


def collect_images(
    run: ImageRun,
    dataset: Dataset,
    *,
    images: int = IMAGES,
    times: int = TIMES,
    on_progress: Callable[[int], object] = lambda count: None,
) -> RoutingStats:
    """Run the network over images at noise levels evenly spaced between data and noise, given each image's label.

    An image has the same noise at all levels. It depends on `sample.seed` and the image's number in the data set alone,
    as do the counts: they are the same for every batch size.

    Args:
        run: by its section `sample` it is decided which weights, precision, batch size and seed, and, if that states
            another compute budget than the run was trained with, the routers' settings.
        images: at most so many, evenly spaced over the data set.
        times: noise levels.
        on_progress: called with the number of noisy images that went through since.

    Raises ValueError for a dense model, or for more levels than the objective has; SamplingError without the memory.
    """
    experts_of(run)
    levels = noise_levels(run.objective, times)
    rows = spaced(len(dataset), images)
    shown = _NoisyImages(run, dataset)
    classes = len(dataset.class_names)
    names = readable_names(dataset.class_names, classes)
    counts = RoutingCounts(
        shown.network, {"time": times, "class": classes, "shuffled": classes, "position": shown.tokens}
    )
    labels = shown.labels(rows)
    shuffled = np.random.default_rng(shown.sample.seed).permutation(labels)
    for start in range(0, len(rows), shown.batch_size):
        part = rows[start : start + shown.batch_size]
        x0, eps, labels_B = shown.images(part)
        class_N = labels_B.repeat_interleave(shown.tokens)
        chance_B = torch.from_numpy(shuffled[start : start + len(part)]).to(labels_B)
        position_N = torch.arange(shown.tokens, device=class_N.device).repeat(len(part))
        for number, t in enumerate(levels):
            groups = {"time": torch.full_like(class_N, number), "class": class_N, "position": position_N}
            groups["shuffled"] = chance_B.repeat_interleave(shown.tokens)
            with counts.counting(groups):
                shown.forward(x0, eps, t, labels_B)
            on_progress(len(part))
    met, images_C = np.unique(labels, return_counts=True)
    (active_LT, load_LTE), (active_LC, load_LCE) = counts.by("time"), counts.by("class")
    seen = f"{times}, evenly spaced from t = {levels[0]:.3g} to {levels[-1]:.3g} (0 is the image, 1 is noise)"
    facts = {"images": len(rows), "noise levels": seen, "tokens counted": counts.tokens}
    return RoutingStats(
        kind="images",
        facts=run_facts(run, shown.thresholds) | facts,
        **shape_of(run),
        **counts.overall(),
        active_LS=counts.by("position")[0],
        times_T=np.array(levels),
        active_LT=active_LT,
        load_LTE=load_LTE,
        class_names_C=[names[label] for label in met],
        images_C=images_C,
        active_LC=active_LC[:, met],
        load_LCE=load_LCE[:, met],
        shuffled_LCE=counts.by("shuffled")[1][:, met],
        examples=shown.examples(of_many_classes(rows, labels, EXAMPLES), levels, names),
    )


def noise_levels(objective: Objective, count: int) -> list[float]:
    """Times in [0, 1], 1 is noise: the middles of `count` equal parts. ValueError if there are fewer levels than that.

    Those of DDPM are n / timesteps, with whole n.
    """
    if count < 1:
        raise ConfigError("times", f"={count} must be at least 1")
    if not isinstance(objective, DDPM):
        return [(i + 0.5) / count for i in range(count)]
    levels = objective.config.timesteps
    if count > levels:
        raise ConfigError("times", f"={count} exceeds the objective's {levels} noise levels; lower it")
    return [(2 * i + 1) * levels // (2 * count) / levels for i in range(count)]


def of_many_classes(rows: Sequence[int], labels: Sequence[int], wanted: int) -> list[int]:
    """At most `wanted` of the rows: of as many classes as can be, evenly spaced among them."""
    earlier: Counter[int] = Counter()
    turns = []
    for row, label in zip(rows, labels, strict=True):
        turns.append((earlier[label], label, row))
        earlier[label] += 1
    pool = sorted(turns)[: max(len(earlier), wanted)]
    return [pool[place][2] for place in spaced(len(pool), wanted)]


class _NoisyImages:
    """A run's network, and the noisy images that it is shown."""

    def __init__(self, run: ImageRun, dataset: Dataset) -> None:
        self.objective, self.stage, self.sample = run.objective, run.stage, run.experiment.sample
        made = run.generator()  # solves thresholds if the section `sample` asks for other compute than was trained
        self.network, self.device, self.budget, self.thresholds = made.model, made.device, made.budget, made.thresholds
        self.dataset = dataset
        self.tokens: int = run.experiment.model.tokens
        self.batch_size = self.sample.batch_size

    def labels(self, rows: Sequence[int]) -> list[int]:
        """All of them, before the first image is shown."""
        parts = [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]
        return [label for part in parts for label in self.dataset.__getitems__(part)["labels"].tolist()]

    def images(self, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Latents and noise [B, C, H, W], and labels [B], of images by their number in the data set."""
        batch = {name: value.to(self.device) for name, value in self.dataset.__getitems__(rows).items()}
        random = [generator(self.sample.seed, "routing", row) for row in rows]
        with torch.no_grad():
            moments = self.stage.moments_of(batch)
            latents = moments.sample(lambda like: normal_like_images(random, like.shape[1:], self.device)).float()
        return latents, normal_like_images(random, latents.shape[1:], self.device), batch["labels"]

    def forward(self, x0: Tensor, eps: Tensor, t: float, labels_B: Tensor) -> Tensor:
        """Show the network latents with noise at the time `t`; returns these."""
        x, times_B = self.objective.noisy_at(x0, eps, t)
        autocast = torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.sample.precision == "bf16")
        enough = enough_memory(SamplingError, "lower sample.batch_size")
        with enough, torch.no_grad(), autocast, nullcontext() if self.budget is None else self.budget.at(t):
            self.network(x, times_B, labels_B)
        return x

    def examples(self, rows: Sequence[int], levels: Sequence[float], class_names: Sequence[str]) -> Examples:
        """What these images and their noisy versions look like, and how many experts each of their patches uses."""
        shown_levels = np.linspace(0, len(levels) - 1, min(len(levels), EXAMPLE_TIMES))
        times = [levels[round(place)] for place in shown_levels]
        shown, noisy_MT, active_M = list[np.ndarray](), list[np.ndarray](), list[np.ndarray]()
        labels: list[int] = []
        for row in rows:  # one by one: as little memory as sampling takes
            x0, eps, labels_B = self.images([row])
            labels += labels_B.tolist()
            shown.append(self._decode(x0))
            for t in times:
                with active_of_tokens(self.network) as active:
                    noisy_MT.append(self._decode(self.forward(x0, eps, t, labels_B)))
                active_M.append(torch.stack(active).cpu().numpy())
        shape = (len(rows), len(times))
        return Examples(
            times_T=np.array(times),
            images_MHWC=np.stack(shown),
            noisy_MTHWC=np.stack(noisy_MT).reshape(*shape, *shown[0].shape),
            active_MTLS=np.stack(active_M).reshape(*shape, -1, self.tokens),
            classes_M=[class_names[label] for label in labels],
        )

    def _decode(self, latents_1CHW: Tensor) -> np.ndarray:
        """uint8 [H, W, C]."""
        with torch.no_grad():
            return self.stage.decode(latents_1CHW)[0].permute(1, 2, 0).cpu().numpy()
