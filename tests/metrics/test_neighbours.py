import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_moe.metrics import nearest_distances


@settings(max_examples=40, deadline=None)
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


def test_widths_that_differ_and_too_few_references_are_refused():
    with pytest.raises(ValueError, match="queries are 3 wide and references 4"):
        nearest_distances(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="k=3 nearest of 2 references"):
        nearest_distances(torch.zeros(2, 3), torch.zeros(2, 3), k=3)
