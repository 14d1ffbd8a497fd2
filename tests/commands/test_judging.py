"""When a result may stand beside published numbers."""

from dataclasses import replace

import pytest
import torch

from dit_moe.evaluation.comparability import reasons_not_comparable
from dit_moe.evaluation.recipes import ADM_50K
from dit_moe.evaluation.runs import require_seeds_of_one
from dit_moe.evaluation.sources.base import EvaluationInput, ReadOptions, Source, Statistics
from dit_moe.evaluation.sources.generated import GeneratedSource
from dit_moe.metrics import METRICS, GivenMoments
from dit_moe.metrics.manifold import PrecisionRecallConfig


class Images(Source):
    """So many images of nothing."""

    def __init__(self, count=50_000, side=256, channels=3, labels_N=None, **sample):
        self.name, self.count, self.image_shape = "images", count, (channels, side, side)
        self.labels_N, self.sample = labels_N, sample

    def __len__(self):
        return self.count

    def identity(self):
        return {"kind": "nothing"}

    def facts(self):
        return {"sample": {"experiment": {"sample": self.sample}}} if self.sample else {}

    def batches(self, parts):
        return iter(())


def statistics(n=None, extractor=None):
    moments = GivenMoments(n, torch.zeros(3), torch.eye(3))
    return Statistics("adm.npz", "0", moments, moments, extractor)


PUBLISHED = {"labels": "random", "weights": "ema", "precision": "fp32", "target": None}
ADM = EvaluationInput(source=Images(10_000), statistics=statistics())
METRIC_CONFIGS = [METRICS.config_class(name)() for name in ADM_50K.metrics]


def reasons(samples=None, reference=ADM, metrics=METRIC_CONFIGS, options=ReadOptions(), **space):  # noqa: B008 (frozen)
    samples = [EvaluationInput(source=Images(**PUBLISHED))] if samples is None else samples
    space = {"extractor": "inception", "is_fid": True} | space
    return reasons_not_comparable(samples, reference, metrics, options=options, **space)


def test_what_was_sampled_and_measured_as_published_is_comparable():
    assert reasons() == []


@pytest.mark.parametrize(
    ("sample", "shown"),
    [
        ({"target": 1.5}, "target=1.5"),
        ({"target": [1.0, 2.0]}, "target=[1, 2] by layer"),
        ({"p": 0.95}, "p=0.95"),
        ({"p": [0.5, 0.9], "vary": "time"}, "p=[0.5, 0.9] by time"),
    ],
)
def test_another_compute_budget_than_trained_is_told_however_it_was_set(sample, shown):
    images = EvaluationInput(source=Images(**{**PUBLISHED, **sample}))
    assert reasons([images]) == [f"sampled with {shown} instead of as trained"]


def test_images_of_which_nothing_else_is_known_are_taken_as_published_unless_their_labels_tell_otherwise():
    drawn = torch.randint(1000, (50_000,), generator=torch.Generator().manual_seed(0))
    assert reasons([EvaluationInput(source=Images(labels_N=drawn))]) == []
    for labels_N in (torch.arange(50_000) % 1000, torch.zeros(50_000, dtype=torch.int64)):
        assert len(reasons([EvaluationInput(source=Images(labels_N=labels_N))])) == 1


@pytest.mark.parametrize(
    "case",
    [
        {"samples": [EvaluationInput(source=Images(**PUBLISHED | change))]}
        for change in (
            {"labels": "balanced"},
            {"labels": "data"},
            {"labels": [207]},
            {"weights": "model"},
            {"precision": "bf16"},
            {"target": 1.5},
            {"count": 10_000},
            {"side": 64},
        )
    ]
    + [
        {"samples": [EvaluationInput(source=Images(**PUBLISHED))] * 3},
        {"samples": [EvaluationInput(statistics=statistics())]},
        {"reference": EvaluationInput(source=Images(10_000))},
        {"reference": EvaluationInput(statistics=statistics())},
        {"reference": replace(ADM, statistics=statistics(n=300))},
        {"reference": replace(ADM, statistics=statistics(extractor={"name": "inception"}))},
        {"reference": replace(ADM, source=Images(5_000))},
        {"reference": replace(ADM, source=Images(10_000, side=512))},
        {"options": ReadOptions(size=256)},
        {"options": ReadOptions(channels=3)},
        {"options": ReadOptions(value_range=(-1.0, 1.0))},
        {"metrics": [PrecisionRecallConfig(k=5)]},
        {"is_fid": False},
    ],
)
def test_every_deviation_is_a_reason(case):
    assert reasons(**case)


def test_runs_that_differ_in_more_than_the_seed_are_no_sampling_seeds_of_one():
    def run(**changes):
        source = GeneratedSource.__new__(GeneratedSource)
        source.identity = lambda: {"weights_sha256": "a", "experiment": {"sample": {"seed": 0}}} | changes
        return EvaluationInput(source=source)

    other_seed = run(experiment={"sample": {"seed": 1}}, labels_sha256="b")
    require_seeds_of_one([run(), other_seed])
    require_seeds_of_one([run(), EvaluationInput(source=Images())])
    with pytest.raises(ValueError, match=r"differ in weights_sha256; evaluate them one by one"):
        require_seeds_of_one([run(), run(weights_sha256="b")])
