"""Loss-free balancing and DSMoE's router against their equations, by plain loops over tokens in float64."""

import math

import pytest

from tests.moe.examples import EXPERTS, context, make, step, tokens


@pytest.mark.parametrize(("name", "rate", "scale"), [("loss_free", 0.05, 1.0), ("dsmoe", 0.0, 2.0)])
def test_experts_are_ranked_by_sigmoid_and_bias_and_weighted_by_sigmoid_and_the_bias_follows_the_load(
    name, rate, scale
):
    router = make(name, **({"bias_rate": rate} if rate else {}))
    bias = [0.0] * EXPERTS
    for seed in (1, 2, 5):
        x, wanted, loads = tokens(seed), {}, [0] * EXPERTS
        for n, logits in enumerate((x.double() @ router.weight.detach().double().T).tolist()):
            score = [1 / (1 + math.exp(-z)) for z in logits]
            ranking = [s + b for s, b in zip(score, bias, strict=True)]
            best = sorted(range(EXPERTS), key=ranking.__getitem__)[-2:]
            for i in best:
                wanted[n, i] = scale * score[i] / sum(score[j] for j in best)
                loads[i] += 1
        routing = router(x)
        pairs = zip(routing.token_R.tolist(), routing.expert_R.tolist(), strict=True)
        assert dict(zip(pairs, routing.weight_R.tolist(), strict=True)) == pytest.approx(wanted)
        router.stats.reset()
        step(router, (x, context()))
        mean = sum(loads) / EXPERTS
        bias = [b + rate * ((mean > load) - (mean < load)) for b, load in zip(bias, loads, strict=True)]
        if rate:
            assert router.bias_E.tolist() == pytest.approx(bias, abs=1e-7)  # fp32
    assert any(bias) == bool(rate) and router.loss_weights()["balance"] == 0
