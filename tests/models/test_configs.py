"""Names, shapes and predicted costs of both families, held against built modules."""

from dataclasses import dataclass, replace
from typing import Annotated, Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dit_moe.config import ConfigError, build, dump
from dit_moe.models import MODELS, DiTConfig, LMConfig
from dit_moe.moe import MATRICES, MoEConfig, measure_active
from dit_moe.moe.routers.topk import TopKConfig


@dataclass(frozen=True)
class Section:
    model: Annotated[Any, MODELS]


IMAGENET = {"in_channels": 4, "input_size": 32, "num_classes": 1000, "learn_sigma": True}
NEOX = {"vocab_size": 50304, "max_length": 2048}
TINY_DIT = {"width": 32, "depth": 3, "heads": 2, "in_channels": 2, "input_size": 8, "num_classes": 5}
TINY_LM = {"width": 32, "depth": 3, "heads": 4, "vocab_size": 40, "max_length": 12}


def config_of(name: str, **options: Any):
    """With the data's shape, and small if the name is of no size."""
    family, tiny, data = (DiTConfig, TINY_DIT, IMAGENET) if name.startswith("DiT") else (LMConfig, TINY_LM, NEOX)
    return family(**{"name": name, **(tiny if "custom" in name else data), **options})


def built_parameters(config) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in MODELS.build(config).parameters())


