"""The published formula of each router, by plain loops over tokens in float64."""

import math
from dataclasses import replace

import pytest
import torch

from dit_moe.config import ConfigError
from dit_moe.moe import ROUTERS
from dit_moe.moe.router_stats import similarity_loss
from tests.moe.examples import EXPERTS, SAMPLES, TOKENS, context, make, mask_of, step, tokens

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


def test_expert_choice_says_which_mean_its_floor_gives():
    note = ROUTERS.config_class("expert_choice")().note
    assert note(2, 8, 16) is note(2, 8, None) is None
    said = "each of 64 experts takes 1 of the 16 tokens of an image, so a token has 4 experts on average"
    assert note(2, 64, 16) == f"model.moe.target=2: {said}"


def test_of_equal_scores_expert_choice_takes_the_first_tokens_and_sequence_top_k_the_first_pairs():
    same = torch.zeros(TOKENS, tokens().shape[1])
    chosen = mask_of(make("expert_choice", target=2)(same, context())).view(SAMPLES, SIZE, EXPERTS)
    assert chosen[:, :2].all() and not chosen[:, 2:].any()
    chosen = mask_of(make("seq_topk", target=2)(same, context())).view(SAMPLES, SIZE, EXPERTS)
    assert chosen[:, :2].all() and not chosen[:, 2:].any()
    chosen = mask_of(make("seq_topk", target=2, max_experts=3)(same, context())).view(SAMPLES, SIZE, EXPERTS)
    assert chosen[:, :5, :3].all() and not chosen[:, :, 3:].any()


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


# ------------------------------------------------------------------------------- routers that look at the whole batch


def predicted(router, x) -> list[list[float]]:
    """DiffMoE's predictor: the chance of each expert to take each token."""
    chances = []
    bias_D, bias_E = router.predictor_bias_in, router.predictor_bias_out
    for x_D in x.double():
        hidden_D = router.predictor_in.detach().double() @ x_D + (0 if bias_D is None else bias_D.detach())
        hidden_D = hidden_D * hidden_D.sigmoid()
        logits_E = router.predictor_out.detach().double() @ hidden_D + (0 if bias_E is None else bias_E.detach())
        chances.append(logits_E.sigmoid().tolist())
    return chances


@pytest.mark.parametrize("bias", [False, True])
def test_in_diffmoe_experts_take_their_best_tokens_of_the_batch_and_the_predictor_learns_which(bias):
    router, x = make("diffmoe", target=2.5, predictor_bias=bias), tokens()
    for parameter in (router.predictor_bias_in, router.predictor_bias_out) if bias else ():
        torch.nn.init.normal_(parameter)
    prob, chance, each = softmax_scores(router, x), predicted(router, x), int(2.5 * TOKENS / EXPERTS)
    wanted, cost = torch.zeros(TOKENS, EXPERTS, dtype=torch.float64), 0.0
    for e in range(EXPERTS):
        taken = sorted(range(TOKENS), key=lambda n: -prob[n][e])[:each]
        for n in range(TOKENS):
            cost -= math.log(chance[n][e] if n in taken else 1 - chance[n][e]) / (TOKENS * EXPERTS)
            wanted[n, e] = prob[n][e] if n in taken else 0.0
    routing = router(x, context())
    torch.testing.assert_close(dense(routing), wanted, atol=1e-6, rtol=1e-5)
    assert routing.aux["predictor"].item() == pytest.approx(cost, rel=1e-5)


