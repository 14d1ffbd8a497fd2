from dataclasses import replace

import pytest
import torch

from dit_moe.metrics import FeatureMoments, FeatureSet


def make(count=100, classes=10):
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(count, 4, generator=draw)
    return FeatureSet("set", count, features_ND=features, labels_N=torch.arange(count) % classes)


@pytest.mark.parametrize("order", ["cyclic", "sorted", "shuffled"])
def test_thinning_keeps_the_mix_of_classes_in_any_order(order):
    labels = {
        "cyclic": torch.arange(900) % 10,
        "sorted": (torch.arange(900) % 10).sort().values,
        "shuffled": (torch.arange(900) % 10)[torch.randperm(900, generator=torch.Generator().manual_seed(0))],
    }[order]
    counts = FeatureSet("set", 900, labels_N=labels).thinned(450).labels_N.bincount(minlength=10)
    assert (counts - 45).abs().max() <= (1 if order == "sorted" else 12)  # a draw of 45 of 90 has a std of 4.5


def test_thinning_takes_the_same_rows_of_everything_and_leaves_a_set_of_that_size_alone():
    whole = make()
    thin = whole.thinned(7)
    rows = [(whole.features_ND == row).all(1).nonzero().item() for row in thin.features_ND]
    assert rows == sorted(set(rows)) and rows[0] == 0 and rows[-1] == 99 and thin.count == 7
    assert torch.equal(thin.labels_N, whole.labels_N[rows]) and whole.thinned(100) is whole


def test_given_moments_go_before_those_of_the_features():
    given = FeatureMoments(None, torch.zeros(4), torch.eye(4))
    images = make()
    both = FeatureSet("set", 100, features_ND=images.features_ND, given_moments=given)
    assert both.moments is given and images.moments.n == 100 and images.spatial_moments is None
    assert images.known == {"features_ND", "labels_N", "moments"}


def test_what_metrics_keep_of_a_set_is_not_another_sets():
    whole = make()
    whole.kept["x"] = torch.zeros(1)
    assert whole.thinned(7).kept == {} and replace(whole, source="other").kept == {} and make().kept == {}


@pytest.mark.parametrize("row", [0, 1023, 1024, 2999])
def test_a_value_that_is_not_finite_is_found_wherever_it_stands(row):
    rows = torch.zeros(3000, 2)
    rows[row, 1] = torch.inf
    with pytest.raises(ValueError, match=rf"set: sample {row} has NaN or infinity among its features"):
        FeatureSet("set", 3000, features_ND=rows).finite("features_ND")
