import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dit_moe.diffusion import OBJECTIVES
from dit_moe.models import MODELS, DiTConfig
from dit_moe.moe import MoEConfig, routers_of
from dit_moe.moe.routers.expert_race import ExpertRaceConfig
from dit_moe.randomness import BatchRandom
from dit_moe.training import EMA, TrainConfig
from dit_moe.training.step import (
    build_optimizer,
    learning_rate,
    load_optimizer_state,
    optimizer_state,
    training_loss,
)

rates = st.floats(1e-6, 1.0)


def network(x, *, return_aux):
    assert return_aux
    return 2 * x, {"balance": x.sum(), "z": x.square().sum()}


def test_aux_terms_are_averaged_over_calls_weighted_into_the_total_and_reported_unweighted():
    x = torch.tensor([1.0, 3.0], requires_grad=True)

    def objective(predict, batch, random):
        outputs = [predict(batch["x"][i : i + 1]) for i in range(2)]
        return {"loss": torch.cat(outputs).sum(), "other": torch.tensor(7.0)}

    total, terms = training_loss(network, objective, {"x": x}, BatchRandom(0, total=2), {"balance": 0.5, "z": 0.0})
    values = {name: term.item() for name, term in terms.items()}
    assert values == {"loss": 8.0, "other": 7.0, "aux_balance": 2.0, "aux_z": 5.0, "total_loss": 9.0}
    assert not any(term.requires_grad for term in terms.values())
    total.backward()
    assert x.grad.tolist() == [2.25, 2.25]


def test_a_dense_network_adds_nothing():
    def objective(predict, batch, random):
        return {"loss": predict(batch["x"]).sum()}

    x = torch.ones(3)
    _, terms = training_loss(lambda x, return_aux: (x, {}), objective, {"x": x}, BatchRandom(0, total=3), {})
    assert {name: term.item() for name, term in terms.items()} == {"loss": 3.0, "total_loss": 3.0}


@pytest.mark.parametrize("name", OBJECTIVES.names())
def test_routers_that_learn_from_the_target_of_the_objective_are_given_it_patch_by_patch(name):
    objective = OBJECTIVES.build(OBJECTIVES.config_class(name)(), num_classes=3)
    shape = {"width": 32, "depth": 2, "heads": 2, "in_channels": 2, "input_size": 4, "num_classes": 3}
    moe = MoEConfig(router=ExpertRaceConfig())
    model = MODELS.build(DiTConfig(name="DiT-custom/2-4E2A", moe=moe, learn_sigma=objective.learns_sigma, **shape))
    targets = []

    class Wrapped:  # as data parallelism wraps networks
        module = model

        def __call__(self, *args, target, **kwargs):
            targets.append(target)
            return model(*args, target=target, **kwargs)

    for router in routers_of(model):
        torch.nn.init.zeros_(router.head)
    batch = {"latents": torch.randn(5, 2, 4, 4), "labels": torch.zeros(5, dtype=torch.int64)}
    _, terms = training_loss(Wrapped(), objective, batch, BatchRandom(0, total=5), model.aux_weights)
    torch.testing.assert_close(terms["aux_target"], targets[0].square().mean())
    patches_BSF = model.patchify(targets[0])
    torch.testing.assert_close(patches_BSF[3, 1].view(2, 2, 2), targets[0][3, :, :2, 2:].permute(1, 2, 0))
    assert model.wants_target and not model.eval().wants_target


# ---------------------------------------------------------------------------------------- the optimizer and the average


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
        late = model.late.sum() if optimizer_state(model, optimizer) else 0.0
        (model(torch.ones(2, 3)) + late).square().sum().backward()
        optimizer.step()

    torch.manual_seed(0)
    model, copy = nn.Linear(3, 2), nn.Linear(3, 2)
    for each in (model, copy):
        each.late = nn.Parameter(torch.ones(2))  # has no gradient in the first step
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
    assert torch.equal(model.late, copy.late) and not torch.equal(model.late, torch.ones(2))


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
