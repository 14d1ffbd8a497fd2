"""When a result may stand beside published numbers: what is asked of its conditions, and where they come from."""

import json
from dataclasses import replace

import pytest
import torch

from dit_moe.evaluation.comparability import (
    Conditions,
    Reason,
    conditions_of,
    reasons_not_comparable,
    reasons_of_storage,
)
from dit_moe.evaluation.recipes import ADM_50K
from dit_moe.evaluation.runs import GeneratedSource, require_seeds_of_one
from dit_moe.evaluation.sources import open_input
from dit_moe.evaluation.sources.base import EvaluationInput, ReadOptions, Source, Statistics
from dit_moe.metrics import METRICS, FeatureMoments
from dit_moe.metrics.manifold import PrecisionRecallConfig
from tests.data.examples import encoded, pixels, write_tree

# --------------------------------------------------------------------------------------------------- of conditions

BY_THE_BOOK = Conditions(
    extractor="inception",
    is_fid=True,
    metrics=ADM_50K.metrics,
    changed_metrics=(),
    n_generated=50_000,
    seeds=1,
    image_shape=(3, 256, 256),
    altered=(),
    reference_statistics=True,
    reference_count=50_000,
    reference_images=10_000,
    reference_side=256,
    labels="random",
    weights="ema",
    precision="fp32",
    compute_budget=None,
)
BIG = {"image_shape": (3, 512, 512), "reference_side": 512}
UNSAID = {"labels": None, "weights": None, "precision": None, "reference_count": None}


@pytest.mark.parametrize("change", [{}, BIG, UNSAID, {"metrics": ("fd",), "reference_images": 5}], ids=json.dumps)
def test_a_result_by_the_book_is_comparable(change):
    assert reasons_not_comparable(replace(BY_THE_BOOK, **change)) == []


OF_50K, AT_RANDOM = "generated images instead of 50 000", "published baselines draw the classes at random"
DEVIATIONS = [  # the change, its reason, and what is left of it in a footnote for many results, if that is less
    ({"is_fid": False, "extractor": "a"}, "the features are those of a, not of the verified Inception"),
    ({"n_generated": 5_000}, f"5 000 {OF_50K}", "another number of generated images than 50 000"),
    ({"n_generated": None}, "the number of generated images is not known"),
    (
        {"seeds": 3},
        "the mean over 3 sampling seeds, published numbers are of one",
        "the mean over several sampling seeds, published numbers are of one",
    ),
    ({"image_shape": None}, "the size of the generated images is not known"),
    (
        {"image_shape": (3, 256, 512)},
        "images of 256×512 pixels instead of 256×256 or 512×512",
        "images of another size than 256×256 or 512×512",
    ),
    (
        {"reference_side": 512},
        "images of 256×256 pixels against a reference of 512×512",
        "images of another size than the reference's",
    ),
    ({"image_shape": (1, 256, 256)}, "images of 1 channel instead of 3"),
    ({"altered": ["resized to 256"]}, "the images were altered: resized to 256"),
    ({"changed_metrics": ["pr with k=5"]}, "computed otherwise than published numbers: pr with k=5"),
    ({"reference_statistics": False}, "the reference's statistics were computed here, not published with it"),
    (
        {"statistics_unused": True},
        "the reference's statistics are of another network; its images were used in their place",
    ),
    (
        {"reference_count": 10_000},
        "the reference's statistics are of 10 000 images",
        "the reference's statistics are of too few images",
    ),
    (
        {"reference_images": 0, "reference_side": None},
        "the reference holds no images that would tell its resolution",
    ),
    (
        {"reference_images": 9_000},
        "precision and recall against 9 000 reference images instead of 10 000",
        "precision and recall against another number of reference images than 10 000",
    ),
    ({"labels": "balanced"}, f"as many images of each class; {AT_RANDOM}"),
    ({"labels": "data"}, f"labels as frequent as in the training data; {AT_RANDOM}"),
    ({"labels": "listed"}, f"labels of listed classes; {AT_RANDOM}"),
    (
        {"weights": "model"},
        "sampled with the weights as they are, published baselines with their moving average (EMA)",
    ),
    ({"precision": "bf16"}, "sampled in bf16 instead of fp32"),
    (
        {"compute_budget": "p=[0.3, 0.9] by time"},
        "sampled with p=[0.3, 0.9] by time instead of as trained",
        "sampled with another number of active experts than as trained",
    ),
    (
        {"identical": [Reason.plain("a and the reference are the same images")]},
        "a and the reference are the same images",
    ),
    (
        {"identical": [Reason.of("in the reference", found=3, count=9, name="a")]},
        "3 of 9 images of a are also in the reference",
        "images of the reference among the generated ones",
    ),
    (
        {"identical": [Reason.of("equal images", found=1, count=9, name="a")]},
        "only 1 of 9 images of a differ from each other",
        "generated images that are equal to each other",
    ),
]


