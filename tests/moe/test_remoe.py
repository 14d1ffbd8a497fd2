"""ReMoE against its equations, by plain loops over tokens in float64, and its coefficient λ."""

import pytest
import torch

from dit_moe.moe.routers.coefficient import Coefficient
from tests.moe.examples import EXPERTS, TOKENS, context, make, mask_of, step, tokens


def test_gates_are_relu_and_the_loss_is_lambda_times_the_load_times_the_mean_gate_of_each_expert():
    router = make("remoe", damping=0.0, sparsity_loss=0.5)
    load, lam, losses = [1 / EXPERTS] * EXPERTS, 0.5, []
    for seed in range(3):
        x, pairs, mean = tokens(seed), [0] * EXPERTS, [0.0] * EXPERTS
        routing = router(x)
        gates = torch.zeros(TOKENS, EXPERTS, dtype=torch.float64)
        gates[routing.token_R, routing.expert_R] = routing.weight_R.detach().double()
        for n, logits in enumerate((x.double() @ router.weight.detach().double().T).tolist()):
            for i, z in enumerate(logits):
                assert gates[n, i].item() == pytest.approx(max(z, 0.0), abs=1e-6)
                pairs[i] += z > 0
                mean[i] += max(z, 0.0) / TOKENS
        losses.append(lam * EXPERTS * sum(f * r for f, r in zip(load, mean, strict=True)))
        assert router.loss_weights()["sparsity"] * routing.aux["sparsity"].item() == pytest.approx(losses[-1])
        router.stats.reset()
        step(router, (x, context()))
        load = [count / (TOKENS * 2) for count in pairs]
        sparsity = 1 - sum(pairs) / (TOKENS * EXPERTS)
        lam = lam * 1.2 if sparsity < 1 - 2 / EXPERTS else lam / 1.2
        assert router.state_numbers()["lambda"].item() == pytest.approx(lam)
    assert losses[2] > losses[0] and lam > 0.5  # about half of the experts begin


@pytest.mark.parametrize(("name", "peak"), [("remoe", 32), ("beam", 16), ("dtopp", 12), ("topk", None)])
def test_memory_is_estimated_for_the_experts_that_training_begins_with(name, peak):
    assert make(name).config.peak(64, 8) == peak


def test_a_token_whose_scores_are_all_below_zero_has_no_expert():
    router, x = make("remoe", experts=2, target=1), tokens()
    with torch.no_grad():
        router.weight.copy_(-x[:1].expand(2, -1))
    assert not mask_of(router(x), experts=2)[0].any()


def test_the_coefficient_turns_at_the_target_and_at_its_start_and_its_damping_lasts_for_one_step():
    plain, damped = Coefficient(1.2, 0.0), Coefficient(1.2, 10.0)
    for active, integral, factor in [
        (2.5, 1.2, 2.5),
        (2.0, 1.2, 0.0),
        (1.9, 1.0, -0.5),
        (8.0, 1.2, 4.0),
        (0.0, 1.0, -4.0),
        (0.0, 1.0, -4.0),
    ]:
        for each in (plain, damped):
            each.step(torch.tensor(active), 2.0)
            assert each.integral.item() == pytest.approx(integral)
        assert plain.value.item() == pytest.approx(integral)
        assert damped.value.log().item() == pytest.approx(torch.tensor(integral).log().item() + factor, abs=1e-5)
    before = damped.value.item()
    damped.step(torch.tensor(torch.nan), 2.0)
    assert damped.value.item() == before and damped.integral.item() == pytest.approx(1.0)