VARIANTS = [
    {"name": "DiT-custom/2"},
    {"name": "DiT-custom/4", "qk_norm": True, "learn_sigma": True},
    {"name": "DiT-custom/2", "position_embedding": "both", "norm": "rms_norm", "activation": "swiglu"},
    {"name": "DiT-custom/2-8E2A"},
    {
        "name": "DiT-custom/2-4E2A",
        "position_embedding": "rotary",
        "qk_norm": "layer_norm",
        "activation": "swiglu",
        "moe": MoEConfig(router=TopKConfig(), every=2),
    },
    {"name": "DiT-custom/2-8E1.5A", "moe": MoEConfig(activation="swiglu", shared_experts=2)},
    {"name": "DiT-custom/2-4E2A", "moe": MoEConfig(router=TopKConfig(), every=2, offset=1)},
    {"name": "DiT-custom/2", "moe": MoEConfig(experts=16, target=4, granularity=8.0)},
    {"name": "DiT-custom/2-8E1.5A", "activation": "silu", "moe": MoEConfig(activation="swiglu", bias=True, every=2)},
    {"name": "DiT-custom/2-4E2A", "moe": MoEConfig(router=TopKConfig(), shared_experts=2, shared_hidden=72, bias=True)},
    {"name": "LM-custom"},
    {"name": "LM-custom", "tied": True},
    {"name": "LM-custom", "kv_heads": 2, "mlp_hidden": 56},
    {"name": "LM-custom", "kv_heads": 1, "qk_norm": False, "clip_qkv": 8.0},
    {"name": "LM-custom-8E2A", "tied": True, "kv_heads": 2, "recompute": True},
    {"name": "LM-custom-8E1.5A", "moe": MoEConfig(activation="gelu", shared_experts=2)},
    {"name": "LM-custom-4E2A", "moe": MoEConfig(router=TopKConfig(drn=True), expert_hidden=24)},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_predicted_parameters_and_flops_at_the_target_equal_the_built_model_s(options):
    config = config_of(**options)
    assert config.footprint().total_params == built_parameters(config)
    whole = config.moe is None or config.moe.target % 1 == 0
    if config.moe is not None:  # the loop is what the counter sees through, and top-k meets a whole target exactly
        router = TopKConfig() if whole else config.moe.router
        config = replace(config, moe=replace(config.moe, implementation="reference", router=router))
    model = MODELS.build(config).eval()
    images = torch.randn(1, 2, 8, 8), torch.tensor([3.0]), torch.tensor([1])
    inputs = images if isinstance(config, DiTConfig) else (torch.arange(12)[None],)
    # the counter does not know the CPU's fused attention
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    counted = counter.get_total_flops()
    if not whole:  # routed by the threshold: correct for what it chose
        with measure_active(model) as active, torch.no_grad():
            model(*inputs)
        one_expert = 2 * MATRICES[config.moe.activation] * config.width * config.expert_hidden
        counted += (config.moe.target - active.mean) * config.tokens * (config.depth - config.dense_blocks) * one_expert
    assert config.footprint().forward_flops == pytest.approx(counted, rel=1e-9)


NAMES = ["LM-tiny", "LM-tiny-8E2A", "LM-0.4B-64E8A", "LM-1.3B", "LM-1.3B-6.9B-32E4A", "LM-2.4B", "LM-2.4B-13.4B-64E8A"]


@pytest.mark.parametrize("name", NAMES)
def test_predicted_parameters_of_every_size_equal_the_built_model_s(name):
    config = config_of(name)
    assert config.footprint().total_params == built_parameters(config)


@pytest.mark.parametrize(
    ("name", "published"),
    [("DiT-S/2", 32_963_360), ("DiT-B/2", 130_512_416), ("DiT-L/2", 458_102_816), ("DiT-XL/2", 675_129_632)],
)
def test_dense_sizes_have_the_published_number_of_parameters(name, published):
    config = config_of(name)
    assert built_parameters(config) == config.footprint().total_params == config.footprint().active_params == published


@pytest.mark.parametrize(
    ("name", "total", "active", "rel"),
    [
        ("DiT-H/2-64E8A", 3.4e9, 0.9e9, 0.06),
        ("LM-1.3B-6.9B-64E8A", 6.9e9, 1.3e9, 0.02),
        *((f"LM-{billions}B", billions * 1e9, billions * 1e9, 0.08) for billions in (0.4, 1.3, 2.4)),
    ],
)
def test_sizes_have_the_numbers_of_parameters_that_they_are_called_by(name, total, active, rel):
    footprint = config_of(name).footprint()
    assert (footprint.total_params, footprint.active_params) == pytest.approx((total, active), rel=rel)


def test_the_paper_s_language_model_has_its_published_shape():
    config = config_of("LM-1.3B-6.9B-64E8A")
    with torch.device("meta"):
        model = MODELS.build(config)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    assert config.footprint().active_params == sum(sizes.values()) - experts * (1 - 8 / 64)
    assert (config.depth, config.width, config.heads, config.expert_hidden) == (16, 2048, 16, 1024)
    assert (model.head.weight.shape, config.tied, config.moe.activation) == ((50304, 2048), False, "swiglu")


@pytest.mark.parametrize(
    ("size", "suffix", "rel"),
    [
        ("DiT-S/2", "8E2A", 2e-3),  # what is left is the router, less the biases that experts do not have
        *((size, suffix, 6e-3) for size in ("LM-0.4B", "LM-1.3B", "LM-2.4B") for suffix in ("32E4A", "128E16A")),
    ],
)
def test_experts_of_every_number_have_the_dense_model_s_active_compute_and_one_total(size, suffix, rel):
    dense, sparse, other = (config_of(size + name) for name in ("", f"-{suffix}", "-64E8A"))
    assert sparse.footprint().active_params == pytest.approx(dense.footprint().active_params, rel=rel)
    assert sparse.footprint().forward_flops == pytest.approx(dense.footprint().forward_flops, rel=rel)
    assert sparse.expert_hidden * sparse.moe.target == sparse.mlp_hidden
    if suffix != "8E2A":  # a quarter of the experts
        assert sparse.footprint().total_params == pytest.approx(other.footprint().total_params, rel=1e-3)


def test_the_total_in_a_name_changes_nothing_but_is_checked():
    stated, bare = (config_of(name) for name in ("LM-1.3B-6.9B-64E8A", "LM-1.3B-64E8A"))
    assert replace(stated, name=bare.name) == bare
    for name in ("LM-1.3B-7.9B-64E8A", "LM-1.3B-6.9B"):
        with pytest.raises(ConfigError, match=r"^name=.* states [67]\.9 B parameters, but it has .* B; correct it"):
            config_of(name)
    LMConfig(name="LM-1.3B-7.9B-64E8A")  # without a vocabulary it cannot be known


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"name": "UNet"}, r"model\.name=UNet: unknown model 'UNet'"),
        ({"name": "DiT-M/2"}, r"model\.name=DiT-M/2 has the unknown size M; sizes: S, B, L, XL, H, custom"),
        ({"name": "DiT-S"}, r"model\.name=DiT-S is not DiT-<size>/<patch>"),
        ({"name": "DiT-S/2", "width": 96}, r"model\.width=96 contradicts name=DiT-S/2, which has 384; drop one"),
        ({"name": "DiT-custom/2", "width": 96, "heads": 4}, r"model\.depth=None must be given, since DiT-custom/2"),
        ({"name": "DiT-S/2", "input_size": 7}, r"model\.patch_size=2 does not divide input_size=7"),
        ({"name": "DiT-S/2", "rotary_grid": 16}, r"model\.rotary_grid=16 means nothing to position_embedding=absolute"),
        ({"name": "DiT-S/2", "qk_norm_eps": 1e-5}, r"model\.qk_norm_eps=1e-05 needs qk_norm; set that, or drop"),
        (
            {"name": "DiT-S/2", "qk_norm": "batch_norm"},
            r"model\.qk_norm=batch_norm must be true or false, or layer_norm",
        ),
        (
            {"name": "DiT-custom/2", "width": 36, "depth": 1, "heads": 6, "position_embedding": "rotary"},
            r"model\.heads=6 leaves a head 6 of width=36; rotary needs a multiple of 4",
        ),
        ({"name": "DiT-S/2", "num_classes": 0}, r"model\.num_classes=0 must be at least 1"),
        ({"name": "DiT-S/2-8E9A"}, r"model\.moe\.target=9\.0 exceeds experts=8"),
        ({"name": "DiT-S/2-8E2A", "moe": {"experts": 0}}, r"model\.moe\.experts=0 must be at least 1, or left out"),
        ({"name": "DiT-S/2-8E2A", "moe": {"target": 0}}, r"model\.moe\.target=0\.0 must be above 0, or left out"),
        ({"name": "DiT-S/2-8E2A", "moe": {"experts": 16}}, r"model\.moe\.experts=16 contradicts name=DiT-S/2-8E2A"),
        ({"name": "DiT-S/2", "moe": {"experts": 8}}, r"model\.moe\.target is missing; give it, or a name such as"),
        ({"name": "DiT-custom/2", "width": 100, "depth": 1, "heads": 3}, r"width=100 is not a multiple of heads=3"),
        ({"name": "LM-3B"}, r"model\.name=LM-3B has the unknown size 3B; sizes: tiny, 0\.4B, 1\.3B, 2\.4B, custom"),
        ({"name": "LM-1.3B/2"}, r"model\.name=LM-1\.3B/2 is not LM-<size>\[-<total>B\]\[-<experts>E<active>A\]"),
        ({"name": "LM-tiny", "kv_heads": 3}, r"model\.kv_heads=3 does not divide heads=4"),
        ({"name": "LM-tiny", "vocab_size": 0}, r"model\.vocab_size=0 must be above 0"),
        ({"name": "LM-tiny", "clip_qkv": -1.0}, r"model\.clip_qkv=-1\.0 must be above 0"),
        ({"name": "LM-tiny", "norm_eps": 0.0}, r"model\.norm_eps=0\.0 must be above 0"),
        ({"name": "LM-custom", "width": 36, "depth": 1, "heads": 4}, r"model\.width=36 / heads=4 must be even for the"),
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


