from dataclasses import dataclass, replace

import pytest

from dit_moe.evaluation.comparison import Comparison
from dit_moe.evaluation.sources.base import EvaluationInput, Statistics
from dit_moe.metrics import METRICS, FeatureMoments, Metric

from .fakes import NoiseSource, PixelExtractor


def given(source, extractor, spatial=True):
    """Statistics of a source, as a published file has them: without a word on their network."""
    features_BD, spatial_BS = extractor(source.images)
    both = [FeatureMoments.of(rows) for rows in (features_BD, spatial_BS)]
    moments, of_spatial = (FeatureMoments(None, each.mean_D, each.covariance()) for each in both)
    return Statistics("adm.npz", "0", moments, of_spatial if spatial else None, None)


def configs(*names):
    return [METRICS.config_class(name)() for name in names]


def compared(reference, *samples, metrics=None, **options):
    comparison = Comparison(reference, PixelExtractor(), metrics, **options)
    return comparison.evaluate([EvaluationInput(source=each) for each in samples]).to_json()


def test_a_reference_of_statistics_and_images_gives_each_metric_its_own():
    many, few = NoiseSource(count=400, seed=1), NoiseSource(count=60, seed=2)
    reference = EvaluationInput(source=few, statistics=given(many, PixelExtractor()))
    report = compared(reference, NoiseSource(), metrics=configs("fd", "sfd", "precision_recall"))
    of_many = compared(EvaluationInput(source=many), NoiseSource(), metrics=configs("fd", "sfd"))
    of_few = compared(EvaluationInput(source=few), NoiseSource(), metrics=configs("precision_recall"))
    for key in ("fd_pixels", "sfd_pixels"):
        assert report[key]["generated"] == pytest.approx(of_many[key]["generated"])
        assert report[key]["n_reference"] is None
    assert report["precision_pixels"] == of_few["precision_pixels"]
    facts = report["provenance"]
    assert (facts["n_ref_images"], facts["n_ref_statistics"]) == (60, None)
    assert facts["reference"]["statistics"]["distance_of_its_images"] > 0


def test_statistics_of_another_network_are_passed_over_for_the_images_beside_them():
    other = PixelExtractor(dim=7)
    reference = EvaluationInput(source=NoiseSource(seed=2), statistics=given(NoiseSource(seed=1), other))
    report = compared(reference, NoiseSource(), metrics=configs("fd"))
    of_images = compared(EvaluationInput(source=NoiseSource(seed=2)), NoiseSource(), metrics=configs("fd"))
    assert report["fd_pixels"] == of_images["fd_pixels"]
    assert any("its images are used in place of its statistics" in note for note in report["warnings"])
    lacking = given(NoiseSource(seed=1), PixelExtractor(), spatial=False)  # the images stand in for no part of them
    with pytest.raises(ValueError, match="sfd needs spatial features"):
        compared(replace(reference, statistics=lacking), NoiseSource(), metrics=configs("fd", "sfd"))


@pytest.mark.parametrize("statistics", [False, True])
def test_features_of_the_reference_are_made_once_and_statistics_to_be_saved_hold_all_there_is(statistics):
    reference = NoiseSource(count=50, seed=2)
    options = {"statistics": statistics}
    comparison = Comparison(EvaluationInput(source=reference), PixelExtractor(), configs("fd"), **options)
    first = comparison.evaluate([EvaluationInput(source=NoiseSource())])
    assert comparison.evaluate([EvaluationInput(source=NoiseSource())]).distances == first.distances
    assert sorted(reference.asked) == list(range(50))
    [made] = comparison.features([EvaluationInput(source=NoiseSource())])
    assert (made.features.spatial_moments is not None) == statistics


def test_kept_features_survive_an_interruption_and_nothing_is_made_twice(tmp_path):
    class Fails(NoiseSource):
        def batches(self, parts):
            for i, images in enumerate(super().batches(parts)):
                if i == 2:
                    raise OSError("the disk is gone")
                yield images

    reference = EvaluationInput(source=NoiseSource(count=50, seed=2))
    with pytest.raises(OSError, match="the disk is gone"):
        compared(reference, Fails(), metrics=configs("fd"), folder=tmp_path)
    source, again = NoiseSource(), NoiseSource(count=50, seed=2)
    report = compared(EvaluationInput(source=again), source, metrics=configs("fd"), folder=tmp_path)
    assert source.asked == list(range(64, 100)) and again.asked == []
    assert report["fd_pixels"] == compared(reference, NoiseSource(), metrics=configs("fd"))["fd_pixels"]


def test_nothing_is_left_behind_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    compared(EvaluationInput(source=NoiseSource(seed=2)), NoiseSource())
    assert list(tmp_path.iterdir()) == []


class ChosenImages(NoiseSource):
    """Some images of noise, by their number in a set of 200, in this order."""

    def __init__(self, rows, name="noise"):
        super().__init__(count=200)
        self.images, self.labels_N, self.name, self.rows = self.images[rows], None, name, list(rows)

    def identity(self):
        return {"kind": "chosen", "name": self.name, "rows": self.rows}


