"""The prefix rule and the ragged hand-off."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_moe.moe.routing import limit_experts, mass_left, prefix_mask, routing_from_mask, sort_experts


def probabilities(seed: int, tokens: int, experts: int, sharpness: float = 1.0) -> torch.Tensor:
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))
    return (sharpness * logits).softmax(-1)


def top_p(prob: torch.Tensor, p: float) -> torch.Tensor:
    return prefix_mask(*mass_left(prob), tail=1 - p)


def test_prefix_is_the_smallest_set_of_best_experts_that_reaches_p():
    prob = torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.25, 0.25]])
    assert top_p(prob, 0.59).tolist() == [[False, True, False], [True, True, False]]
    assert top_p(prob, 0.61).tolist() == [[False, True, True], [True, True, False]]
    assert top_p(prob, 0.76).tolist() == [[False, True, True], [True, True, True]]
    assert top_p(prob, 0.01).sum(1).tolist() == [1, 1]


@settings(max_examples=50)
@given(seed=st.integers(0, 10**6), experts=st.integers(1, 40), p=st.floats(0.01, 1.0), sharpness=st.floats(0.1, 10))
def test_prefix_reaches_p_and_would_not_without_its_last_expert(seed, experts, p, sharpness):
    prob = probabilities(seed, 7, experts, sharpness)
    mask = top_p(prob, p)
    mass = (prob * mask).sum(1)
    last = torch.where(mask, prob, 2.0).min(1).values
    assert (mask.sum(1) >= 1).all()
    assert (mass >= p - 1e-5).all()  # fp32 sum of at most 40 terms errs below 40 · 6e-8
    assert (mass - last < p + 1e-5).all()
    assert (torch.where(mask, prob, 2.0).min(1).values >= torch.where(mask, -1.0, prob).max(1).values).all()


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), p=st.floats(0.01, 0.98), more=st.floats(0.0, 0.02))
def test_a_larger_p_never_drops_an_expert(seed, p, more):
    prob = probabilities(seed, 9, 16)
    assert (top_p(prob, p) <= top_p(prob, p + more)).all()


def test_limits_bound_the_number_of_experts_for_every_threshold():
    left, order = mass_left(probabilities(0, 50, 8))
    for p in (0.01, 0.5, 1.0):
        count = prefix_mask(limit_experts(left, 2, 3), order, tail=1 - p).sum(1)
        assert count.min() >= 2 and count.max() <= 3


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), tokens=st.integers(0, 12), experts=st.integers(1, 9))
def test_pairs_are_the_mask_sorted_by_expert_and_counts_sum_to_pairs(seed, tokens, experts):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(tokens, experts, generator=generator) < 0.4
    weight = torch.rand(tokens, experts, generator=generator)
    routing = routing_from_mask(mask, weight)
    assert routing.counts_E.sum() == len(routing.token_R) == mask.sum()
    assert (routing.expert_R.diff() >= 0).all()
    assert torch.equal(routing.weight_R, weight[routing.token_R, routing.expert_R])
    again = torch.zeros_like(mask)
    again[routing.token_R, routing.expert_R] = True
    assert torch.equal(again, mask)


@settings(max_examples=50)
@given(seed=st.integers(0, 10**6), tokens=st.integers(0, 12), experts=st.integers(1, 9), room=st.floats(0, 1))
def test_of_more_pairs_than_rows_every_expert_keeps_its_share_and_rows_without_a_pair_are_marked(
    seed, tokens, experts, room
):
    generator = torch.Generator().manual_seed(seed)
    mask, weight = (torch.rand(tokens, experts, generator=generator) for _ in range(2))
    mask, capacity = mask < 0.5, int(room * tokens * experts)
    every, routing = routing_from_mask(mask, weight), routing_from_mask(mask, weight, capacity=capacity)
    pairs, kept = len(every.token_R), min(len(every.token_R), capacity)
    assert len(routing.token_R) == capacity and routing.used_R.tolist() == [True] * kept + [False] * (capacity - kept)
    assert (routing.weight_R[kept:] == 0).all() and (routing.expert_R.diff() >= 0).all()
    assert routing.counts_E.sum() == kept
    assert ((routing.counts_E - every.counts_E * kept / max(1, pairs)).abs() < 1).all()
    trimmed = routing.trimmed()
    assert torch.equal(trimmed.expert_R.bincount(minlength=experts), routing.counts_E)
    assert ((trimmed.expert_R * tokens + trimmed.token_R).diff() > 0).all()  # none twice
    assert mask[trimmed.token_R, trimmed.expert_R].all()
    assert torch.equal(trimmed.weight_R, weight[trimmed.token_R, trimmed.expert_R])


@pytest.mark.parametrize("kind", ["probabilities", "ties", "any sign", "infinite", "no numbers"])
def test_the_fast_sort_has_the_values_and_the_order_of_torchs_stable_sort(kind):
    score = torch.randn(200, 23, generator=torch.Generator().manual_seed(0))
    if kind == "probabilities":
        score = score.softmax(-1)
    if kind == "ties":
        score = score.round()  # −0 and 0 among them
    if kind == "infinite":
        score[::2, ::3], score[:, 1] = torch.inf, -torch.inf
    if kind == "no numbers":
        score[::2, ::3], score[::3, 1::4] = torch.nan, -torch.tensor(torch.nan)
    for found, wanted in zip(sort_experts(score), score.sort(dim=-1, descending=True, stable=True), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
