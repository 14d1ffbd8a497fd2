"""The layer, its sizes and its config."""

import pytest
import torch

from dit_moe.config import ConfigError, build
from dit_moe.moe import MoEConfig, MoELayer
from dit_moe.moe.router_stats import balance_loss, entropy, z_loss
from dit_moe.moe.routers.topk import TopKConfig


@pytest.mark.parametrize(
    ("options", "hidden"),
    [
        ({"target": 2}, 768),
        ({"target": 2, "activation": "swiglu"}, 512),
        ({"target": 1.5}, 1024),
        ({"target": 3, "activation": "swiglu"}, 344),  # 341.3 rounds to a multiple of 8
        ({"target": 2, "shared_experts": 1}, 512),
        ({"target": 2, "granularity": 8.0}, 192),
        ({"target": 2, "expert_hidden": 100}, 100),
    ],
)
def test_expert_width_gives_the_dense_layer_s_active_compute(options, hidden):
    assert MoEConfig(experts=8, **options).hidden(1536) == hidden


@pytest.mark.parametrize(("options", "hidden"), [({}, 48), ({"shared_hidden": 40}, 80)])
def test_shared_experts_are_added_to_the_routed_ones(options, hidden):
    torch.manual_seed(0)
    layer = MoELayer(MoEConfig(experts=4, target=2, shared_experts=2, expert_hidden=24, **options), 16, 64).eval()
    assert layer.shared.w_out.in_features == hidden
    x = torch.randn(2, 5, 16)
    routed = layer.experts(x.flatten(0, 1), layer.router(x.flatten(0, 1))).view_as(x)
    torch.testing.assert_close(layer(x)[0], routed + layer.shared(x))


def test_with_all_experts_equal_the_layer_is_a_dense_feed_forward():
    torch.manual_seed(0)
    layer = MoELayer(MoEConfig(experts=4, target=2), 16, 64)
    with torch.no_grad():
        layer.experts.w_in.copy_(layer.experts.w_in[:1].expand_as(layer.experts.w_in))
        layer.experts.w_out.copy_(layer.experts.w_out[:1].expand_as(layer.experts.w_out))
    x = torch.randn(3, 7, 16)
    dense = torch.nn.functional.gelu(x @ layer.experts.w_in[0], approximate="tanh") @ layer.experts.w_out[0]
    torch.testing.assert_close(layer(x)[0], dense, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "every,offset,blocks", [(1, 0, [0, 1, 2, 3, 4]), (2, 1, [1, 3]), (3, 0, [0, 3]), (1, 3, [3, 4])]
)
def test_which_blocks_are_moe(every, offset, blocks):
    config = MoEConfig(experts=4, target=2, every=every, offset=offset)
    assert [i for i in range(5) if config.is_moe(i)] == blocks


def test_losses_have_their_textbook_values():
    prob = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]])
    even = torch.full((4,), 0.25)
    assert balance_loss(even, prob.mean(0)).item() == pytest.approx(1.0)
    assert balance_loss(torch.tensor([1.0, 0, 0, 0]), torch.tensor([1.0, 0, 0, 0])).item() == pytest.approx(4.0)
    assert entropy(prob).mean().item() == pytest.approx(0.6931472, abs=1e-6)
    assert z_loss(torch.zeros(3, 4)).item() == pytest.approx(1.3862944**2, abs=1e-5)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"experts": 8, "target": 9}, r"model\.moe\.target=9\.0 exceeds experts=8; lower it or add experts"),
        ({"experts": 8, "target": 2.5, "router": "topk"}, r"model\.moe\.target=2\.5 must be a whole number"),
        ({"experts": 4, "target": 2, "router": {"name": "topp", "max_experts": 5}}, r"router\.max_experts=5 exceeds"),
        ({"experts": 4, "target": 4, "router": {"name": "topp", "max_experts": 3}}, r"outside what the router allows"),
        ({"experts": 4, "target": 4, "router": {"min_experts": 9}}, r"min_experts=9 exceeds experts=4"),
        ({"experts": 4, "target": 2, "router": "topq"}, r"model\.moe\.router\.name=topq: unknown router"),
        ({"experts": 4, "target": 2, "activation": "relu"}, r"activation=relu is not one of gelu, silu, swiglu"),
        ({"experts": 4, "target": 2, "expert_hidden": 0}, r"expert_hidden=0 must be above 0"),
        ({"experts": 4, "target": 2, "shared_hidden": 8}, r"shared_hidden=8 means nothing with shared_experts=0"),
        ({"experts": 4, "target": 2, "capacity_factor": 0.9}, r"model\.moe\.capacity_factor=0\.9 must be at least 1"),
        (
            {"experts": 4, "target": 2, "capacity_factor": 2, "implementation": "by_expert"},
            r"implementation=by_expert reads on the host .* capacity_factor=2 avoids; drop one of the two",
        ),
    ],
)
def test_impossible_layers_are_refused_with_the_dotted_path(tree, message):
    with pytest.raises(ConfigError, match=message):
        build(MoEConfig, tree, "model.moe")


def test_router_choice_accepts_a_bare_name():
    assert build(MoEConfig, {"experts": 4, "target": 2, "router": "topk"}).router == TopKConfig().resolved(4, 2)
