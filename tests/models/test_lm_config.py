"""Names, shapes and predicted costs of language models, held against built modules."""

from dataclasses import dataclass, replace
from typing import Annotated, Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dit_moe.config import ConfigError, build, dump
from dit_moe.models import MODELS, LMConfig
from dit_moe.moe import MoEConfig, measure_active
from dit_moe.moe.routers.topk import TopKConfig


@dataclass(frozen=True)
class Section:
    model: Annotated[Any, MODELS]


NEOX = {"vocab_size": 50304, "max_length": 2048}
TINY = {"width": 32, "depth": 3, "heads": 4, "vocab_size": 40, "max_length": 12}
VARIANTS = [
    {"name": "LM-custom"},
    {"name": "LM-custom", "tied": True},
    {"name": "LM-custom", "kv_heads": 2, "mlp_hidden": 56},
    {"name": "LM-custom", "kv_heads": 1, "qk_norm": False, "clip_qkv": 8.0},
    {"name": "LM-custom-8E2A"},
    {"name": "LM-custom-8E2A", "tied": True, "kv_heads": 2, "recompute": True},
    {"name": "LM-custom-8E1.5A", "moe": MoEConfig(activation="gelu", shared_experts=2)},
    {"name": "LM-custom-4E2A", "moe": MoEConfig(router=TopKConfig(), every=2, offset=1)},
    {"name": "LM-custom-4E2A", "moe": MoEConfig(router=TopKConfig(drn=True), expert_hidden=24)},
    {"name": "LM-custom", "moe": MoEConfig(experts=16, target=4, granularity=8.0)},
]
NAMES = ["LM-tiny", "LM-tiny-8E2A", "LM-0.4B", "LM-0.4B-64E8A", "LM-1.3B", "LM-1.3B-6.9B-32E4A", "LM-1.3B-6.9B-128E16A"]
NAMES += ["LM-2.4B", "LM-2.4B-13.4B-64E8A"]


def built_parameters(config: LMConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in MODELS.build(config).parameters())


def test_the_paper_s_model_has_6_9_billion_parameters_of_which_1_3_are_active():
    config = LMConfig(name="LM-1.3B-6.9B-64E8A", **NEOX)
    with torch.device("meta"):
        model = MODELS.build(config)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    total, active = sum(sizes.values()), sum(sizes.values()) - experts * (1 - 8 / 64)
    assert total == config.footprint().total_params == pytest.approx(6.9e9, rel=0.02)
    assert active == config.footprint().active_params == pytest.approx(1.3e9, rel=0.02)
    assert (config.depth, config.width, config.heads, config.expert_hidden) == (16, 2048, 16, 1024)
    assert (model.head.weight.shape, config.tied, config.moe.activation) == ((50304, 2048), False, "swiglu")


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_predicted_parameters_equal_the_built_model_s(options):
    config = LMConfig(**TINY, **options)
    assert config.footprint().total_params == built_parameters(config)


@pytest.mark.parametrize("name", NAMES)
def test_predicted_parameters_of_every_size_equal_the_built_model_s(name):
    config = LMConfig(name=name, **NEOX)
    assert config.footprint().total_params == built_parameters(config)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_predicted_flops_equal_the_counted_ones_at_the_target(options):
    config = LMConfig(**TINY, **options)
    if config.moe is not None:  # the loop is what the counter sees through, and top-k meets a whole target exactly
        router = config.moe.router if config.moe.target % 1 else TopKConfig()
        config = replace(config, moe=replace(config.moe, implementation="reference", router=router))
    model, tokens = MODELS.build(config).eval(), torch.arange(12)[None]
    # the counter does not know the CPU's fused attention
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens)
    counted = counter.get_total_flops()
    if config.moe is not None and config.moe.target % 1:  # routed by the threshold: correct for what it chose
        counted += missing_flops(model, config, tokens)
    assert config.footprint().forward_flops == pytest.approx(counted, rel=1e-9)


def missing_flops(model, config, tokens) -> float:
    with measure_active(model) as active, torch.no_grad():
        model(tokens)
    one_expert = 2 * 2 * config.width * config.expert_hidden  # two matrices: GELU
    return (config.moe.target - active.mean) * config.tokens * config.depth * one_expert


@pytest.mark.parametrize("suffix", ["32E4A", "64E8A", "128E16A"])
@pytest.mark.parametrize("size", ["0.4B", "1.3B", "2.4B"])
def test_experts_of_every_number_have_the_dense_model_s_active_compute_and_one_total(size, suffix):
    dense, sparse, other = (LMConfig(name=f"LM-{size}{name}", **NEOX) for name in ("", f"-{suffix}", "-64E8A"))
    # what is left is the router
    assert sparse.footprint().active_params == pytest.approx(dense.footprint().active_params, rel=6e-3)
    assert sparse.footprint().forward_flops == pytest.approx(dense.footprint().forward_flops, rel=6e-3)
    assert sparse.footprint().total_params == pytest.approx(other.footprint().total_params, rel=1e-3)
    assert sparse.moe.hidden(sparse.mlp_hidden, "swiglu") * sparse.moe.target == sparse.mlp_hidden


