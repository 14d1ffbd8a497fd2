"""What a metric is: features of two sets of images → numbers. It knows neither images nor where they come from."""

# N images, D feature width, S spatial feature width, K classes, P pixels of a thumbnail

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from dit_moe.metrics.moments import FeatureMoments, check_rows
from dit_moe.registry import Registry

METRICS = Registry("metric")
# of a FeatureSet, a row an image
TENSORS = ("features_ND", "spatial_NS", "logits_NK", "predictions_N", "labels_N", "thumbnails_NP")


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """What is known of a set of images; None where it is not. All tensors are on the CPU.

    A set read from a file of statistics has moments only.
    """

    source: str  # where the images come from; messages begin with it
    count: int | None  # None: statistics that do not say of how many images
    features_ND: Tensor | None = None
    spatial_NS: Tensor | None = None
    logits_NK: Tensor | None = None
    predictions_N: Tensor | None = None  # int64: the classes that are seen, if they are those of the labels
    labels_N: Tensor | None = None  # int64: the classes that were asked for
    thumbnails_NP: Tensor | None = None  # uint8: the pixels, of larger images averaged to 32×32
    given_moments: FeatureMoments | None = None
    given_spatial_moments: FeatureMoments | None = None
    kept: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)  # what metrics share; not replaced

    @cached_property
    def moments(self) -> FeatureMoments | None:
        """Of the features; what a file of statistics gives goes first."""
        return self.given_moments or self._moments_of("features_ND")

    @cached_property
    def spatial_moments(self) -> FeatureMoments | None:
        return self.given_spatial_moments or self._moments_of("spatial_NS")

    def _moments_of(self, name: str) -> FeatureMoments | None:
        return None if getattr(self, name) is None else FeatureMoments.of(self.finite(name))

    def finite(self, name: str) -> Tensor:
        """The tensor `name`, which must be there. ValueError, naming the source, if it holds NaN or infinity."""
        rows: Tensor = getattr(self, name)
        try:
            check_rows(rows, name.partition("_")[0])
        except ValueError as error:
            raise ValueError(f"{self.source}: {error}") from None
        return rows

    @property
    def known(self) -> frozenset[str]:
        """The attributes that metrics may need and that are not None."""
        return frozenset(name for name in (*TENSORS, "moments", "spatial_moments") if getattr(self, name) is not None)

    def thinned(self, n: int) -> FeatureSet:
        """n of the images, evenly spaced, so that the mix of classes stays, be they sorted, cyclic or shuffled."""
        if n == self.count:
            return self
        assert self.count is not None and self.given_moments is None, "statistics cannot be thinned"
        rows = torch.linspace(0, self.count - 1, n, dtype=torch.float64).round().long()
        kept: dict[str, Any] = {
            name: None if (tensor := getattr(self, name)) is None else tensor[rows] for name in TENSORS
        }
        return replace(self, count=n, **kept)


def configs_of(names: Iterable[str]) -> list[object]:
    """Of the metrics of these names, with no option changed."""
    return [METRICS.config_class(name)() for name in names]


class Metric(ABC):
    """Built with its config and a device to compute on; then called with what it `needs` being there on both sides."""

    needs: ClassVar[frozenset[str]] = frozenset({"features_ND"})
    """Attributes of both `FeatureSet`s that must not be None."""
    needs_of_samples: ClassVar[frozenset[str]] = frozenset()
    """Attributes of the samples alone."""
    values: ClassVar[tuple[str, ...] | None] = None
    """Names of all numbers that it may give; None: it does not say, and they are known once it was computed."""
    better: ClassVar[str | None] = "lower"
    """Or "higher", or None where neither is."""

    def __init__(self, config: Any, device: torch.device | str = "cpu") -> None:
        self.config, self.device = config, device

    @abstractmethod
    def __call__(self, samples: FeatureSet, reference: FeatureSet) -> dict[str, float]:
        """JSON-ready numbers under their names, the metric's main one first. One that says nothing is left out."""

    def check(self, samples: int, reference: int | None) -> None:  # noqa: B027 (most metrics take any number)
        """ValueError, naming the option that helps, unless it can be computed of so many images: before the work."""

    def in_feature_space(self, value: str) -> bool:
        """Whether the number named `value` depends on the feature space, whose name then stands in its key."""
        return True

    def notes(self, samples: FeatureSet, reference: FeatureSet) -> list[str]:
        """What a reader of its numbers has to know about them, for sets of these sizes."""
        return []

    def settings(self) -> dict[str, Any]:
        """JSON-ready: all that decides its numbers beside the features; its config, unless there is more to say."""
        return asdict(self.config)