@pytest.mark.parametrize("name", ["DiT-S/2-8E2A", "LM-tiny-8E2A"])
def test_a_resolved_config_reads_back_to_itself_and_the_registry_finds_it_by_the_start_of_the_name(name):
    config = config_of(name, moe=MoEConfig(router=TopKConfig(balance_loss=0.01)))
    assert MODELS.config_class(name) is type(config)
    assert build(type(config), dump(config)) == config


@pytest.mark.parametrize("name", ["DiT-custom/2", "LM-custom"])
def test_what_auto_takes_for_the_experts_is_known_beforehand_by_the_numbers_that_a_layer_decides_by(name, monkeypatch):
    def experts(**options):
        return config_of(name, moe=MoEConfig(experts=4, target=2, **options))

    asked: list[tuple[object, ...]] = []
    for module in ("dit_moe.models.base", "dit_moe.moe.experts"):
        monkeypatch.setattr(f"{module}.fastest", lambda *by: asked.append(by) or "by_expert")
    config = experts(router=TopKConfig())
    assert config.implementation(3, "cpu", torch.bfloat16) == "by_expert"
    with torch.autocast("cpu", torch.bfloat16):
        images = torch.randn(3, 2, 8, 8), torch.ones(3), torch.ones(3, dtype=torch.long)
        tokens = torch.ones(3, 12, dtype=torch.long)
        MODELS.build(config)(*(images if name.startswith("DiT") else (tokens,)))
    assert len(asked) == 1 + config.depth and len(set(asked)) == 1
    for other, wanted in (
        (config_of(name), None),
        (experts(implementation="reference"), "reference"),
        (experts(capacity_factor=2.0), "grouped"),
    ):
        assert other.implementation(3, "cpu", torch.bfloat16) == wanted
