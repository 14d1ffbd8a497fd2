"""DynMoE's gating and losses, against plain loops in float64."""

import math

import pytest
import torch

from dit_moe.moe import ROUTERS
from dit_moe.moe.routers.dynmoe import DynMoEConfig

WIDTH, EXPERTS, TOKENS = 6, 4, 20


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


@pytest.fixture
def case():
    torch.manual_seed(0)
    router = ROUTERS.build(DynMoEConfig(init_std=1.0), WIDTH, EXPERTS, 2)
    with torch.no_grad():
        router.threshold_E.copy_(torch.tensor([0.1, -0.2, 0.4, 0.3]))
    x = torch.randn(TOKENS, WIDTH)
    rows = [[torch.cosine_similarity(t, w, dim=0).item() for w in router.weight.double()] for t in x.double()]
    return router, x, rows


@pytest.mark.parametrize("training", [True, False])
def test_experts_above_their_threshold_share_the_token_and_evaluation_leaves_none_without(case, training):
    router, x, rows = case
    routing = router.train(training)(x)
    expected = {}
    for n, row in enumerate(rows):
        active = [e for e in range(EXPERTS) if sigmoid(row[e]) > sigmoid(router.threshold_E[e].item())]
        if not active and not training:
            active = [max(range(EXPERTS), key=row.__getitem__)]
        expected |= {(n, e): 1 / len(active) for e in active}
    pairs = zip(routing.token_R.tolist(), routing.expert_R.tolist(), strict=True)
    assert dict(zip(pairs, routing.weight_R.tolist(), strict=True)) == pytest.approx(expected)
    assert (len(routing.token_R.unique()) < TOKENS) == training  # the case has tokens that reach no threshold


def test_gradients_pass_the_threshold_as_if_the_gate_were_the_margin_divided_by_the_number_of_experts(case):
    router, x, _ = case
    routing = router(x)
    grad_R = torch.randn(len(routing.token_R))
    (routing.weight_R * grad_R).sum().backward()
    expected = [0.0] * EXPERTS
    counts = routing.token_R.bincount().tolist()
    for n, e, grad in zip(routing.token_R.tolist(), routing.expert_R.tolist(), grad_R.tolist(), strict=True):
        s = sigmoid(router.threshold_E[e].item())
        expected[e] -= grad / counts[n] * s * (1 - s)
    assert router.threshold_E.grad.tolist() == pytest.approx(expected, abs=1e-5)


def test_the_losses_are_the_distance_of_the_weights_from_orthonormal_and_their_mean_norm(case):
    router, x, _ = case
    aux, w = router(x).aux, router.weight.double().tolist()
    dots = [[sum(a * b for a, b in zip(v, u, strict=True)) for u in w] for v in w]
    square = sum((dots[i][j] - (i == j)) ** 2 for i in range(EXPERTS) for j in range(EXPERTS))
    assert aux["diversity"].item() == pytest.approx(math.sqrt(square), rel=1e-6)
    assert aux["simplicity"].item() == pytest.approx(sum(dots[i][i] ** 0.5 for i in range(EXPERTS)) / EXPERTS, rel=1e-6)


def test_training_begins_with_half_of_the_experts_which_is_said_and_counted_as_memory():
    assert "begins with about 32 of 64 experts per token" in DynMoEConfig().note(8, 64, None)
    assert DynMoEConfig().peak(64, 8) == 48
    router = ROUTERS.build(DynMoEConfig(), 128, 64, 8)
    assert len(router(torch.randn(200, 128)).token_R) / 200 == pytest.approx(32, rel=0.05)
