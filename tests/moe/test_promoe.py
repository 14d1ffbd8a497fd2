"""ProMoE's choice and contrastive loss, against plain loops in float64."""

import math

import pytest
import torch

from dit_moe.config import ConfigError
from dit_moe.moe import ROUTERS, RoutingContext
from dit_moe.moe.routers.promoe import TEMPERATURE, ProMoEConfig

WIDTH, EXPERTS, NULL = 6, 4, 9
LABELS = [0, NULL, 2]  # of three samples with four tokens each
CONTEXT = RoutingContext(samples=3, labels_B=torch.tensor(LABELS), null_label=NULL)


def case(target=1):
    torch.manual_seed(0)
    router = ROUTERS.build(ProMoEConfig(init_std=1.0), WIDTH, EXPERTS, target)
    return router, torch.randn(12, WIDTH)


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def cosines(router, x) -> list[list[float]]:
    return [[cosine(token, row) for row in router.weight.double().tolist()] for token in x.double().tolist()]


@pytest.mark.parametrize("target", [1, 2])
def test_tokens_go_to_their_nearest_prototypes_gated_by_the_cosine_and_those_without_a_class_to_the_last(target):
    router, x = case(target)
    routing = router(x, CONTEXT)
    found = {(n, e): w for n, e, w in zip(*(each.tolist() for each in (routing.token_R, routing.expert_R)),
                                          routing.weight_R.tolist(), strict=True)}  # fmt: skip
    expected = {}
    for n, row in enumerate(cosines(router, x)):
        if LABELS[n // 4] == NULL:
            expected[n, EXPERTS - 1] = 1.0
        else:
            expected |= {(n, e): row[e] for e in sorted(range(3), key=lambda e: -row[e])[:target]}
    assert found == pytest.approx(expected, abs=1e-6)


def test_the_contrastive_loss_is_the_cross_entropy_of_prototypes_and_the_means_of_their_tokens():
    router, x = case()
    x = x.abs()
    with torch.no_grad():
        router.weight.abs_()[2].neg_()  # no token chooses this one
    found = router(x, CONTEXT).aux["contrastive"].item()
    means, prototypes = {}, router.weight.double().tolist()
    for e in range(3):
        rows = cosines(router, x)
        mine = [n for n in range(12) if LABELS[n // 4] != NULL and max(range(3), key=rows[n].__getitem__) == e]
        if mine:
            means[e] = [sum(x[n, d].item() for n in mine) / len(mine) for d in range(WIDTH)]
    assert len(means) == 2
    losses = []
    for e in means:
        likeness = {j: math.exp(cosine(prototypes[e], means[j]) / TEMPERATURE) for j in means}
        losses.append(-math.log(likeness[e] / sum(likeness.values())))
    assert found == pytest.approx(sum(losses) / len(losses), abs=1e-5)


@pytest.mark.parametrize("labels", [[NULL] * 3, [0] * 3])
def test_a_batch_of_tokens_of_one_kind_has_a_finite_loss(labels):
    router, x = case()
    routing = router(x, RoutingContext(samples=3, labels_B=torch.tensor(labels), null_label=NULL))
    routing.aux["contrastive"].backward()
    assert routing.aux["contrastive"].isfinite() and router.weight.grad.isfinite().all()
    assert set(routing.expert_R.tolist()) <= ({EXPERTS - 1} if labels[0] == NULL else set(range(EXPERTS - 1)))


def test_options_that_mean_nothing_to_it_are_refused():
    with pytest.raises(ConfigError, match="renormalize=True means nothing to this router"):
        ProMoEConfig(renormalize=True)
