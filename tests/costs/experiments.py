"""Resolved experiments whose costs are known by arithmetic: no data is read."""

from typing import Any

from dit_moe.config import build
from dit_moe.experiments import image
from dit_moe.experiments.image import Experiment, resolve_without_data
from dit_moe.experiments.text import TextExperiment, resolve_text_without_data

VOCAB, LENGTH = 50304, 2048


def image_model(name: str = "DiT-XL/2", **changes: Any) -> dict[str, Any]:
    """A section `model`, of 32×32 latents of ImageNet."""
    return {"name": name, "in_channels": 4, "input_size": 32, "num_classes": 1000, **changes}


def image_experiment(name: str = "DiT-XL/2", **sections: Any) -> Experiment:
    tree = {"model": image_model(name), "objective": "ddpm", "data": "digits", **sections}
    return resolve_without_data(image.image_experiment(tree))


def text_experiment(
    name: str = "LM-1.3B-6.9B-64E8A", model: dict[str, Any] | None = None, **sections: Any
) -> TextExperiment:
    tree = {
        "model": {"name": name, "vocab_size": VOCAB, **(model or {})},
        "data": {"path": "nowhere", "length": LENGTH},
        "train": {"steps": 1000, "batch_size": 2048, "micro_batch": 4, **sections.pop("train", {})},
        **sections,
    }
    return resolve_text_without_data(build(TextExperiment, tree))
