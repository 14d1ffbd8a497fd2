"""Counts of routings are exact, whatever the tokens are grouped by and however they come."""

import numpy as np
import pytest
import torch

from dit_moe.analysis.collect import RoutingCounts, active_of_tokens, experts_of, run_facts, shape_of
from dit_moe.analysis.statistics import Target
from dit_moe.moe import ROUTERS, measure_layers, routers_of
from tests.analysis.runs import image_run, with_sample
from tests.moe.stack import batch, stack

GROUPS = {"third": 3, "parity": 2}


def groups_of(tokens, start=0):
    places = torch.arange(start, start + tokens)
    return {"third": places % 3, "parity": places % 2}


def masks(model, x):
    """Bool [L, N, E], pair by pair."""
    found = []
    handles = [router.register_forward_hook(lambda *all: found.append(all[2])) for router in routers_of(model)]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    masks_LNE = np.zeros((len(found), x.shape[0] * x.shape[1], len(found[0].counts_E)), dtype=bool)
    for mask_NE, routing in zip(masks_LNE, found, strict=True):
        for token, expert in zip(routing.token_R.tolist(), routing.expert_R.tolist(), strict=True):
            mask_NE[token, expert] = True
    return masks_LNE


def counted(model, x, kept_N=None, parts=1):
    counts, start = RoutingCounts(model, GROUPS), 0
    for part in x.chunk(parts):
        size = part.shape[0] * part.shape[1]
        kept_part = None if kept_N is None else kept_N[start : start + size]
        with torch.no_grad(), counts.counting(groups_of(size, start), kept_part):
            model(part)
        start += size
    return counts


@pytest.mark.parametrize("name", ROUTERS.names())
@pytest.mark.parametrize("some", [False, True], ids=["all tokens", "some tokens in four batches"])
def test_counts_are_those_of_a_plain_loop_over_tokens_for_every_router(name, some):
    model, x = stack(ROUTERS.config_class(name)()).eval(), batch()
    kept_N = torch.rand(256, generator=torch.Generator().manual_seed(1)) < 0.6 if some else None
    counts, masks_LNE = counted(model, x, kept_N, parts=4 if some else 1), masks(model, x)
    kept = np.ones(256, dtype=bool) if kept_N is None else kept_N.numpy()
    active_LN = masks_LNE[:, kept].sum(2)
    found = counts.overall()
    assert counts.tokens == kept.sum()
    np.testing.assert_allclose(found["active_L"], active_LN.mean(1), rtol=1e-12)
    np.testing.assert_allclose(found["active_std_L"], active_LN.std(1), atol=1e-12)
    for layer, mask_NE in enumerate(masks_LNE[:, kept]):
        wanted = [(active_LN[layer] == k).mean() for k in range(1, 9)]
        np.testing.assert_allclose(found["share_LE"][layer], wanted, rtol=1e-12)
        np.testing.assert_allclose(found["load_LE"][layer], mask_NE.sum(0) / mask_NE.sum(), rtol=1e-12)
        for i in range(8):
            both = [(mask_NE[:, i] & mask_NE[:, j]).mean() for j in range(8)]
            np.testing.assert_allclose(found["together_LEE"][layer, i], both, rtol=1e-12)
    for grouping, group_N in groups_of(256).items():
        active_LG, load_LGE = counts.by(grouping)
        for group in range(GROUPS[grouping]):
            mine = masks_LNE[:, kept & (group_N.numpy() == group)]
            np.testing.assert_allclose(active_LG[:, group], mine.sum(2).mean(1), rtol=1e-12)
            pairs_LE = mine.sum(1)
            np.testing.assert_allclose(load_LGE[:, group], pairs_LE / pairs_LE.sum(1, keepdims=True), rtol=1e-12)


def test_counts_stay_exact_within_bf16_autocast():
    model, x = stack().eval(), batch(tokens=2048)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        counts = counted(model, x)
    together_LEE = counts.together_LEE.float()  # of 2048 tokens, where bf16 has 8 bits
    pairs = sum(counts.with_LE[0, k] * (k + 1) for k in range(8))
    assert together_LEE[0].diagonal().sum() == pairs > 2048
    assert counts.pairs_LGE["third"].sum(1).equal(counts.together_LEE.diagonal(dim1=1, dim2=2))


