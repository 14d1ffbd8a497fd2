"""What a language model's run computes: a row is a sequence, and work is counted in tokens."""

from __future__ import annotations

from dit_moe.costs.time import Work, training_flops
from dit_moe.experiments.text import TextExperiment
from dit_moe.training import Unit


def text_work(experiment: TextExperiment) -> Work:
    forward, training = experiment.model.footprint().forward_flops, training_flops(experiment)
    length = experiment.model.tokens
    each = f"{forward / length:.4g} forward, {training / length:.4g} in training"
    whole = f"{forward:.4g} and {training:.4g} a sequence of {length:,}"
    return Work(rows="sequences", unit=Unit("tokens", length), flops=[f"FLOPs per token   {each}; {whole}"])
