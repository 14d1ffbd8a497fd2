"""FLOPs at the experts that were really used, held against counted ones."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dit_moe.costs import forward_flops_at
from dit_moe.models import MODELS, DiTConfig, LMConfig
from dit_moe.moe import MoEConfig, measure_active
from dit_moe.moe.routers.topk import TopKConfig
from dit_moe.moe.routers.topp import TopPConfig

DIT = {"width": 32, "depth": 3, "heads": 2, "in_channels": 2, "input_size": 8, "num_classes": 5, "learn_sigma": False}
LM = {"width": 32, "depth": 3, "heads": 4, "vocab_size": 40, "max_length": 12}
SECTIONS = {
    "DTop-p": MoEConfig(),
    "top-k": MoEConfig(router=TopKConfig()),
    "top-p far above its target": MoEConfig(router=TopPConfig(p=0.95)),
    "top-p far below its target": MoEConfig(router=TopPConfig(p=0.01)),
    "shared experts": MoEConfig(router=TopPConfig(p=0.7), shared_experts=2),
    "some blocks dense": MoEConfig(router=TopPConfig(p=0.7), every=2, offset=1, activation="swiglu"),
    "narrow experts": MoEConfig(router=TopPConfig(p=0.7), granularity=8.0),
    "dense": None,
}


def counted(config, *inputs) -> tuple[float, float | None]:
    """FLOPs of a forward pass and the mean number of active experts in it."""
    torch.manual_seed(0)
    model = MODELS.build(config).eval()
    # the counter does not know the CPU's fused attention
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter, torch.no_grad(), measure_active(model) as seen:
        model(*inputs)
    return counter.get_total_flops(), seen.mean


@pytest.mark.parametrize("section", SECTIONS.values(), ids=SECTIONS)
@pytest.mark.parametrize("family", [DiTConfig, LMConfig])
def test_flops_at_the_measured_experts_are_those_counted_in_the_forward_pass(family, section):
    suffix = "" if section is None else "-8E2A"
    moe = section and replace(section, implementation="reference")  # the loop is what the counter sees through
    if family is DiTConfig:
        config = DiTConfig(name=f"DiT-custom/2{suffix}", moe=moe, **DIT)
        flops, active = counted(config, torch.randn(1, 2, 8, 8), torch.tensor([3.0]), torch.tensor([1]))
    else:
        config = LMConfig(name=f"LM-custom{suffix}", moe=moe, **LM)
        flops, active = counted(config, torch.arange(12)[None])
    assert (active is None) == (section is None)
    assert forward_flops_at(config, active) == pytest.approx(flops, rel=1e-9)  # a mean of counts, so to rounding


def test_flops_at_the_target_are_the_footprint_s():
    config = DiTConfig(name="DiT-S/2-8E2A", in_channels=4, input_size=32, num_classes=1000, learn_sigma=True)
    assert forward_flops_at(config, 2.0) == config.footprint().forward_flops


def test_twice_the_experts_add_the_experts_cost_and_nothing_else():
    dense = DiTConfig(name="DiT-custom/2", **DIT)
    config = DiTConfig(name="DiT-custom/2-8E2A", **DIT)
    more = forward_flops_at(config, 4.0) - forward_flops_at(config, 2.0)
    assert more == 2 * config.tokens * 3 * 2 * 32 * dense.mlp_hidden  # what two experts, and the dense one, cost


@pytest.mark.parametrize(
    ("name", "active", "message"),
    [
        ("DiT-custom/2-8E2A", None, "with experts"),
        ("DiT-custom/2-8E2A", -0.1, "active=-0.1 must lie"),
        ("DiT-custom/2-8E2A", 8.1, "active=8.1 must lie"),
        ("DiT-custom/2", 2.0, "without experts"),
    ],
)
def test_a_mean_that_the_model_cannot_have_is_refused(name, active, message):
    with pytest.raises(ValueError, match=message):
        forward_flops_at(DiTConfig(name=name, **DIT), active)