@pytest.mark.parametrize("size", ["0.4B", "1.3B", "2.4B"])
def test_a_size_is_called_by_its_active_parameters(size):
    assert LMConfig(name=f"LM-{size}", **NEOX).footprint().active_params / 1e9 == pytest.approx(
        float(size.removesuffix("B")), rel=0.08
    )


def test_the_total_in_a_name_changes_nothing_but_is_checked():
    stated, bare = (LMConfig(name=name, **NEOX) for name in ("LM-1.3B-6.9B-64E8A", "LM-1.3B-64E8A"))
    assert replace(stated, name=bare.name) == bare
    for name in ("LM-1.3B-7.9B-64E8A", "LM-1.3B-6.9B"):
        with pytest.raises(ConfigError, match=r"^name=.* states [67]\.9 B parameters, but it has .* B; correct it"):
            LMConfig(name=name, **NEOX)
    LMConfig(name="LM-1.3B-7.9B-64E8A")  # without a vocabulary it cannot be known


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"name": "LM-3B"}, r"model\.name=LM-3B has the unknown size 3B; sizes: tiny, 0\.4B, 1\.3B, 2\.4B, custom"),
        ({"name": "LM-1.3B/2"}, r"model\.name=LM-1\.3B/2 is not LM-<size>\[-<total>B\]\[-<experts>E<active>A\]"),
        ({"name": "LM"}, r"model\.name=LM is not LM-<size>"),
        ({"name": "LM-1.3B", "width": 96}, r"model\.width=96 contradicts name=LM-1\.3B, which has 2048; drop one"),
        ({"name": "LM-custom", "width": 96, "heads": 4}, r"model\.depth=None must be given, since LM-custom names no"),
        ({"name": "LM-tiny-8E9A"}, r"model\.moe\.target=9\.0 exceeds experts=8"),
        ({"name": "LM-tiny-8E2A", "moe": {"experts": 16}}, r"model\.moe\.experts=16 contradicts name=LM-tiny-8E2A"),
        ({"name": "LM-tiny", "moe": {"experts": 8}}, r"model\.moe\.target is missing; give it, or a name such as"),
        ({"name": "LM-tiny", "kv_heads": 3}, r"model\.kv_heads=3 does not divide heads=4"),
        ({"name": "LM-tiny", "vocab_size": 0}, r"model\.vocab_size=0 must be above 0"),
        ({"name": "LM-tiny", "clip_qkv": -1.0}, r"model\.clip_qkv=-1\.0 must be above 0"),
        ({"name": "LM-tiny", "norm_eps": 0.0}, r"model\.norm_eps=0\.0 must be above 0"),
        ({"name": "LM-custom", "width": 36, "depth": 1, "heads": 4}, r"model\.width=36 / heads=4 must be even for the"),
        ({"name": "LM-custom", "width": 100, "depth": 1, "heads": 3}, r"width=100 is not a multiple of heads=3"),
        ({"name": "LM-custom-4E2A", "width": 36, "depth": 1, "heads": 2}, r"model\.width=36 must be a multiple of 8"),
        ({"name": "LM-tiny-8E2A", "moe": {"offset": 4}}, r"model\.moe\.offset=4 leaves no block of depth=4 with"),
        ({"name": "LM-tiny", "num_classes": 5}, r"model\.num_classes is not a known key"),
    ],
)
def test_impossible_models_are_refused_with_the_dotted_path(tree, message):
    with pytest.raises(ConfigError, match=message):
        build(Section, {"model": tree})


def test_what_follows_from_the_data_is_asked_for_by_name():
    for missing in ("vocab_size", "max_length"):
        config = LMConfig(name="LM-tiny", **{field: 64 for field in NEOX if field != missing})
        with pytest.raises(ConfigError, match=rf"^{missing} is missing; it comes from the data"):
            config.footprint()


def test_a_resolved_config_reads_back_to_itself():
    config = LMConfig(name="LM-tiny-8E2A", **NEOX, moe=MoEConfig(router=TopKConfig(balance_loss=0.01)))
    assert build(LMConfig, dump(config)) == config


def test_model_registry_finds_a_family_by_the_start_of_the_name():
    assert MODELS.config_class("LM-1.3B-6.9B-64E8A") is LMConfig
