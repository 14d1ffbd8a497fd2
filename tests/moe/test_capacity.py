"""A list of pairs with room for so many, whose length the host knows beforehand: `model.moe.capacity_factor`."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from dit_moe.config import ConfigError
from dit_moe.moe import ROUTERS, MoEConfig, MoELayer, measure_layers, notes, routers_of, update_routers
from dit_moe.moe.routers.beam import BEAMConfig
from dit_moe.moe.routers.dtopp import ControllerConfig, DTopPConfig
from dit_moe.moe.routers.topp import TopPConfig
from tests.models.test_dit import inputs, tiny
from tests.moe.examples import EXPERTS, SAMPLES, WIDTH, context, tokens
from tests.moe.stack import batch, stack

NEVER_FULL = EXPERTS / 2  # all experts of every token, for a target of 2
WAITING = {"promoe": "which prototypes have tokens", "expert_threshold": "how many steps its thresholds have followed"}


def layer(name: str = "dtopp", factor: float | None = None, **options) -> MoELayer:
    torch.manual_seed(0)
    router = ROUTERS.config_class(name)()
    return MoELayer(MoEConfig(experts=EXPERTS, target=2, router=router, capacity_factor=factor, **options), WIDTH, 64)


def states() -> torch.Tensor:
    return tokens().view(SAMPLES, -1, WIDTH).clone().requires_grad_()


@pytest.mark.parametrize("recompute", [False, True], ids=["once", "recomputed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_whose_pairs_all_fit_gives_the_outputs_and_gradients_of_one_without_a_capacity(dtype, recompute):
    found = []
    for factor in (None, NEVER_FULL):
        one, x = layer(factor=factor, bias=True, shared_experts=1), states()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            out, routing = checkpoint(one, x, context(), use_reentrant=False) if recompute else one(x, context())
        (out.float().square().sum() + sum(routing.aux.values())).backward()
        found.append([out.detach(), x.grad, *(parameter.grad for parameter in one.parameters())])
    for exact, fixed in zip(*found, strict=True):
        assert (exact - fixed).norm() <= (1e-5 if dtype == torch.float32 else 2e-2) * exact.norm()


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", ROUTERS.names())
def test_a_layer_with_a_capacity_never_waits_for_the_device_or_its_router_is_refused(name, training, monkeypatch):
    """Of tensors without numbers, forward, backward and the routers' update: to ask for a number of theirs, or for a
    length that depends on them, raises."""
    if name in WAITING:
        with pytest.raises(ConfigError, match=f"capacity_factor=1.5 .*to learn {WAITING[name]}; choose dtopp"):
            layer(name, 1.5)
        return
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # as on a GPU experts are not sorted by NumPy
    with FakeTensorMode():
        one, x = layer(name, 1.5, bias=True, shared_experts=1).train(training), torch.randn(SAMPLES, 8, WIDTH)
        out, routing = one(x.requires_grad_(), context())
        (out.sum() + sum(routing.aux.values())).backward()
        update_routers(one, report=False)
    assert x.grad.shape == x.shape
    assert len(routing.token_R) == (120 if training else 40 * one.router.most)


def test_micro_batches_ranks_and_recomputation_report_exactly_what_was_dropped():
    model = stack(TopPConfig(p=0.6), capacity_factor=1.0)
    chosen = stack(TopPConfig(p=0.6), layers=1)  # of the first layer, whose tokens are the same
    wanted = 0
    for seed in range(2):
        with measure_layers(chosen) as (all_pairs,), measure_layers(model) as (kept, *_):
            chosen(batch(seed))
            model(batch(seed))
        assert kept.pairs == 2 * kept.tokens < all_pairs.pairs
        wanted += all_pairs.pairs - kept.pairs
        model(batch(seed))  # again, as where activations are recomputed
    report = update_routers(model, reduce=lambda sums: 2 * sums)  # two ranks with the same tokens
    assert report["layers"]["dropped"][0] * 512 == wanted
    assert "dropped" not in update_routers(chosen)["layers"]


def test_evaluation_drops_nothing_though_training_does():
    full, exact = layer("dynmoe", 1.0), layer("dynmoe")
    assert len(full(states(), context())[1].token_R) < len(exact(states(), context())[1].token_R)
    assert torch.equal(full.eval()(states(), context())[0], exact.eval()(states(), context())[0])


@pytest.mark.parametrize(
    ("router", "factor", "said"),
    [(None, 1.25, "room for 2.5 experts per token, and training may use 3 on"), (None, 1.5, ""), (BEAMConfig(), 2, "")],
)
def test_less_room_than_training_may_use_is_told_beforehand(router, factor, said):
    told = [note for note in notes(stack(router, capacity_factor=factor)) if "capacity_factor" in note]
    assert [said in note for note in told] == ([True] if said else [])


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_block_is_one_graph_with_the_outputs_gradients_and_statistics_of_an_uncompiled_one(training):
    found = []
    for compiled in (False, True):
        router = DTopPConfig(controller=ControllerConfig(p0=0.9))
        model = tiny(moe=MoEConfig(capacity_factor=1.0, router=router), depth=1).train(training)
        if compiled:
            torch._dynamo.reset()
            model.blocks[0].compile(fullgraph=True, backend="aot_eager")
        for _ in range(2):  # the second time there are statistics to add to
            out, aux = model(*inputs(), return_aux=True)
            (out.square().sum() + sum(aux.values())).backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        sums = [router.stats.sums for router in routers_of(model) if training]
        found.append([out.detach(), *gradients, *sums])
    assert not training or found[0][-1][4] > 0  # some were dropped
    for plain, compiled in zip(*found, strict=True):
        assert (plain - compiled).norm() <= 1e-5 * plain.norm()
