"""Bytes of activations as they are predicted, against what autograd really keeps."""

import pytest
import torch

from dit_moe.costs import activation_bytes
from dit_moe.models import MODELS, DiTConfig, LMConfig
from dit_moe.moe import MoEConfig, calibrate
from dit_moe.moe.routers.dtopp import DTopPConfig
from dit_moe.moe.routers.topk import TopKConfig

BATCH = 4
LATENTS = {"in_channels": 4, "input_size": 16, "num_classes": 10, "learn_sigma": True}
VOCAB, LENGTH = 120, 64
TOPK, LAYERWISE = TopKConfig(), DTopPConfig(layerwise=True)
DIT_KINDS = {
    "dense": {"name": "DiT-custom/2"},
    "qk_norm": {"name": "DiT-custom/2", "qk_norm": True},
    "topk": {"name": "DiT-custom/2-8E2A", "moe": MoEConfig(router=TOPK)},
    "dtopp": {"name": "DiT-custom/2-8E2A", "moe": MoEConfig(router=LAYERWISE)},
    "many": {"name": "DiT-custom/2-64E8A", "moe": MoEConfig(router=LAYERWISE, every=2)},
    "swiglu": {
        "name": "DiT-custom/2-8E1.5A",
        "moe": MoEConfig(router=LAYERWISE, activation="swiglu", shared_experts=1),
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
    """A small model of a kind."""
    shape = {"width": width, "depth": 2, "heads": width // 32, "recompute": recompute}
    if kind in DIT_KINDS:
        return DiTConfig(**DIT_KINDS[kind], **shape, **LATENTS)
    return LMConfig(**LM_KINDS[kind], **shape, vocab_size=VOCAB, max_length=LENGTH)


def inputs_of(config: DiTConfig | LMConfig) -> tuple[torch.Tensor, ...]:
    if isinstance(config, LMConfig):
        return (torch.randint(VOCAB, (BATCH, LENGTH)),)
    side = config.need("input_size")
    return torch.randn(BATCH, 4, side, side), 1000 * torch.rand(BATCH), torch.randint(10, (BATCH,))


def saved_bytes(config: DiTConfig | LMConfig, bf16: bool, active: float | None = None) -> int:
    """What one forward pass keeps, and with recompute also what the pass through its first block keeps again."""
    torch.manual_seed(0)
    model, inputs = MODELS.build(config), inputs_of(config)
    calibrate(model, lambda: model(*inputs), active)
    model.train()
    existing = [*model.parameters(), *model.buffers(), *inputs]
    kept, entered = Kept(*existing), []
    model.blocks[0].register_forward_pre_hook(lambda block, args: entered.append(args))
    with kept.hooks, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out, aux = model(*inputs, return_aux=True)
    if not config.recompute:
        return kept.bytes()
    again = Kept(*existing, *filter(torch.is_tensor, entered[0]))
    with again.hooks, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        block_out = model.blocks[0](*entered[0])
    assert out is not None and aux is not None and block_out is not None  # the graphs live until here
    return kept.bytes() + again.bytes()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("width", [64, 160, 256])
@pytest.mark.parametrize("kind", [*DIT_KINDS, *LM_KINDS])
def test_activation_memory_is_what_autograd_keeps(kind, width, precision, recompute):
    config = shaped(kind, width, recompute)
    measured = saved_bytes(config, precision == "bf16")
    assert activation_bytes(config, BATCH, precision) == pytest.approx(measured, rel=0.02)  # worst seen 1.1 %


@pytest.mark.parametrize("kind", ["many", "lm_shared"])
def test_activation_memory_is_what_autograd_keeps_at_another_number_of_active_experts(kind):
    config = shaped(kind, 64, recompute=False)
    active = 1.5 * config.moe.target
    assert activation_bytes(config, BATCH, "bf16", active=active) == pytest.approx(
        saved_bytes(config, bf16=True, active=active), rel=0.02
    )


def test_recompute_keeps_one_block_and_the_inputs_of_all():
    shape = {"width": 128, "heads": 4, **LATENTS}
    bytes_of = {
        (depth, recompute): activation_bytes(
            DiTConfig(name="DiT-custom/2", depth=depth, recompute=recompute, **shape), 1000, "fp32"
        )
        for depth in (10, 20)
        for recompute in (False, True)
    }
    assert bytes_of[20, True] - bytes_of[10, True] == 10 * 1000 * 64 * 128 * 4
    assert bytes_of[20, False] - bytes_of[10, False] > 15 * (bytes_of[20, True] - bytes_of[10, True])


@pytest.mark.parametrize("kind", ["dense", "dtopp", "lm_dense", "lm_dtopp"])
def test_memory_grows_evenly_with_the_rows_of_a_forward_pass(kind):
    config = shaped(kind, 64, recompute=False)
    one, two, nine = (activation_bytes(config, rows, "bf16") for rows in (1, 2, 9))
    assert nine - one == pytest.approx(8 * (two - one))
