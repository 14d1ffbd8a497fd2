"""Held-out images of a run's own data: their distance is the floor where the reference names none of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dit_moe.data.latents import LatentsConfig
from dit_moe.evaluation.sources.base import EvaluationInput, ReadOptions, converted
from dit_moe.evaluation.sources.dataset import open_heldout
from dit_moe.experiments.image import Experiment


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