@pytest.mark.parametrize(
    "chosen, said",
    [
        ([range(199, 99, -1)], ["0 and the reference are the same images"]),  # in another order
        ([[*range(97), 150, 160, 170]], ["3 of 100 images of 0 are also in the reference"]),
        ([range(150, 160)], ["10 of 10 images of 0 are also in the reference"]),
        ([[7] * 50], ["only 1 of 50 images of 0 differ from each other"]),
        ([range(90), range(90)], ["1 is among the samples twice: the same images"]),
        ([range(90), range(88, 100)], ["2 of 12 images of 1 are also in 0"]),
        ([range(90)], []),
    ],
    ids=str,
)
def test_samples_that_are_in_the_reference_or_equal_to_each_other_are_counted_and_not_comparable(chosen, said):
    reference = EvaluationInput(source=ChosenImages(range(100, 200), "reference"))
    samples = [EvaluationInput(source=ChosenImages(rows, str(i))) for i, rows in enumerate(chosen)]
    report = Comparison(reference, PixelExtractor(), configs("fd")).evaluate(samples)
    assert report.provenance.identical == said
    assert set(said) <= set(report.warnings) & {each.text for each in report.provenance.reasons}


def test_held_out_images_that_are_in_the_reference_are_counted_and_refused_where_it_is_all_of_them():
    def evaluate(rows):
        heldout = ChosenImages(rows, "heldout")
        reference = EvaluationInput(source=ChosenImages(range(100, 200), "reference"), heldout=heldout)
        comparison = Comparison(reference, PixelExtractor(), configs("fd"))
        return comparison.evaluate([EvaluationInput(source=ChosenImages(range(50), "samples"))])

    assert "2 of 50 held-out images are in the reference, so the floor reads low" in evaluate(range(52, 102)).warnings
    with pytest.raises(ValueError, match=r"all 50 held-out images, heldout, are in the reference; hold out images"):
        evaluate(range(120, 170))


class Picky(Metric):
    """Refuses every count."""

    def __call__(self, samples, reference):
        return {}

    def check(self, samples, reference):
        raise ValueError(f"picky refuses {samples} against {reference}")


@dataclass(frozen=True)
class PickyConfig:
    """No options."""


@pytest.mark.parametrize("needs, message", [("moments", "refuses 100 against 60"), ("thumbnails_NP", "needs pixels")])
def test_a_metric_of_ones_own_is_asked_before_the_work_whatever_it_needs(needs, message, monkeypatch):
    monkeypatch.setattr(METRICS, "_entries", {**METRICS._entries, "picky": (Picky, PickyConfig)})
    monkeypatch.setattr(Picky, "needs", frozenset({needs}))
    images, source = NoiseSource(count=60, seed=2), NoiseSource()
    alone = EvaluationInput(statistics=given(images, PixelExtractor()))
    with pytest.raises(ValueError, match=message):
        compared(EvaluationInput(source=images) if needs == "moments" else alone, source, metrics=[PickyConfig()])
    assert source.asked == []


@pytest.mark.parametrize("needed", ["thumbnails_NP", "spatial_NS", "spatial_moments", "labels_N"])
def test_what_a_metric_of_ones_own_needs_of_samples_alone_is_read(needed, monkeypatch):
    monkeypatch.setattr(METRICS, "_entries", {**METRICS._entries, "picky": (Picky, PickyConfig)})
    monkeypatch.setattr(Picky, "needs", frozenset())
    monkeypatch.setattr(Picky, "needs_of_samples", frozenset({needed}))
    monkeypatch.setattr(Picky, "check", lambda *counts: None)
    monkeypatch.setattr(
        Picky, "__call__", lambda self, samples, reference: {"there": getattr(samples, needed) is not None}
    )
    report = compared(EvaluationInput(source=NoiseSource(seed=2)), NoiseSource(), metrics=[PickyConfig()])
    assert report["there_pixels"] == 1


@pytest.mark.parametrize("named", ["class_names", "model_classes"])
def test_classes_are_those_of_the_extractor_by_name_and_not_by_their_number_alone(named):
    known, sorted_otherwise = ("airplane", "automobile", "bird"), ("bird", "car", "plane")
    samples, extractor = NoiseSource(), PixelExtractor(classes=3, class_names=known)
    samples.labels_N = samples.labels_N % 3
    comparison = Comparison(EvaluationInput(source=NoiseSource(seed=2)), extractor, configs("class_accuracy"))
    setattr(samples, named, sorted_otherwise)
    with pytest.raises(ValueError, match="noise has the class bird, number 0, which is airplane to pixels; name the"):
        comparison.check([EvaluationInput(source=samples)])
    for names in (known, tuple("012"), None):
        setattr(samples, named, names)
        comparison.check([EvaluationInput(source=samples)])
