"""Bytes of memory as they are predicted, against what autograd and the allocator keep, and against arithmetic."""

import os
import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dit_moe.costs import activation_bytes, machine_memory, memory
from dit_moe.costs.memory import logits_bytes
from dit_moe.models import MODELS, DiTConfig, LMConfig
from dit_moe.moe import ROUTERS, MoEConfig, calibrate, update_routers
from dit_moe.moe.routers.dtopp import DTopPConfig
from dit_moe.moe.routers.topk import TopKConfig
from dit_moe.randomness import BatchRandom
from dit_moe.text.objective import NextToken, NextTokenConfig, next_token_losses
from tests.costs.experiments import LENGTH as TEXT_LENGTH
from tests.costs.experiments import VOCAB as TEXT_VOCAB
from tests.costs.experiments import image_experiment, text_experiment

BATCH = 4
LATENTS = {"in_channels": 4, "input_size": 16, "num_classes": 10, "learn_sigma": True}
VOCAB, LENGTH = 120, 64
TOPK, LAYERWISE = TopKConfig(), DTopPConfig(layerwise=True)
GATED = MoEConfig(router=LAYERWISE, activation="swiglu", shared_experts=1)
DIT_KINDS = {
    "dense": {"name": "DiT-custom/2"},
    "qk_norm": {"name": "DiT-custom/2", "qk_norm": True},
    "rotary": {"name": "DiT-custom/2", "position_embedding": "rotary"},
    "layer_norm": {"name": "DiT-custom/2", "position_embedding": "both", "qk_norm": "layer_norm"},
    "modern": {
        "name": "DiT-custom/2",
        "position_embedding": "both",
        "norm": "rms_norm",
        "activation": "swiglu",
        "qk_norm": True,
    },
    "topk": {"name": "DiT-custom/2-8E2A", "moe": MoEConfig(router=TOPK)},
    "dtopp": {"name": "DiT-custom/2-8E2A", "moe": MoEConfig(router=LAYERWISE)},
    "many": {"name": "DiT-custom/2-64E8A", "moe": MoEConfig(router=LAYERWISE, every=2)},
    "swiglu": {
        "name": "DiT-custom/2-8E1.5A",
        "moe": MoEConfig(router=LAYERWISE, activation="swiglu", shared_experts=1, shared_hidden=56, bias=True),
    },
}
LM_KINDS = {
    "lm_dense": {"name": "LM-custom"},
    "lm_grouped": {"name": "LM-custom", "kv_heads": 1, "tied": True, "clip_qkv": 8.0},
    "lm_no_norm": {"name": "LM-custom", "qk_norm": False},
    "lm_topk": {"name": "LM-custom-8E2A", "moe": MoEConfig(router=TOPK)},
    "lm_dtopp": {"name": "LM-custom-64E8A", "moe": MoEConfig(router=LAYERWISE, every=2)},
    "lm_shared": {"name": "LM-custom-8E1.5A", "moe": MoEConfig(router=LAYERWISE, activation="gelu", shared_experts=1)},
}


class Kept:
    """The distinct storages that autograd saves while entered, apart from those that exist anyway."""

    def __init__(self, *existing: torch.Tensor) -> None:
        self.existing = {tensor.untyped_storage().data_ptr() for tensor in existing}
        self.found: dict[int, torch.Tensor] = {}  # held, so that no address is used twice
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in self.existing:
            self.found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.found.values())


