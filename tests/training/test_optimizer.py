import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dit_moe.training import EMA, TrainConfig
from dit_moe.training.step import (
    build_optimizer,
    learning_rate,
    load_optimizer_state,
    optimizer_state,
)

rates = st.floats(1e-6, 1.0)


def config(**kwargs):
    return TrainConfig(**({"steps": 100, "lr": 1.0} | kwargs))


def decay_groups(model):
    """The trained parameters by whether they decay."""
    optimizer = build_optimizer(model, config(weight_decay=0.1))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    return dict(zip((True, False), (group["params"] for group in optimizer.param_groups), strict=True))


def test_only_weight_matrices_of_a_model_decay(build, tmp_path):
    model = build(tmp_path).model
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = {decays: {names[p] for p in parameters} for decays, parameters in decay_groups(model).items()}
    assert groups[True] | groups[False] == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not groups[True] & groups[False]
    kept = ("bias", "norm", "theta", "embedding_table", "pos_embed", "embed.weight")
    assert all(any(word in name for word in kept) for name in groups[False])
    assert not any(word in name for name in groups[True] for word in kept)
    assert any("experts" in name for name in groups[True])


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(4, 3)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embedding.weight
        self.stacked_bias = nn.Parameter(torch.zeros(2, 3))
        self.matrices = nn.Parameter(torch.ones(2, 3, 3))
        self.frozen = nn.Parameter(torch.ones(3, 3), requires_grad=False)


def test_stacked_biases_and_tied_embeddings_do_not_decay_and_frozen_weights_do_not_train():
    model = Odd()
    groups = decay_groups(model)
    assert [p is model.matrices for p in groups[True]] == [True]
    assert {id(p) for p in groups[False]} == {id(model.embedding.weight), id(model.stacked_bias)}
    assert len(groups[False]) == 2


@given(lr=rates, warmup=st.integers(1, 50), schedule=st.sampled_from(["constant", "cosine"]))
def test_warm_up_grows_linearly_from_above_zero_to_lr(lr, warmup, schedule):
    c = config(lr=lr, warmup_steps=warmup, schedule=schedule)
    values = [learning_rate(c, step) for step in range(warmup + 1)]
    assert values[:-1] == pytest.approx([lr * (step + 1) / warmup for step in range(warmup)])
    assert values[-1] == pytest.approx(lr)


@given(ratio=st.floats(0, 1), warmup=st.integers(0, 60))
def test_the_cosine_falls_from_lr_to_its_floor(ratio, warmup):
    c = config(schedule="cosine", min_lr_ratio=ratio, warmup_steps=warmup)
    values = [learning_rate(c, step) for step in range(warmup, c.steps + 1)]
    assert values == sorted(values, reverse=True)
    assert values[0] == 1
    assert values[-1] == pytest.approx(ratio, abs=1e-12)
    middle = (c.steps - warmup) / 2
    assert learning_rate(c, warmup + math.floor(middle)) >= (1 + ratio) / 2 - 1e-12


def test_a_warm_up_longer_than_the_run_is_fine():
    assert learning_rate(config(steps=2, warmup_steps=10, schedule="cosine"), 1) == pytest.approx(0.2)


def test_the_state_goes_through_named_tensors_and_back_bit_for_bit():
    def step(model, optimizer):
        optimizer.zero_grad()
        model(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()

    torch.manual_seed(0)
    model, copy = nn.Linear(3, 2), nn.Linear(3, 2)
    optimizer, other = (build_optimizer(each, config(lr=0.1, weight_decay=0.1)) for each in (model, copy))
    assert optimizer_state(model, optimizer) == {}
    step(model, optimizer)
    state = optimizer_state(model, optimizer)
    assert set(state) == {f"{name}.{slot}" for name in ("weight", "bias") for slot in ("step", "exp_avg", "exp_avg_sq")}
    copy.load_state_dict(model.state_dict())
    load_optimizer_state(copy, other, state, "runs/a")
    for _ in range(2):
        step(model, optimizer)
        step(copy, other)
    assert torch.equal(model.weight, copy.weight)
    assert torch.equal(model.bias, copy.bias)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda state: state.pop("bias.exp_avg"), "missing: bias.exp_avg"),
        (lambda state: state.update({"head.step": torch.zeros(())}), "unexpected: head.step"),
        (lambda state: state.update({"weight.exp_avg": torch.zeros(3, 2)}), r"weight.exp_avg \[3, 2\] for \[2, 3\]"),
    ],
)
def test_a_state_that_is_not_just_that_of_the_parameters_is_refused(change, problem):
    model = nn.Linear(3, 2)
    optimizer = build_optimizer(model, config())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = optimizer_state(model, optimizer)
    change(state)
    with pytest.raises(ValueError, match=f"runs/a holds another architecture .*{problem}"):
        load_optimizer_state(model, build_optimizer(model, config()), state, "runs/a")


# ------------------------------------------------------------------------------------------------- the average


class Averaged(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, 2.0]))
        self.register_buffer("p", torch.tensor(0.5, dtype=torch.float64))
        self.register_buffer("count", torch.tensor(0))


def test_parameters_are_averaged_and_buffers_copied():
    model = Averaged()
    ema = EMA(model, decay=0.9)
    expected = model.w.detach().clone()
    for n in range(200):
        with torch.no_grad():
            model.w += 1
            model.p += 0.001
            model.count += 1
        ema.update(model, n)
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * model.w.detach()
        torch.testing.assert_close(ema.module.w, expected)
        assert torch.equal(ema.module.p, model.p)
        assert torch.equal(ema.module.count, model.count)


def test_the_average_of_a_short_run_has_forgotten_the_start():
    model = Averaged()
    ema = EMA(model, decay=0.9999)
    with torch.no_grad():
        model.w.fill_(100.0)
    for n in range(50):
        ema.update(model, n)
    assert (ema.module.w > 99.999).all()


def test_the_copy_is_fp32_frozen_in_evaluation_mode_and_shares_nothing():
    model = Averaged().bfloat16()
    model.p = model.p.double()
    ema = EMA(model, decay=0.9)
    assert ema.module.w.dtype == torch.float32
    assert ema.module.p.dtype == torch.float64
    assert not ema.module.training
    assert not ema.module.w.requires_grad
    assert model.training
    assert model.w.requires_grad
    ema.update(model, 0)
    ema.update(model, 1)
    assert ema.module.p.data_ptr() != model.p.data_ptr()