def test_counting_leaves_no_hook_and_trainings_counters_alone_even_after_an_error():
    model = stack()
    counts = RoutingCounts(model, {})
    with pytest.raises(RuntimeError), counts.counting({}):
        raise RuntimeError
    assert not any(router._forward_hooks for router in routers_of(model))
    with torch.no_grad(), RoutingCounts(model.eval(), GROUPS).counting(groups_of(256)):
        model(batch())
    assert all(router.stats.sums is None for router in routers_of(model))


def test_a_group_without_tokens_is_nan_and_no_warning():
    model, x = stack().eval(), batch()
    counts = RoutingCounts(model, {"only": 2})
    with torch.no_grad(), counts.counting({"only": torch.zeros(256, dtype=torch.int64)}):
        model(x)
    active_LG, load_LGE = counts.by("only")
    assert np.isfinite(active_LG[:, 0]).all() and np.isnan(active_LG[:, 1]).all() and np.isnan(load_LGE[:, 1]).all()


def test_active_of_tokens_is_each_tokens_own_number_by_layer():
    model, x = stack().eval(), batch()
    with torch.no_grad(), active_of_tokens(model) as active:
        model(x)
    assert np.array_equal(torch.stack(active).numpy(), masks(model, x).sum(2))
    with torch.no_grad(), measure_layers(model) as layers:
        model(x)
    assert [each.sum().item() for each in active] == [each.pairs for each in layers]


# ------------------------------------------------------------------------------------------------------------- the run


def test_layers_are_called_by_the_number_of_their_block():
    run = image_run("model.moe={every: 2, offset: 1}", "model.depth=6")
    wanted = {"layers_L": [1, 3, 5], "experts": 4, "target": Target(2.0), "trained_target": Target(2.0)}
    assert shape_of(run) == wanted | {"adjustable": True, "remark": None}


@pytest.mark.parametrize("router, adjustable", [("topk", True), ("expert_choice", True), ("diffmoe", False)])
def test_a_report_says_whether_another_compute_budget_can_be_asked_for(router, adjustable):
    assert shape_of(image_run(f"model.moe.router={router}"))["adjustable"] is adjustable


@pytest.mark.parametrize(
    "router, asked, target, trained",
    [
        ("dtopp", {}, "target 2", "target 2"),
        ("topk", {"target": 3.0}, "target 3", "target 2"),
        ("topp", {}, "nominal 2", "nominal 2"),
        ("topp", {"target": 1.5}, "target 1.5", "nominal 2"),
        ("dtopp", {"p": 0.5}, "nominal 2", "target 2"),
        ("dtopp", {"target": (1.0, 1.5), "vary": "time"}, "target 1.25", "target 2"),
    ],
)
def test_a_target_is_what_was_asked_of_the_routers_and_nominal_where_nothing_holds_them(router, asked, target, trained):
    shape = shape_of(with_sample(image_run(f"model.moe={{router: {router}}}"), **asked))
    assert (str(shape["target"]), str(shape["trained_target"])) == (target, trained)


def test_facts_tell_the_router_with_what_is_not_its_default():
    run = image_run("model.moe.router={name: dtopp, layerwise: true, controller: {p0: 0.4}}")
    facts = run_facts(run, [0.5, 0.6, 0.7])
    assert facts["router"] == "dtopp, controller.p0=0.4, layerwise=True"
    assert facts["parameters"] == sum(each.numel() for each in run.model.parameters())
    assert facts["thresholds"] == [0.5, 0.6, 0.7] and facts["step"] == 7 and facts["weights"] == "ema"
    assert "thresholds" not in run_facts(image_run("model.moe={router: topk}"), [])


def test_a_dense_model_is_refused_in_one_sentence():
    run = image_run("model.moe=null", name="DiT-custom/2")
    with pytest.raises(ValueError, match=r"some/run is of the dense model DiT-custom/2.*; name a run with experts"):
        experts_of(run)