@pytest.mark.parametrize("deviation", DEVIATIONS, ids=lambda each: str(each[0])[:40])
def test_each_deviation_is_a_reason_of_its_own_which_a_result_gives_back(deviation):
    change, reason, *general = deviation
    wanted = Reason(reason, *(general or [reason]))
    assert reasons_not_comparable(replace(BY_THE_BOOK, **change)) == [wanted]
    assert Reason.read(reason) == wanted


def test_all_reasons_are_listed_and_each_change_to_the_images_is_one():
    changed = {"is_fid": False, "n_generated": 100, "seeds": 2, "image_shape": (1, 8, 8), "reference_side": 16}
    changed |= {"altered": ["resized to 8", "grey"], "changed_metrics": ["a", "b"], "labels": "data"}
    changed |= {"reference_statistics": False, "reference_count": 9, "reference_images": 9}
    changed |= {"weights": "model", "precision": "bf16", "compute_budget": "p=0.9"}
    reasons = reasons_not_comparable(replace(BY_THE_BOOK, **changed))
    assert len(reasons) == len(set(reasons)) == 6 + 4 + 3 + 4


def test_statistics_against_statistics_give_no_impossible_reason():
    bare = {"n_generated": None, "image_shape": None, "reference_images": 0, "reference_side": None}
    texts = [reason.text for reason in reasons_not_comparable(replace(BY_THE_BOOK, **bare))]
    assert len(texts) == 3 and not any(character.isdigit() for text in texts for character in text)


# ------------------------------------------------------------------------------------------------ where they come from


class Images(Source):
    """`count` images without content."""

    def __init__(self, count=50_000, side=256, channels=3, labels_N=None, **sample):
        self.name, self.count, self.image_shape = "images", count, (channels, side, side)
        self.labels_N, self.sample = labels_N, sample

    def __len__(self):
        return self.count

    def identity(self):
        return {"kind": "empty"}

    def facts(self):
        return {"sample": {"experiment": {"sample": self.sample}}} if self.sample else {}

    def batches(self, parts):
        return iter(())


def statistics(n=None, extractor=None):
    moments = FeatureMoments(n, torch.zeros(3), torch.eye(3))
    return Statistics("adm.npz", "0", moments, moments, extractor)


PUBLISHED = {"labels": "random", "weights": "ema", "precision": "fp32", "target": None}
ADM = EvaluationInput(source=Images(10_000), statistics=statistics())
METRIC_CONFIGS = [METRICS.config_class(name)() for name in ADM_50K.metrics]


def reasons(samples=None, reference=ADM, metrics=METRIC_CONFIGS, options=ReadOptions(), **space):  # noqa: B008 (frozen)
    samples = [EvaluationInput(source=Images(**PUBLISHED))] if samples is None else samples
    found = conditions_of(samples, reference, metrics, options=options, **space)
    return [reason.text for reason in reasons_not_comparable(found)]


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


SAMPLED = ({"labels": "balanced"}, {"labels": [207]}, {"weights": "model"}, {"precision": "bf16"}, {"count": 10_000})


@pytest.mark.parametrize(
    "case",
    [
        *({"samples": [EvaluationInput(source=Images(**PUBLISHED | change))]} for change in SAMPLED),
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


@pytest.mark.parametrize(
    "form, side, said",
    [
        ("PNG", 8, None),
        ("JPEG", 8, "the generated images are JPEG, and those of the reference PNG"),
        ("JPEG PNG", 8, "the generated images are JPEG and PNG, and those of the reference PNG"),
        ("PNG", 12, "the generated images are PNG, resized from 12×12, and those of the reference PNG"),
    ],
)
def test_images_stored_or_read_otherwise_than_the_reference_are_said_and_are_not_comparable(form, side, said, tmp_path):
    files = {f"r/{i}.png": encoded(pixels(i, 8, 8)) for i in range(2)}
    forms = zip(range(9, 11), form.split() * 2, strict=False)
    files |= {f"s/{i}.{each.lower()}": encoded(pixels(i, side, side), each) for i, each in forms}
    write_tree(tmp_path, files)
    options = ReadOptions(size=8)
    sides = [open_input(str(tmp_path / name), options) for name in ("s", "r")]
    found = conditions_of(sides[:1], sides[1], [], options=options)
    assert [each.text for each in reasons_of_storage(found)] == ([] if said is None else [said])
    assert said is None or said in [each.text for each in reasons_not_comparable(found)]
