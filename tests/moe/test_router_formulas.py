"""The published formula of each router, by plain loops over tokens in float64."""

import pytest
import torch

from dit_moe.config import ConfigError
from dit_moe.moe import ROUTERS
from tests.moe.test_routers import EXPERTS, SAMPLES, TOKENS, context, make, mask_of, tokens

SIZE = TOKENS // SAMPLES


def dense(routing) -> torch.Tensor:
    """The gates of all pairs, 0 where there is none."""
    gates_NE = torch.zeros(TOKENS, EXPERTS, dtype=torch.float64)
    gates_NE[routing.token_R, routing.expert_R] = routing.weight_R.detach().double()
    return gates_NE


def softmax_scores(router, x) -> list[list[float]]:
    """Of each token, in float64."""
    return (x.double() @ router.weight.detach().double().T).softmax(-1).tolist()


# ------------------------------------------------------------------------------- routers that look at a whole sample


@pytest.mark.parametrize("target, each", [(2, 2), (1, 1), (2.9, 2), (3, 3), (8, 8)])
def test_in_expert_choice_each_expert_takes_its_share_of_each_image(target, each):
    """⌊target·8/8⌋ of the 8 tokens of an image."""
    router, x = make("expert_choice", target=target), tokens()
    prob, wanted = softmax_scores(router, x), torch.zeros(TOKENS, EXPERTS, dtype=torch.float64)
    for b in range(SAMPLES):
        own = range(b * SIZE, (b + 1) * SIZE)
        for e in range(EXPERTS):
            for n in sorted(own, key=lambda n: -prob[n][e])[:each]:
                wanted[n, e] = prob[n][e]
    torch.testing.assert_close(dense(router(x, context())), wanted, atol=1e-6, rtol=1e-5)


def test_an_expert_that_cannot_have_a_whole_token_of_an_image_takes_its_best_one():
    assert mask_of(make("expert_choice", target=2)(tokens(), context(samples=TOKENS))).all()
    assert mask_of(make("expert_choice", target=1)(tokens(), context(samples=20))).sum() == 20 * EXPERTS


def test_of_equal_scores_expert_choice_takes_the_first_tokens_and_sequence_top_k_the_first_pairs():
    same = torch.zeros(TOKENS, tokens().shape[1])
    chosen = mask_of(make("expert_choice", target=2)(same, context())).view(SAMPLES, SIZE, EXPERTS)
    assert chosen[:, :2].all() and not chosen[:, 2:].any()
    chosen = mask_of(make("seq_topk", target=2)(same, context())).view(SAMPLES, SIZE, EXPERTS)
    assert chosen[:, :2].all() and not chosen[:, 2:].any()


@pytest.mark.parametrize("most", [None, 3])
def test_sequence_top_k_takes_the_best_pairs_of_a_sample_with_a_cap_for_each_token(most):
    router, x = make("seq_topk", target=2, max_experts=most), tokens()
    prob, wanted = softmax_scores(router, x), torch.zeros(TOKENS, EXPERTS, dtype=torch.float64)
    for b in range(SAMPLES):
        pairs = [(n, e) for n in range(b * SIZE, (b + 1) * SIZE) for e in range(EXPERTS)]
        for n, e in sorted(pairs, key=lambda pair: -prob[pair[0]][pair[1]]):
            full = wanted[b * SIZE : (b + 1) * SIZE].count_nonzero() == 2 * SIZE
            if not full and wanted[n].count_nonzero() < (most or EXPERTS):
                wanted[n, e] = prob[n][e]
    wanted = wanted / wanted.sum(-1, keepdim=True).clamp(min=1e-20)
    torch.testing.assert_close(dense(router(x, context())), wanted, atol=1e-6, rtol=1e-5)
    assert most is None or (wanted.count_nonzero(dim=1) == most).any()


@pytest.mark.parametrize("name", ["expert_choice", "seq_topk"])
def test_k_of_routers_that_look_at_a_sample_may_be_set_after_training(name):
    router = make(name, target=2).eval()
    router.override = 4.0
    assert len(router(tokens(), context()).token_R) == 4 * TOKENS


@pytest.mark.parametrize("name, option", [("expert_choice", "max_experts"), ("expert_choice", "bias_rate")])
def test_options_that_mean_nothing_to_a_router_are_refused(name, option):
    with pytest.raises(ConfigError, match=f"^{option}=2 means nothing to this router; drop it$"):
        ROUTERS.config_class(name)(**{option: 2})