def test_in_evaluation_diffmoe_compares_the_prediction_with_the_mean_of_the_last_that_was_taken():
    router = make("diffmoe", target=2, threshold_decay=0.6)
    batches = [(tokens(1), context()), (tokens(2)[:16], context(2, 16)), (tokens(3), context())]
    last = [
        [sorted((row[e] for row in predicted(router, x)), reverse=True)[len(x) // 4 - 1] for e in range(EXPERTS)]
        for x, _ in batches
    ]
    step(router, *batches[:2])  # two micro-batches of one step
    first = [(40 * a + 16 * b) / 56 for a, b in zip(*last[:2], strict=True)]
    torch.testing.assert_close(router.threshold_K, torch.tensor(first))
    step(router, batches[2])
    second = [0.5 * a + 0.5 * b for a, b in zip(first, last[2], strict=True)]  # of two steps the plain mean
    torch.testing.assert_close(router.threshold_K, torch.tensor(second))
    step(router, batches[2])
    third = [0.6 * a + 0.4 * b for a, b in zip(second, last[2], strict=True)]
    torch.testing.assert_close(router.threshold_K, torch.tensor(third))
    chosen = mask_of(router.eval()(tokens(4), context()))
    wanted = [[chance > t for chance, t in zip(row, third, strict=True)] for row in predicted(router, tokens(4))]
    assert chosen.tolist() == wanted and 0 < chosen.sum() < TOKENS * EXPERTS


def test_the_batchwise_evaluation_of_diffmoe_is_refused():
    with pytest.raises(ConfigError, match=r"^evaluation=batch is not supported: an image would depend on those"):
        ROUTERS.config_class("diffmoe")(evaluation="batch")


def race(router, x) -> list[list[float]]:
    """Expert Race's scores."""
    scores = []
    for x_D in x.double():
        hidden = (router.hidden.detach().double() @ x_D).tolist()
        hidden = [h * (1 + math.erf(h / math.sqrt(2))) / 2 for h in hidden]
        scores.append((router.weight.detach().double() @ torch.tensor(hidden, dtype=torch.float64)).tolist())
    return scores


def test_in_expert_race_the_best_pairs_of_the_batch_win_and_their_scores_are_the_gates():
    router, x = make("expert_race", target=1.5), tokens()
    score, wanted = race(router, x), torch.zeros(TOKENS, EXPERTS, dtype=torch.float64)
    pairs = sorted(((n, e) for n in range(TOKENS) for e in range(EXPERTS)), key=lambda pair: -score[pair[0]][pair[1]])
    for n, e in pairs[: 3 * TOKENS // 2]:
        wanted[n, e] = score[n][e]
    torch.testing.assert_close(dense(router(x, context())), wanted, atol=1e-5, rtol=1e-5)


def test_in_evaluation_expert_race_compares_scores_with_the_mean_of_the_worst_that_won():
    router = make("expert_race", target=2)
    worst = [sorted((z for row in race(router, tokens(seed)) for z in row), reverse=True)[79] for seed in (1, 2)]
    for seed in (1, 2):
        step(router, (tokens(seed), context()))
    assert router.threshold_K.item() == pytest.approx(sum(worst) / 2, rel=1e-4)
    chosen = mask_of(router.eval()(tokens(4), context()))
    assert chosen.tolist() == [[z >= sum(worst) / 2 for z in row] for row in race(router, tokens(4))]


def test_the_similarity_loss_is_that_of_expert_race():
    prob = [[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]]
    mask = [[1, 1, 0], [0, 1, 1]]
    # PᵀP and MᵀM by hand: diagonal of M 1, 2, 1 (sum 4), outside of it 1 between 0 and 1, and 1 and 2 (sum 4).
    on = 3 / 4 * (1 * (0.25 + 0.01) + 2 * (0.09 + 0.36) + 1 * (0.04 + 0.09))
    off = 6 / 4 * 2 * ((0.5 * 0.3 + 0.1 * 0.6) + (0.3 * 0.2 + 0.6 * 0.3))
    assert similarity_loss(torch.tensor(prob), torch.tensor(mask)).item() == pytest.approx((on + off) / 2)
    even = torch.full((4, 4), 0.25)
    assert similarity_loss(even, torch.eye(4).roll(1, 0) + torch.eye(4)).item() == pytest.approx(1)


def test_a_head_of_expert_race_learns_to_predict_the_training_target_of_its_token():
    router, x, target = make("expert_race", target_width=4), tokens(), tokens(6)[:, :4]
    assert "target" not in router(x, context()).aux
    error = 0.0
    for x_D, target_F in zip(x.double(), target.double(), strict=True):
        hidden_D = torch.nn.functional.gelu(router.hidden.detach().double() @ x_D)
        error += ((router.head.detach().double() @ hidden_D - target_F) ** 2).mean().item() / TOKENS
    term = router(x, replace(context(), target_NF=target)).aux["target"]
    assert term.item() == pytest.approx(error, rel=1e-5)
    term.backward()
    assert router.head.grad.abs().max() > 0 and router.hidden.grad.abs().max() > 0
    assert sum(router.config.size(EXPERTS, x.shape[1])) == sum(p.numel() for p in router.parameters())


# ----------------------------------------------------------------------------------------------- Expert Threshold


def thresholds_of(score_NE: torch.Tensor, target: float, parts: int = 1) -> torch.Tensor:
    """What one step over so many micro-batches sets the thresholds to."""
    router = make("expert_threshold", target=target, warmup_steps=0)
    scores = [router.scores(tokens(count=len(part))) for part in score_NE.chunk(parts)]
    for given, part in zip(scores, score_NE.chunk(parts), strict=True):
        choice = router.route(replace(given, score_NE=part))
        router.stats.add(choice.mask_NE, given.prob_NE.detach(), choice.observed_K)
    router.after_step(router.stats, router.stats)
    return router.threshold_K


@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("target", [1, 2, 5.5])
def test_thresholds_let_each_expert_have_its_load_to_one_percent_whatever_the_micro_batches(spread, target):
    odds_NE = spread * torch.randn(40_000, EXPERTS, generator=torch.Generator().manual_seed(0)) - 2
    threshold_E = thresholds_of(odds_NE.sigmoid(), target)
    load_E = (odds_NE.sigmoid() > threshold_E).double().mean(0)
    torch.testing.assert_close(load_E, torch.full_like(load_E, target / EXPERTS), rtol=0.01, atol=0)
    assert torch.equal(threshold_E, thresholds_of(odds_NE.sigmoid(), target, parts=7))


def test_thresholds_are_the_moving_average_of_the_score_that_the_last_token_of_an_even_load_has():
    router = make("expert_threshold", target=2, threshold_decay=0.4, warmup_steps=1)
    last = [
        [sorted((row[e] for row in softmax_scores(router, tokens(seed, 4000))), reverse=True)[999] for e in range(8)]
        for seed in (1, 2)
    ]
    chosen = mask_of(router(tokens(1, 4000), context(5, 4000)), 4000)
    assert chosen.sum(0).tolist() == [1000] * EXPERTS  # the first step is expert choice over the batch
    for seed in (1, 2):
        step(router, (tokens(seed, 4000), context(5, 4000)))
    wanted = [0.4 * a + 0.6 * b for a, b in zip(*last, strict=True)]
    torch.testing.assert_close(router.threshold_K, torch.tensor(wanted), rtol=0.01, atol=0)
    for mode in (True, False):  # from then on a token alone decides, in training and in evaluation
        chosen = mask_of(router.train(mode)(tokens(4), context()))
        assert chosen.tolist() == [
            [p > c for p, c in zip(row, router.threshold_K.tolist(), strict=True)]
            for row in softmax_scores(router, tokens(4))
        ]


def test_without_a_warmup_expert_threshold_serves_text_and_begins_with_the_best_experts_of_each_token():
    router = make("expert_threshold", target=2.5, warmup_steps=0)
    router.config.check_text()
    assert torch.equal(mask_of(router(tokens())), mask_of(make("topk", target=2)(tokens())))
    whole, parts = make("expert_threshold", warmup_steps=0), make("expert_threshold", warmup_steps=0)
    for seed in range(3):
        step(whole, (tokens(seed), context()))
        step(parts, *((part, context(1, SIZE)) for part in tokens(seed).split(SIZE)))
    torch.testing.assert_close(whole.threshold_K, parts.threshold_K)
