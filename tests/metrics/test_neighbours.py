import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_moe.metrics import nearest_distances


@settings(max_examples=40)
@given(
    n=st.integers(1, 23), m=st.integers(3, 40), k=st.integers(1, 3), tile=st.integers(1, 50), seed=st.integers(0, 999)
)
def test_tiled_distances_equal_brute_force(n, m, k, tile, seed):
    random = torch.Generator().manual_seed(seed)
    queries, references = (torch.randn(rows, 5, generator=random) for rows in (n, m))
    expected = (queries[:, None].double() - references.double()).square().sum(-1).sqrt().sort(1).values[:, :k]
    # only the order of five additions differs
    torch.testing.assert_close(nearest_distances(queries, references, k, tile), expected, rtol=1e-13, atol=0)


def test_a_copy_is_at_distance_zero_exactly_even_far_from_the_origin():
    references = torch.randn(100, 64) + 1e4
    assert (nearest_distances(references[7:9], references) == 0).all()


def test_uint8_pixels_do_not_wrap_around():
    queries, references = torch.tensor([[0]], dtype=torch.uint8), torch.tensor([[255]], dtype=torch.uint8)
    assert nearest_distances(queries, references).item() == 255


def test_widths_that_differ_too_few_references_and_squares_that_overflow_are_refused():
    with pytest.raises(ValueError, match="queries are 3 wide and references 4"):
        nearest_distances(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="k=3 nearest of 2 references"):
        nearest_distances(torch.zeros(2, 3), torch.zeros(2, 3), k=3)
    with pytest.raises(ValueError, match="squares overflow"):
        nearest_distances(1e200 * torch.eye(3).double(), torch.eye(3))


@pytest.mark.parametrize(
    "name, spread, copies",
    [("near-ties for float32", 3e-8, 1), ("near-ties for float64", 5e-15, 1), ("ties", 0.0, 1), ("repeats", 1.0, 30)],
)
def test_near_ties_ties_and_repeats_give_exact_distances(name, spread, copies):
    # More references than there are candidates lie at one distance from each query, up to `spread`.
    random = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(60, 8, generator=random, dtype=torch.float64))
    references = (directions * (1 + spread * torch.rand(60, 1, generator=random))).repeat(copies, 1)
    queries = torch.cat([torch.zeros(2, 8, dtype=torch.float64), references[:3]])
    exact = (queries[:, None] - references).square().sum(-1).sqrt().sort(1).values
    for k in (1, 2):
        found = nearest_distances(queries, references, k, tile=16)
        torch.testing.assert_close(found, exact[:, :k], rtol=5e-16, atol=0)  # eight squares in another order


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("apart", [1e3, 3e3, 1e4, 1e7])
def test_neighbours_much_nearer_than_the_set_is_wide_are_found_all_the_same(apart, k):
    # Two far clusters: in float32 the products of matrices are off by as much as distances within one differ.
    random = torch.Generator().manual_seed(0)
    references, queries = (torch.randn(n, 8, generator=random, dtype=torch.float64) + apart for n in (300, 200))
    references[::2] -= 2 * apart
    exact = (queries[:, None] - references).square().sum(-1).sqrt().sort(1).values[:, :k]
    torch.testing.assert_close(nearest_distances(queries, references, k), exact, rtol=1e-14, atol=0)
