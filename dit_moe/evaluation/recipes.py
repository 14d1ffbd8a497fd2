"""Published ways to sample and to evaluate, by name: what has to be equal before two numbers can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
    reference_images: int  # beside the reference's statistics
    sides: tuple[int, ...]  # of the images, in pixels


ADM_50K = EvaluationRecipe(
    name="adm-50k",
    summary="50 000 images against ADM's reference batch (arXiv 2105.05233), as in nearly all papers since",
    extractor="inception",
    metrics=("fd", "sfd", "inception_score", "precision_recall"),
    count=50_000,
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
    n_generated: int
    seeds: int
    image_shape: tuple[int, int, int]  # (C, H, W) of the generated images
    resized: bool  # either side's images were resized or cropped for the evaluation
    reference_statistics: bool  # the reference came with its own, rather than having them computed of its images
    reference_images: int  # 0: none
    balanced_labels: bool | None = None  # as many images of each class; None: not known


def not_comparable(found: Conditions, recipe: EvaluationRecipe = ADM_50K) -> list[str]:
    """Every reason why a result may not be compared with published ones; none if it may."""
    channels, height, width = found.image_shape
    neighbours = "precision_recall" in found.metrics
    sides = " or ".join(f"{side}×{side}" for side in recipe.sides)
    reasons = {
        f"the features are those of {found.extractor}, not of the verified Inception": not found.is_fid,
        f"{_count(found.n_generated)} generated images instead of {_count(recipe.count)}": found.n_generated
        != recipe.count,
        f"the mean over {found.seeds} sampling seeds, published numbers are of one": found.seeds != 1,
        f"images of {height}×{width} pixels instead of {sides}": height != width or height not in recipe.sides,
        f"images of {channels} channel{'s' * (channels != 1)} instead of 3": channels != 3,
        "the images were resized for the evaluation": found.resized,
        "the reference's statistics were computed here, not published with it": not found.reference_statistics,
        f"precision and recall against {_count(found.reference_images)} reference images instead of "
        f"{_count(recipe.reference_images)}": neighbours and found.reference_images != recipe.reference_images,
        "as many images of each class; published baselines draw the labels at random": found.balanced_labels is True,
    }
    return [reason for reason, holds in reasons.items() if holds]


def _count(number: int) -> str:
    return f"{number:,}".replace(",", " ")
