"""The section `eval` of an experiment."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from dit_moe.config import require
from dit_moe.extractors import EXTRACTORS
from dit_moe.extractors.digits_cnn import DigitsCNNConfig
from dit_moe.metrics import METRICS


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How a run is evaluated: how many images of how many sampling seeds, in which feature space, against what."""

    extractor: Annotated[Any, EXTRACTORS] = field(default_factory=DigitsCNNConfig)
    metrics: tuple[Annotated[Any, METRICS], ...] | None = None  # None: those that suit the extractor
    seeds: int = 3  # sampling seeds; the spread over them is reported
    images: int | None = None  # per seed; None: as many as there are held-out images, what they are compared with
    reference: str | None = None  # what `dit-moe eval` takes for one; None: the images that were trained on
    light_every: int | None = None  # steps of training between evaluations of a few images; None: none
    light_images: int = 200

    def __post_init__(self) -> None:
        require(self.seeds >= 1, self, "seeds", "must be at least 1")
        require(self.images is None or self.images >= 2, self, "images", "must be at least 2; a spread needs two")
        require(self.metrics != (), self, "metrics", "is empty; name at least one, or leave the line out")
        every = self.light_every is None or self.light_every >= 1
        require(every, self, "light_every", "must be at least 1, or null for none")
        require(self.light_images >= 2, self, "light_images", "must be at least 2; a spread needs two")