def shaped(kind: str, width: int, recompute: bool) -> DiTConfig | LMConfig:
    """A small model of a kind, or with a router of that name."""
    shape = {"width": width, "depth": 2, "heads": width // 32, "recompute": recompute}
    kinds = DIT_KINDS | LM_KINDS
    options = kinds.get(kind) or {"name": "DiT-custom/2-8E2A", "moe": MoEConfig(router=ROUTERS.config_class(kind)())}
    if "moe" in options:
        options = options | {"moe": replace(options["moe"], implementation="grouped")}  # as on GPUs
    if kind in LM_KINDS:
        return LMConfig(**options, **shape, vocab_size=VOCAB, max_length=LENGTH)
    return DiTConfig(**options, **shape, **LATENTS)


def inputs_of(config: DiTConfig | LMConfig) -> dict[str, torch.Tensor]:
    if isinstance(config, LMConfig):
        return {"tokens": torch.randint(VOCAB, (BATCH, LENGTH))}
    shape = BATCH, 4, config.need("input_size"), config.need("input_size")
    times, labels = 1000 * torch.rand(BATCH), torch.randint(10, (BATCH,))
    return {"x": torch.randn(shape), "t": times, "y": labels, "target": torch.randn(shape)}


def saved_bytes(config: DiTConfig | LMConfig, bf16: bool, active: float | None = None) -> tuple[int, float | None]:
    """What one forward pass keeps, and with recompute also what the pass through its first block keeps again.

    And how many experts were active: `active`, or the target, if the router is one whose threshold follows it.
    """
    torch.manual_seed(0)
    model, inputs = MODELS.build(config), inputs_of(config)
    calibrate(model, lambda: model(**inputs), active)
    model.train()
    existing = [*model.parameters(), *model.buffers(), *inputs.values()]
    kept, entered = Kept(*existing), []
    model.blocks[0].register_forward_pre_hook(lambda block, args: entered.append(args))
    with kept.hooks, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out, aux = model(**inputs, return_aux=True)
    if not config.recompute:
        return kept.bytes(), update_routers(model).get("active")
    again = Kept(*existing, *filter(torch.is_tensor, entered[0]))
    with again.hooks, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        block_out = model.blocks[0](*entered[0])
    assert out is not None and aux is not None and block_out is not None  # the graphs live until here
    return kept.bytes() + again.bytes(), update_routers(model).get("active")


@pytest.mark.parametrize(
    "width, precision, recompute", [(64, "fp32", True), (64, "bf16", False), (160, "fp32", False), (160, "bf16", True)]
)
@pytest.mark.parametrize("kind", [*DIT_KINDS, *LM_KINDS])
def test_activation_memory_is_what_autograd_keeps(kind, width, precision, recompute):
    config = shaped(kind, width, recompute)
    measured, _ = saved_bytes(config, precision == "bf16")
    assert activation_bytes(config, BATCH, precision) == pytest.approx(measured, rel=0.02)  # worst seen 1.1 %


@pytest.mark.parametrize("capacity", [False, True])
@pytest.mark.parametrize("kind", ["many", "lm_shared"])
def test_activation_memory_is_what_autograd_keeps_at_another_number_of_active_experts(kind, capacity):
    config = shaped(kind, 64, recompute=False)
    active = 1.5 * config.moe.target
    if capacity:
        config, active = replace(config, moe=replace(config.moe, capacity_factor=1.5)), None
    assert activation_bytes(config, BATCH, "bf16", active=active) == pytest.approx(
        saved_bytes(config, bf16=True, active=active)[0], rel=0.02
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("router", ROUTERS.names())
def test_with_every_router_activations_and_weights_are_what_is_predicted(router, precision):
    config = shaped(router, 64, recompute=False)
    measured, active = saved_bytes(config, precision == "bf16")
    predicted = activation_bytes(config, BATCH, precision, active=active)
    assert predicted == pytest.approx(measured, rel=0.02)  # worst seen 1.6 %
    parameters = sum(parameter.numel() for parameter in MODELS.build(config).parameters())
    assert config.footprint().total_params == parameters


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["many", "swiglu", "lm_topk"])
def test_experts_that_are_computed_again_keep_their_rows_of_one_layer_at_a_time_and_learn_the_same(kind, precision):
    plain = shaped(kind, 160, recompute=False)
    config = replace(plain, moe=replace(plain.moe, recompute=True))
    bf16 = precision == "bf16"
    torch.manual_seed(0)
    model, inputs = MODELS.build(config), inputs_of(config)
    calibrate(model, lambda: model(**inputs))
    layer = next(block.moe for block in model.blocks if block.moe is not None)
    seen = []
    layer.experts.register_forward_pre_hook(lambda experts, args: seen.append(args))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        again = Kept(*model.parameters(), *model.buffers(), *inputs.values())
        with again.hooks:
            first, _ = model.train()(**inputs, return_aux=True)
        x_ND, routing = seen[0]
        of_layer = Kept(*model.parameters(), x_ND, routing.token_R, routing.weight_R, routing.expert_R)
        with of_layer.hooks:
            out_ND = layer.experts(x_ND, routing)
        layers = [block.moe for block in model.blocks if block.moe is not None]
        indices = sum(20 * int(each.router.stats._get(1)) for each in layers)  # held by no graph until then
        assert activation_bytes(config, BATCH, precision) == pytest.approx(
            again.bytes() + of_layer.bytes() + indices, rel=0.03
        )
        first.square().mean().backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        other = MODELS.build(plain).train()
        other.load_state_dict(model.state_dict())
        other(**inputs, return_aux=True)[0].square().mean().backward()
    assert out_ND.shape == x_ND.shape
    for found, wanted in zip(gradients, (each.grad for each in other.parameters()), strict=True):
        assert (found is None and wanted is None) or torch.equal(found, wanted)


# ------------------------------------------------------------------------- logits, and a whole step


class Live(TorchDispatchMode):
    """Counts the bytes of tensors that exist at the same time, of those made while entered."""

    def __init__(self):
        super().__init__()
        self.sizes, self.most = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.sizes:
                storage = tensor.untyped_storage()
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, storage._cdata)
        self.most = max(self.most, sum(self.sizes.values()))
        return out


