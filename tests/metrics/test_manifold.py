import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_fidelity.metric_prc import prc_features_to_metric

from dit_moe.metrics import METRICS, FeatureSet, manifold
from dit_moe.metrics.manifold import density_coverage, precision_recall, squared_radii


def normal(n, d, seed, scale=1.0):
    return scale * torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n, m, save_cpu_ram", [(600, 600, False), (200, 600, True), (600, 201, False)])
def test_precision_and_recall_equal_torch_fidelitys(n, m, save_cpu_ram):
    samples, reference = normal(n, 16, 1, scale=0.8), normal(m, 16, 2)
    options = {"prc_neighborhood": 3, "prc_batch_size": 10_000, "save_cpu_ram": save_cpu_ram, "verbose": False}
    oracle = prc_features_to_metric(samples, reference, **options)
    found = precision_recall(samples, reference)
    assert found.precision == pytest.approx(oracle["precision"], abs=1e-6)  # of means that it takes in float32
    assert found.recall == pytest.approx(oracle["recall"], abs=1e-6)
    assert found.precision != found.recall  # so that the order of the arguments shows


def distances(a, b):
    return (a[:, None].double() - b.double()).square().sum(-1).sqrt()


sizes = {"n": st.integers(6, 40), "m": st.integers(6, 40), "tile": st.integers(1, 50), "seed": st.integers(0, 999)}


@settings(max_examples=40)
@given(**sizes, k=st.integers(1, 5))
def test_tiles_of_any_size_give_the_definitions(n, m, tile, seed, k):
    samples, reference = normal(n, 3, seed), normal(m, 3, seed + 1000)
    own_N, own_M = (distances(each, each).sort(1).values[:, k] for each in (samples, reference))
    between_NM = distances(samples, reference)
    precision = (between_NM <= own_M).any(1).double().mean().item()
    recall = (between_NM <= own_N[:, None]).any(0).double().mean().item()
    assert precision_recall(samples, reference, k, tile) == pytest.approx((precision, recall), abs=1e-12)
    density = (between_NM < own_M).sum().item() / (k * n)
    coverage = (between_NM < own_M).any(0).double().mean().item()
    assert density_coverage(samples, reference, k, tile) == pytest.approx((density, coverage), abs=1e-12)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_repeated_points_are_at_distance_zero_exactly_even_far_from_the_origin(offset):
    rows = (normal(20, 64, 0) + offset).repeat(5, 1)
    assert (squared_radii(rows, 4, tile=7) == 0).all()
    assert (squared_radii(rows, 5, tile=7)[:, 4] > 1).all()
    assert precision_recall(rows, rows, k=3, tile=7) == (1, 1)  # every ball is a point
    assert precision_recall(rows + 0.01, rows, k=3, tile=7) == (0, 0)


@pytest.mark.parametrize("offset, k", [(0.0, 5), (1e3, 1), (1e3, 5)])
def test_a_set_against_itself_has_ideal_values_whatever_the_rounding(offset, k):
    rows = normal(300, 48, 3) + offset
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))  # other tiles, so that sums round otherwise
    assert precision_recall(rows[order], rows, k, tile=32) == (1, 1)
    assert density_coverage(rows[order], rows, k, tile=32) == (1, 1)


def test_points_on_the_border_are_inside_for_precision_and_outside_for_density():
    reference, samples = torch.tensor([[0.0], [1.0], [2.0], [3.0]]), torch.tensor([[4.0], [50.0], [60.0]])
    assert precision_recall(samples, reference, k=1).precision == pytest.approx(1 / 3)
    assert density_coverage(samples, reference, k=1) == (0, 0)
    repeated = normal(8, 3, 0).repeat(2, 1)  # balls of radius 0
    assert precision_recall(repeated, repeated, k=1) == (1, 1)
    assert density_coverage(repeated, repeated, k=1) == (0, 0)


def test_neighbours_of_a_set_are_looked_up_once_for_both_metrics_and_all_samples(monkeypatch):
    counted, lookup = [], manifold.squared_radii
    monkeypatch.setattr(
        manifold, "squared_radii", lambda rows, *a, **k: (counted.append(len(rows)), lookup(rows, *a, **k))[1]
    )
    reference = FeatureSet("reference.npz", 30, features_ND=normal(30, 2, 0))
    for seed in (1, 2):
        samples = FeatureSet("made.npz", 20, features_ND=normal(20, 2, seed))
        for name in ("precision_recall", "density_coverage"):
            METRICS.build(METRICS.config_class(name)())(samples, reference)
    assert sorted(counted) == [20, 20, 30]


@pytest.mark.parametrize("apart", [1e3, 1e5])
def test_balls_much_smaller_than_the_set_is_wide_are_compared_exactly(apart):
    # Two far clusters: products of matrices are off by up to 1e-15 of the squared width.
    sides = []
    for seed, shift in ((1, 1.5), (2, 0.0)):
        rows = torch.randn(120, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift
        rows[::2] += apart
        sides.append(rows)
    samples, reference = sides
    own_N, own_M = (distances(each, each).sort(1).values[:, 3] for each in sides)
    between_NM = distances(samples, reference)
    precision, recall = (between_NM <= own_M).any(1), (between_NM <= own_N[:, None]).any(0)
    found = precision_recall(samples, reference, k=3, tile=50)
    assert found == pytest.approx((precision.double().mean().item(), recall.double().mean().item()), abs=1e-12)
    inside_NM = between_NM < own_M
    dense = density_coverage(samples, reference, k=3, tile=50)
    expected = inside_NM.sum().item() / 360, inside_NM.any(0).double().mean().item()
    assert dense == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "name, metric, k", [("precision_recall", precision_recall, 3), ("density_coverage", density_coverage, 5)]
)
def test_precision_and_recall_have_3_neighbours_and_density_and_coverage_5_unless_told(name, metric, k):
    samples, reference = normal(200, 8, 1), normal(200, 8, 2)
    told, built = metric(samples, reference, k), METRICS.build(METRICS.config_class(name)())
    assert metric(samples, reference) == told and built.settings() == {"k": k}
    assert tuple(built(*(FeatureSet("set", 200, features_ND=each) for each in (samples, reference))).values()) == told
    assert metric(samples, reference, k - 1) != told != metric(samples, reference, k + 1)
