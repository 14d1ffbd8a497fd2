"""What an image model's run computes: a row is an image, and some are sampled."""

from __future__ import annotations

from dit_moe.autoencoders.autoencoder import AutoencoderConfig
from dit_moe.costs.measured import forward_flops_at
from dit_moe.costs.time import Work, training_flops
from dit_moe.data.latents import LatentsConfig
from dit_moe.diffusion import OBJECTIVES, SAMPLERS
from dit_moe.experiments.image import Experiment
from dit_moe.training import Unit


def sampling_flops(experiment: Experiment) -> float:
    """Of one image made by the section `sample`, without its decoding.

    With the experts of `sample.target` where that is one number, or else those of training.
    """
    model, target = experiment.model, experiment.sample.target
    flops = forward_flops_at(model, target) if isinstance(target, float) else model.footprint().forward_flops
    return evaluations(experiment) * flops


def evaluations(experiment: Experiment) -> int:
    """Of the network, for one image made by the section `sample`."""
    model, sample = experiment.model, experiment.sample
    objective = OBJECTIVES.build(experiment.objective, num_classes=model.num_classes)
    shape = (model.in_channels, model.input_size, model.input_size)
    return SAMPLERS.build(sample.sampler, objective).evaluations(sample.guidance, shape)


def image_work(experiment: Experiment) -> Work:
    forward, image = experiment.model.footprint().forward_flops, training_flops(experiment)
    sampled = sampling_flops(experiment)
    sampling = f"{sampled:.4g} to sample it in {evaluations(experiment)} evaluations"
    encodes = isinstance(experiment.first_stage, AutoencoderConfig) and not isinstance(experiment.data, LatentsConfig)
    return Work(
        rows="images",
        unit=Unit("images"),
        flops=[f"FLOPs per image   {forward:.4g} forward, {image:.4g} in training, {sampling}"],
        generation=sampled * experiment.sample.count,
        generated=f"{experiment.sample.count:,} images",
        left_out=["not in these      the encoder's time and memory; it runs for every image of every step"] * encodes,
    )