@pytest.mark.parametrize("chunk", [2**30, 2**14], ids=["in one piece", "in 32 parts"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_and_their_loss_hold_what_is_predicted_at_most(dtype, chunk):
    states = torch.randn(1024, 4, dtype=dtype, requires_grad=True)
    matrix, targets = torch.randn(512, 4, dtype=dtype), torch.randint(512, (1024,))
    with Live() as live:
        logits = states @ matrix.T
        loss, z = next_token_losses(logits, targets, chunk)
        del logits  # as the objective does by returning
        (loss + 1e-4 * z).backward()
    assert logits_bytes(1024 * 512, dtype.itemsize, chunk) == pytest.approx(live.most, rel=0.05)  # worst seen 4.4 %


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["LM-custom", "LM-custom-8E2A"])
def test_a_whole_step_holds_no_more_than_is_said_of_all_parts(name, bf16):
    config = LMConfig(name=name, depth=3, width=128, heads=4, vocab_size=1024, max_length=128)
    model, tokens = MODELS.build(config).train(), torch.randint(1024, (4, 129))
    calibrate(model, lambda: model(tokens[:, :-1]))
    with Live() as live, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        NextToken(NextTokenConfig())(model, {"tokens": tokens}, BatchRandom(0, total=4))["loss"].backward()
    gradients = 4 * config.footprint().total_params
    logits = logits_bytes(4 * 128 * 1024, 2 if bf16 else 4)
    said = activation_bytes(config, 4, "bf16" if bf16 else "fp32") + logits + gradients
    assert 0.98 * live.most <= said <= 1.5 * live.most  # gradients come as activations go


# ----------------------------------------------------------------------------- weights and their copies


def test_weights_gradients_moments_and_average_are_five_times_the_parameters_in_fp32():
    whole = 4 * image_experiment().model.footprint().total_params
    held = memory(image_experiment(), "bf16", gpus=1, rows=8)
    assert held.pop("activations") == activation_bytes(image_experiment().model, 8, "bf16")
    assert held == {"weights": whole, "gradients": whole, "AdamW": 2 * whole, "EMA": whole}
    assert memory(image_experiment(), "bf16", gpus=8, rows=8)["weights"] == whole


def test_fsdp2_shares_them_out_unless_micro_batches_add_up_gradients():
    whole = 4 * image_experiment().model.footprint().total_params
    sharded = image_experiment(train={"parallel": "fsdp2"})
    held = memory(sharded, "bf16", gpus=8, rows=32)
    for part, times in {"weights": 1, "gradients": 1, "AdamW": 2, "EMA": 1}.items():
        assert held[part] == times * whole / 8
    assert memory(sharded, "bf16", gpus=8, rows=16)["gradients"] == whole
    assert memory(sharded, "bf16", gpus=1, rows=256)["weights"] == whole


def test_memory_counts_logits_and_gathered_tables_too():
    found = text_experiment(train={"parallel": "fsdp2"})
    footprint = found.model.footprint()
    held = memory(found, "bf16", gpus=64, rows=4)
    tables = 4 * 2 * TEXT_VOCAB * 2048
    assert held["activations"] == activation_bytes(found.model, 4, "bf16")
    assert held["logits"] == logits_bytes(4 * TEXT_LENGTH * TEXT_VOCAB, 2)
    assert held["gathered tables"] == 2 * tables
    assert held["gathered blocks"] == 3 * (4 * footprint.total_params - tables) / 16
    assert held["weights"] == 4 * footprint.total_params / 64
    tied = text_experiment("LM-1.3B-64E8A", model={"tied": True}, train={"parallel": "fsdp2"})
    assert memory(tied, "bf16", gpus=64, rows=4)["gathered tables"] == tables
    assert "gathered tables" not in memory(found, "bf16", gpus=1, rows=4)
    assert memory(found, "fp32", gpus=1, rows=4)["logits"] > held["logits"]


@pytest.mark.parametrize(
    ("own", "limits", "wanted"),
    [
        ("0::/job/step", {"job/step/memory.max": "max", "job/memory.max": "3000"}, 3000),
        ("0::/", {"memory.max": "2000"}, 2000),
        ("5:cpu:/\n4:hugetlb,memory:/host/id\n0::/", {"memory/memory.limit_in_bytes": "1000"}, 1000),
        ("4:memory:/id", {"memory/id/memory.limit_in_bytes": "9223372036854771712"}, None),
        (None, {}, None),
    ],
    ids=["around", "of version 2", "of version 1", "unlimited", "no groups"],
)
def test_a_machine_has_what_its_container_or_job_may_use_of_it(tmp_path, monkeypatch, own, limits, wanted):
    for name, limit in {"own": own, **limits}.items():
        if limit is not None:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(f"{limit}\n")
    monkeypatch.setattr(machine_memory, "GROUPS", tmp_path)
    monkeypatch.setattr(machine_memory, "OWN_GROUPS", tmp_path / "own")
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert machine_memory.memory_of_machine() == (wanted or whole)
