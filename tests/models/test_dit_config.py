"""Names, shapes and predicted costs, held against built modules."""

from dataclasses import dataclass, replace
from typing import Annotated, Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dit_moe.config import ConfigError, build, dump
from dit_moe.models import MODELS, DiTConfig
from dit_moe.moe import MoEConfig, measure_active
from dit_moe.moe.routers.topk import TopKConfig
from dit_moe.registry import Registry


@dataclass(frozen=True)
class Section:
    model: Annotated[Any, MODELS]


IMAGENET = {"in_channels": 4, "input_size": 32, "num_classes": 1000, "learn_sigma": True}
TINY = {"width": 32, "depth": 3, "heads": 2, "in_channels": 2, "input_size": 8, "num_classes": 5}


def built_parameters(config: DiTConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in MODELS.build(config).parameters())


@pytest.mark.parametrize(
    ("name", "published"),
    [("DiT-S/2", 32_963_360), ("DiT-B/2", 130_512_416), ("DiT-L/2", 458_102_816), ("DiT-XL/2", 675_129_632)],
)
def test_dense_sizes_have_the_published_number_of_parameters(name, published):
    config = DiTConfig(name=name, **IMAGENET)
    assert built_parameters(config) == config.footprint().total_params == config.footprint().active_params == published


VARIANTS = [
    {"name": "DiT-custom/2"},
    {"name": "DiT-custom/4", "qk_norm": True, "learn_sigma": True},
    {"name": "DiT-custom/2-8E2A"},
    {"name": "DiT-custom/2-8E1.5A", "moe": MoEConfig(activation="swiglu", shared_experts=2)},
    {"name": "DiT-custom/2-4E2A", "moe": MoEConfig(router=TopKConfig(), every=2, offset=1)},
    {"name": "DiT-custom/2", "moe": MoEConfig(experts=16, target=4, granularity=8.0)},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_predicted_parameters_equal_the_built_model_s(options):
    config = DiTConfig(**{**TINY, "learn_sigma": False, **options})
    assert config.footprint().total_params == built_parameters(config)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_predicted_flops_equal_the_counted_ones_at_the_target(options):
    moe = options.get("moe") or (MoEConfig() if "E" in options["name"] else None)
    if moe is not None:  # the loop is what the counter sees through, and top-k meets a whole target exactly
        moe = replace(
            moe, implementation="reference", router=TopKConfig() if "1.5" not in options["name"] else moe.router
        )
    config = DiTConfig(**{**TINY, "learn_sigma": False, **options, "moe": moe})
    model = MODELS.build(config).eval()
    x, t, y = torch.randn(1, 2, 8, 8), torch.tensor([3.0]), torch.tensor([1])
    # the counter does not know the CPU's fused attention
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x, t, y)
    counted = counter.get_total_flops()
    if config.moe is not None and config.moe.target == 1.5:  # routed by the threshold: correct for what it chose
        counted += _missing_flops(model, config, x, t, y)
    assert config.footprint().forward_flops == pytest.approx(counted, rel=1e-9)


def _missing_flops(model, config, x, t, y) -> float:
    with measure_active(model) as active, torch.no_grad():
        model(x, t, y)
    one_expert = 2 * 3 * config.width * config.moe.hidden(config.mlp_hidden)
    return (config.moe.target - active.mean) * config.tokens * config.depth * one_expert


def test_suffix_gives_the_dense_model_s_active_compute():
    dense, sparse = (DiTConfig(name=name, **IMAGENET) for name in ("DiT-S/2", "DiT-S/2-8E2A"))
    assert sparse.moe.hidden(sparse.mlp_hidden) == 4 * 384 // 2
    assert (sparse.moe.experts, sparse.moe.target) == (8, 2.0)
    # what is left is the router, less the biases that experts do not have
    assert sparse.footprint().active_params == pytest.approx(dense.footprint().active_params, rel=1e-3)
    assert sparse.footprint().forward_flops == pytest.approx(dense.footprint().forward_flops, rel=2e-3)


def test_the_paper_scale_model_has_3_4_billion_parameters_of_which_0_9_are_active():
    footprint = DiTConfig(name="DiT-H/2-64E8A", **IMAGENET).footprint()
    assert round(footprint.total_params / 1e9, 1) == 3.4
    assert round(footprint.active_params / 1e9, 1) == 0.9


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"name": "DiT-M/2"}, r"model\.name=DiT-M/2 has the unknown size M; sizes: S, B, L, XL, H, custom"),
        ({"name": "DiT-S"}, r"model\.name=DiT-S is not DiT-<size>/<patch>"),
        ({"name": "UNet"}, r"model\.name=UNet: unknown model 'UNet'"),
        ({"name": "DiT-S/2", "width": 96}, r"model\.width=96 contradicts name=DiT-S/2, which has 384"),
        ({"name": "DiT-custom/2", "width": 96, "heads": 4}, r"model\.depth=None must be given"),
        ({"name": "DiT-S/2", "input_size": 7}, r"model\.patch_size=2 does not divide input_size=7"),
        ({"name": "DiT-S/2", "num_classes": 0}, r"model\.num_classes=0 must be at least 1"),
        ({"name": "DiT-S/2-8E9A"}, r"model\.moe\.target=9\.0 exceeds experts=8"),
        ({"name": "DiT-S/2-8E2A", "moe": {"experts": 0}}, r"model\.moe\.experts=0 must be at least 1, or left out"),
        ({"name": "DiT-S/2-8E2A", "moe": {"target": 0}}, r"model\.moe\.target=0\.0 must be above 0, or left out"),
        ({"name": "DiT-S/2-8E2A", "moe": {"experts": 16}}, r"model\.moe\.experts=16 contradicts name=DiT-S/2-8E2A"),
        ({"name": "DiT-S/2", "moe": {"experts": 8}}, r"model\.moe\.target is missing"),
        ({"name": "DiT-custom/2", "width": 100, "depth": 1, "heads": 3}, r"width=100 is not a multiple of heads=3"),
    ],
)
def test_impossible_models_are_refused_with_the_dotted_path(tree, message):
    with pytest.raises(ConfigError, match=message):
        build(Section, {"model": tree})


def test_a_resolved_config_reads_back_to_itself():
    config = DiTConfig(name="DiT-S/2-8E2A", **IMAGENET, moe=MoEConfig(router=TopKConfig(balance_loss=0.01)))
    assert build(DiTConfig, dump(config)) == config


def test_model_registry_finds_a_family_by_the_start_of_the_name():
    assert isinstance(MODELS, Registry)
    assert MODELS.config_class("DiT-XL/2-64E8A") is DiTConfig
