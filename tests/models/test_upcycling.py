"""Experts made of the hidden units of trained feed-forwards, layer by layer."""

import pytest
import torch
from timm.layers import Mlp, SwiGLUPacked
from torch import nn

from dit_moe.models.upcycling import Layout, add_noise, equal_clusters, upcycle_block
from dit_moe.moe import MoEConfig, MoELayer
from dit_moe.moe.layer import FeedForward
from dit_moe.moe.routers.topk import TopKConfig

WIDTH, HIDDEN = 16, 48
SUMS_TO_1 = TopKConfig(renormalize=True)


def feed_forward(kind: str) -> nn.Module:
    torch.manual_seed(0)
    module = {
        "gelu": lambda: Mlp(WIDTH, HIDDEN, act_layer=lambda: nn.GELU(approximate="tanh")),
        "silu": lambda: Mlp(WIDTH, HIDDEN, act_layer=nn.SiLU),
        "swiglu": lambda: SwiGLUPacked(WIDTH, 2 * HIDDEN),
        "without biases": lambda: FeedForward(WIDTH, HIDDEN, "swiglu"),
    }[kind]()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.eval()


def moe_layer(activation: str, experts: int, target: int, **options) -> MoELayer:
    torch.manual_seed(1)
    shape = {"experts": experts, "target": target, "activation": activation, "router": SUMS_TO_1}
    config = MoEConfig(**shape | options)
    return MoELayer(config, WIDTH, HIDDEN).eval()


def tokens(count: int = 300) -> torch.Tensor:
    return torch.randn(1, count, WIDTH, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def difference(layer: nn.Module, wanted: torch.Tensor, x: torch.Tensor, k: int | None = None) -> float:
    """Norm of the difference of outputs, in that of the wanted ones, with k active experts or the target."""
    layer.router.override = k
    out, _ = layer(x)
    layer.router.override = None
    return ((out - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("method, shared", [("split", 0), ("split", 1), ("cluster", 0), ("cluster", 1), ("copy", 0)])
@pytest.mark.parametrize("kind", ["gelu", "silu", "swiglu", "without biases"])
def test_the_experts_of_a_token_and_all_of_them_give_what_the_feed_forward_gave(kind, method, shared):
    dense, x = feed_forward(kind), tokens()
    parts = 1 if method == "copy" else 2
    hidden, bias = HIDDEN // (parts + shared), kind != "without biases"
    activation = kind if bias else "swiglu"
    layer = moe_layer(activation, 4 * parts, parts, expert_hidden=hidden, shared_experts=shared, bias=bias)
    layout = Layout(parents=1, parts=parts, copies=4, shared=shared * hidden)
    upcycle_block(layer, dense, layout, method, x[0], torch.ones(1))
    with torch.no_grad():
        wanted = dense(x)
    assert difference(layer, wanted, x) <= 1e-5
    assert difference(layer, wanted, x, k=4 * parts) <= 1e-5
    used = layer.router(x[0]).counts_E
    assert (used > 0).all()  # the copies serve different tokens


def of_groups(groups: int = 4) -> tuple[nn.Module, torch.Tensor]:
    """A feed-forward whose units fire in groups, in no order, each for tokens of its own; and such tokens."""
    generator = torch.Generator().manual_seed(3)
    group_H = torch.arange(HIDDEN) % groups
    group_H = group_H[torch.randperm(HIDDEN, generator=generator)]
    dense = FeedForward(WIDTH, HIDDEN, "gelu")
    noise = 0.1 * torch.randn(1, 400, WIDTH, generator=generator)
    with torch.no_grad():
        dense.w_in.weight.copy_(5 * torch.eye(WIDTH)[group_H] - 2 * torch.eye(WIDTH)[:groups].sum(0))
        dense.w_out.weight.normal_(generator=generator)
    return dense, 2 * torch.eye(WIDTH)[torch.arange(400) % groups] + noise


def test_units_that_fire_together_become_one_expert_and_all_experts_have_one_size():
    active_HN = torch.eye(4)[torch.arange(HIDDEN) * 7 % 4] @ torch.rand(4, 100).sub(0.5)
    clusters = equal_clusters(active_HN + 0.01 * torch.randn(HIDDEN, 100), 4)
    assert sorted(torch.cat(clusters).tolist()) == list(range(HIDDEN))
    for cluster in clusters:
        assert len(cluster) == HIDDEN // 4
        assert len({int(unit) * 7 % 4 for unit in cluster}) == 1


def test_where_a_token_has_fewer_experts_than_there_are_parts_it_gets_those_that_fire_for_it():
    dense, x = of_groups()
    with torch.no_grad():
        wanted = dense(x)
    apart = {}
    for method in ("split", "cluster"):
        layer = moe_layer("gelu", 4, 1, expert_hidden=HIDDEN // 4)
        upcycle_block(layer, dense, Layout(parents=1, parts=4, copies=1), method, x[0], torch.ones(1))
        apart[method] = difference(layer, wanted, x)
    assert apart["cluster"] < 0.05 < 0.5 < apart["split"]


@pytest.mark.parametrize(
    "options", [{}, {"shared_experts": 1}, {"bias": True}, {"router": TopKConfig(drn=True)}], ids=str
)
def test_experts_that_are_split_or_copied_give_what_they_gave(options):
    x = tokens()
    old = moe_layer("swiglu", 4, 2, expert_hidden=24, **options)
    for parameter in old.experts.parameters():
        nn.init.normal_(parameter, std=0.5)
    with torch.no_grad():
        wanted, routing = old(x)
    for experts, target, hidden, layout, most in (
        (4, 2, 24, Layout(parents=4, parts=1, copies=1), 0.0),
        (12, 6, 8, Layout(parents=4, parts=3, copies=1), 1e-5),
        (8, 2, 24, Layout(parents=4, parts=1, copies=2), 0.5),  # tokens between two copies have experts of both
    ):
        shape = {"expert_hidden": hidden} | ({"shared_hidden": 24} if "shared_experts" in options else {})
        new = moe_layer("swiglu", experts, target, **shape, **options)
        upcycle_block(new, old, layout, "split", x[0], routing.counts_E.float())
        assert difference(new, wanted, x) <= most


def test_of_too_many_experts_the_least_used_are_left_out():
    old, x = moe_layer("gelu", 4, 2, expert_hidden=24), tokens()
    new = moe_layer("gelu", 2, 2, expert_hidden=24)
    upcycle_block(new, old, Layout(parents=2, parts=1, copies=1), "split", x[0], torch.tensor([3.0, 1.0, 0.0, 2.0]))
    assert torch.equal(new.experts.w_in, old.experts.w_in[[0, 3]])
    assert torch.equal(new.router.weight, old.router.weight[[0, 3]])


def test_noise_has_the_given_share_of_the_weights_spread():
    experts = moe_layer("gelu", 4, 2, expert_hidden=240).experts
    before = experts.w_in.detach().clone()
    add_noise(experts, 0.1)
    assert (experts.w_in - before).std().item() == pytest.approx(0.1 * before.std().item(), rel=0.05)
