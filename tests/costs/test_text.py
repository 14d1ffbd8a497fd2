"""What a language model's run is said to cost."""

import re
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dit_moe.config import build
from dit_moe.costs import GIB, activation_bytes, describe, memory, training_flops
from dit_moe.costs.decoder import logits_bytes
from dit_moe.experiments.text import TextExperiment, load_text_experiment, resolve_text_model
from dit_moe.models import MODELS, LMConfig
from dit_moe.moe import calibrate
from dit_moe.randomness import BatchRandom
from dit_moe.text.objective import NextToken, NextTokenConfig, next_token_losses

VOCAB, LENGTH = 50304, 2048


def experiment(name: str = "LM-1.3B-6.9B-64E8A", model=None, **sections) -> TextExperiment:
    tree = {
        "model": {"name": name, "vocab_size": VOCAB, **(model or {})},
        "data": {"path": "nowhere", "length": LENGTH},
        "train": {"steps": 1000, "batch_size": 2048, "micro_batch": 4, **sections.pop("train", {})},
        **sections,
    }
    return resolve_text_model(build(TextExperiment, tree))


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


@pytest.mark.parametrize("chunk", [2**30, 2**16, 2**14], ids=["in one piece", "in 8 parts", "in 32 parts"])
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


def test_tokens_and_flops_are_those_of_whole_sequences():
    found = experiment()
    footprint, sequence = found.model.footprint(), training_flops(found)
    text = describe(found)
    assert f"{footprint.total_params:,} in all, {footprint.active_params:,.0f} active per token" in text
    each = f"{footprint.forward_flops / LENGTH:.4g} forward, {sequence / LENGTH:.4g} in training"
    assert f"FLOPs per token   {each}; {footprint.forward_flops:.4g} and {sequence:.4g} a sequence of 2,048" in text
    assert sequence == 3 * footprint.forward_flops
    count = "1,000 steps, 2,048,000 sequences, 4,194,304,000 tokens"
    assert f"training          {count}, {sequence * 2_048_000:.4g} FLOPs" in text
    assert "image" not in text


def test_six_flops_for_each_active_parameter_and_token_are_nearly_all():
    """Chinchilla's rule, without the embedding's rows, which are looked up; the rest is attention."""
    found = experiment()
    active = found.model.footprint().active_params - VOCAB * 2048
    attention = 3 * 16 * 4 * LENGTH * 2048
    assert training_flops(found) / LENGTH == pytest.approx(6 * active + attention, rel=1e-3)  # norms


def test_hours_are_the_training_flops_over_what_the_gpus_do():
    found = experiment(train={"steps": 24_000})
    speed = 64 * 989e12 * 0.4 / training_flops(found)
    rate = f"{24_000 * 2048 / speed / 3600:.1f} hours, {speed * LENGTH:,.0f} tokens/s on 64 × H100 at 40%"
    assert f"time              {rate}" in describe(found, "H100", 64, 0.4)


def test_memory_counts_logits_and_gathered_tables_too():
    found = experiment(train={"parallel": "fsdp2"})
    footprint = found.model.footprint()
    held = memory(found, "bf16", gpus=64, rows=4)
    tables = 4 * 2 * VOCAB * 2048
    assert held["activations"] == activation_bytes(found.model, 4, "bf16")
    assert held["logits"] == logits_bytes(4 * LENGTH * VOCAB, 2)
    assert held["gathered tables"] == 2 * tables
    assert held["gathered blocks"] == 3 * (4 * footprint.total_params - tables) / 16
    assert held["weights"] == 4 * footprint.total_params / 64
    tied = experiment("LM-1.3B-64E8A", model={"tied": True}, train={"parallel": "fsdp2"})
    assert memory(tied, "bf16", gpus=64, rows=4)["gathered tables"] == tables
    assert "gathered tables" not in memory(found, "bf16", gpus=1, rows=4)
    assert memory(found, "fp32", gpus=1, rows=4)["logits"] > held["logits"]


def test_what_does_not_fit_is_said_with_settings_that_make_it_fit():
    text = describe(experiment(train={"micro_batch": 32}), "H100", 64)
    assert re.search(r"with 32 sequences at a time \(H100: 80\)", text) and "# warning: more than 90%" in text
    for option in text.split("What would fit: ")[1].splitlines()[0].split("; or "):
        changes = dict(change.split("=") for change in option.split())
        train = {"parallel": changes["train.parallel"], "micro_batch": int(changes.get("train.micro_batch", 32))}
        recompute = {"recompute": "model.recompute" in changes}
        assert "warning" not in describe(experiment(model=recompute, train=train), "H100", 64), option


def test_the_printed_config_reads_back(tmp_path):
    found = experiment("LM-tiny")
    (tmp_path / "printed.yaml").write_text(describe(found))
    assert load_text_experiment(tmp_path / "printed.yaml") == found
    assert sum(memory(found, "fp32", gpus=1, rows=1).values()) < 30 * GIB
