"""Published ways to sample and to evaluate, by name: what has to be equal before two numbers can be compared."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dit_moe import config
from dit_moe.registry import did_you_mean

# ------------------------------------------------------------------------------------------------------------ sampling


@dataclass(frozen=True, kw_only=True)
class SamplingRecipe:
    """How a published baseline was sampled: all of the section ``sample`` that its source states.

    What it does not state (seed, batch size, precision) stays the run's own.
    """

    name: str
    summary: str  # one line, with the source
    objective: str  # that the network must have been trained with
    overrides: tuple[str, ...]  # ``key=value`` for the section ``sample``

    def changed_by(self, overrides: Sequence[str]) -> list[str]:
        """The dotted keys of its settings that further overrides change."""
        own = config.override({}, self.overrides)
        before, after = _flat(own), _flat(config.override(own, overrides))
        return [key for key in before if key not in after or after[key] != before[key]]

    def label(self, overrides: Sequence[str]) -> str:
        """What a result made with it and with further overrides is called."""
        changed = self.changed_by(overrides)
        return f"{self.name}, changed: {', '.join(changed)}" if changed else self.name


DDPM_250 = "{name: ddpm, steps: 250}"
EULER_250 = "{name: euler, steps: 250, time_shift: 1.0}"
HEUN_125 = "{name: heun, steps: 125, time_shift: 1.0}"  # 250 evaluations
SDE_250 = "{name: euler_maruyama, steps: 250, time_shift: 1.0, diffusion: sigma, diffusion_scale: 1.0, last_step: 0.04}"


def _recipe(
    name: str, summary: str, sampler: str, *, scale: float = 1.0, channels: int | None = None, last: float = 1.0
) -> SamplingRecipe:
    overrides = (
        f"sampler={sampler}",
        f"guidance.scale={scale}",
        f"guidance.interval=[0.0, {last}]",
        f"guidance.channels={'null' if channels is None else channels}",
        "count=50000",
        "labels=random",
        "weights=ema",
        "target=null",  # the thresholds as trained
        "p=null",
        "vary=layer",
    )
    objective = "ddpm" if sampler == DDPM_250 else "flow"
    return SamplingRecipe(name=name, summary=summary, objective=objective, overrides=overrides)


def _flat(tree: config.Tree, prefix: str = "") -> config.Tree:
    """The leaves under their dotted keys."""
    leaves: config.Tree = {}
    for key, value in tree.items():
        leaves |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return leaves


# The released code of DiT and SiT guides the first 3 of the 4 latent channels.
GUIDED: dict[str, Any] = {"scale": 1.5, "channels": 3}
DIT, SIT, REPA = "DiT, arXiv 2212.09748", "SiT, arXiv 2401.08740", "REPA, arXiv 2410.06940"
DIFFMOE, PROMOE, DSMOE = "DiffMoE, arXiv 2503.14487", "ProMoE, ICLR 2026", "DSMoE, of EfficientMoE"

SAMPLING = {
    recipe.name: recipe
    for recipe in (
        _recipe("dit", f"250 DDPM steps, no guidance ({DIT})", DDPM_250),
        _recipe("dit-cfg1.5", f"250 DDPM steps, guidance 1.5 on 3 channels ({DIT})", DDPM_250, **GUIDED),
        _recipe("sit-ode", f"125 Heun steps, no guidance ({SIT})", HEUN_125),
        _recipe("sit-ode-cfg1.5", f"125 Heun steps, guidance 1.5 on 3 channels ({SIT})", HEUN_125, **GUIDED),
        _recipe("sit-sde", f"250 steps of the SDE, no guidance ({SIT})", SDE_250),
        _recipe("sit-sde-cfg1.5", f"250 steps of the SDE, guidance 1.5 on 3 channels ({SIT})", SDE_250, **GUIDED),
        _recipe("repa", f"250 steps of the SDE, guidance 1.8 at t <= 0.7 ({REPA})", SDE_250, scale=1.8, last=0.7),
        _recipe("diffmoe-flow", f"250 Euler steps, no guidance ({DIFFMOE})", EULER_250),
        _recipe("diffmoe-ddpm", f"250 DDPM steps, no guidance ({DIFFMOE})", DDPM_250),
        _recipe("promoe", f"250 Euler steps, no guidance ({PROMOE})", EULER_250),
        _recipe("promoe-cfg1.5", f"250 Euler steps, guidance 1.5 ({PROMOE})", EULER_250, scale=1.5),
        _recipe("dsmoe", f"250 Euler steps, no guidance ({DSMOE})", EULER_250),
    )
}


def sampling_recipe(name: str, objective: str, option: str = "--recipe") -> SamplingRecipe:
    """The recipe `name`, given by the command's `option`, for a network trained with `objective`.

    ValueError if there is none, or if it is for another objective.
    """
    if name not in SAMPLING:
        raise ValueError(f"{option} {name} is not known; {did_you_mean(name, SAMPLING)}")
    recipe = SAMPLING[name]
    if recipe.objective != objective:
        needs = f"samples networks trained with {recipe.objective}, this run was trained with {objective}"
        fitting = [each.name for each in SAMPLING.values() if each.objective == objective]
        raise ValueError(f"{option} {name} {needs}; choose one of {', '.join(fitting) or 'none, by leaving it out'}")
    return recipe


# ---------------------------------------------------------------------------------------------------------- evaluation


@dataclass(frozen=True, kw_only=True)
class EvaluationRecipe:
    """How published numbers are computed."""

    name: str
    summary: str
    extractor: str
    metrics: tuple[str, ...]
    count: int  # generated images
    reference_count: int  # images, at least, of the reference's statistics
    reference_images: int  # beside the reference's statistics
    sides: tuple[int, ...]  # of the images, in pixels


ADM_50K = EvaluationRecipe(
    name="adm-50k",
    summary="50 000 images against ADM's reference batch (arXiv 2105.05233), as in nearly all papers since",
    extractor="inception",
    metrics=("fd", "sfd", "inception_score", "precision_recall"),
    count=50_000,
    reference_count=50_000,
    reference_images=10_000,
    sides=(256, 512),
)
EVALUATION = {recipe.name: recipe for recipe in (ADM_50K,)}


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """How a result came about, as far as it decides whether published numbers may stand beside it."""

    extractor: str
    is_fid: bool  # the extractor is the Inception whose weights were verified
    metrics: Sequence[str]
    changed_metrics: Sequence[str] = ()  # whose settings are not the defaults: "precision_recall with k=5"
    n_generated: int | None  # None: not known
    seeds: int
    image_shape: tuple[int, int, int] | None  # (C, H, W) of the generated images, as compared; None: not known
    altered: Sequence[str] = ()  # what was done to either side's images: "resized to 256"
    reference_statistics: bool  # the reference came with its own, rather than having them computed of its images
    reference_count: int | None  # images that its statistics say they are of; None: they do not say
    reference_images: int  # beside the statistics; 0: none
    reference_side: int | None  # of its images, in pixels; None: it has none
    labels: Literal["random", "balanced", "data", "listed"] | None = None  # None: not known, as the next two
    weights: str | None = None
    precision: str | None = None
    dial: str | None = None  # "target=[1, 2] by layer", "p=0.95"; None: as trained, or not known


LABELS = {
    "balanced": "as many images of each class",
    "data": "labels as frequent as in the training data",
    "listed": "labels of listed classes",
}


def not_comparable(found: Conditions, recipe: EvaluationRecipe = ADM_50K) -> list[str]:
    """Every reason why a result may not be compared with published ones; none if it may."""
    reasons = []
    if not found.is_fid:
        reasons.append(f"the features are those of {found.extractor}, not of the verified Inception")
    if found.n_generated is None:
        reasons.append("the number of generated images is not known")
    elif found.n_generated != recipe.count:
        reasons.append(f"{_count(found.n_generated)} generated images instead of {_count(recipe.count)}")
    if found.seeds != 1:
        reasons.append(f"the mean over {found.seeds} sampling seeds, published numbers are of one")
    reasons += _of_the_images(found, recipe)
    reasons += [f"the images were altered: {each}" for each in found.altered]
    reasons += [f"computed otherwise than published numbers: {each}" for each in found.changed_metrics]
    reasons += _of_the_reference(found, recipe)
    reasons += _of_the_sampling(found)
    return reasons


def _of_the_images(found: Conditions, recipe: EvaluationRecipe) -> list[str]:
    if found.image_shape is None:
        return ["the size of the generated images is not known"]
    reasons = []
    channels, height, width = found.image_shape
    if height != width or height not in recipe.sides:
        sides = " or ".join(f"{side}×{side}" for side in recipe.sides)
        reasons.append(f"images of {height}×{width} pixels instead of {sides}")
    if channels != 3:
        reasons.append(f"images of {channels} channel{'s' * (channels != 1)} instead of 3")
    side = found.reference_side
    if height == width and side is not None and side != height:
        reasons.append(f"images of {height}×{width} pixels against a reference of {side}×{side}")
    return reasons


def _of_the_reference(found: Conditions, recipe: EvaluationRecipe) -> list[str]:
    reasons = []
    if not found.reference_statistics:
        reasons.append("the reference's statistics were computed here, not published with it")
    if found.reference_count is not None and found.reference_count < recipe.reference_count:
        reasons.append(f"the reference's statistics are of {_count(found.reference_count)} images")
    if found.reference_side is None:
        reasons.append("the reference holds no images that would tell its resolution")
    images, wanted = found.reference_images, recipe.reference_images
    if "precision_recall" in found.metrics and images not in (0, wanted):
        reasons.append(f"precision and recall against {_count(images)} reference images instead of {_count(wanted)}")
    return reasons


def _of_the_sampling(found: Conditions) -> list[str]:
    reasons = []
    if found.labels in LABELS:
        reasons.append(f"{LABELS[found.labels]}; published baselines draw the classes at random")
    if found.weights not in (None, "ema"):
        reasons.append("sampled with the weights as they are, published baselines with their moving average (EMA)")
    if found.precision not in (None, "fp32"):
        reasons.append(f"sampled in {found.precision} instead of fp32")
    if found.dial is not None:
        reasons.append(f"sampled with {found.dial} instead of as trained")
    return reasons


def _count(number: int) -> str:
    return f"{number:,}".replace(",", " ")


COUNT = r"[\d ]*\d"
GENERAL = {
    rf"{COUNT} generated images instead of ({COUNT})": r"another number of generated images than \1",
    rf"the mean over {COUNT} sampling seeds, ": "the mean over several sampling seeds, ",
    r"images of \d+×\d+ pixels instead of (.+)": r"images of another size than \1",
    r"images of \d+×\d+ pixels against a reference of \d+×\d+": "images of another size than the reference's",
    rf"the reference's statistics are of {COUNT} images": "the reference's statistics are of too few images",
    rf"against {COUNT} reference images instead of ({COUNT})": r"against another number of reference images than \1",
    r"with (target|p)=.+ instead of as": "with another number of active experts than as",
}


def in_general(reason: str) -> str:
    """A reason of `not_comparable` without the result's own numbers, so that many results share it."""
    for pattern, general in GENERAL.items():
        reason = re.sub(pattern, general, reason)
    return reason
