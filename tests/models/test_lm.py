"""The decoder."""

import pytest
import torch

from dit_moe.models import LM, MODELS, LMConfig
from dit_moe.moe import MoEConfig
from dit_moe.moe.routers.topk import TopKConfig

SHAPE = {"depth": 2, "width": 32, "heads": 4, "mlp_hidden": 64, "vocab_size": 64, "max_length": 16}


def build(name="LM-custom-4E2A", **options) -> LM:
    torch.manual_seed(0)
    return MODELS.build(LMConfig(name=name, **(SHAPE | options))).eval()


def tokens(batch=2, length=12):
    return torch.randint(64, (batch, length), generator=torch.Generator().manual_seed(1))


class Memory:
    """The smallest cache."""

    def __init__(self):
        self.layers = {}

    def update(self, keys, values, layer):
        old = self.layers.get(layer)
        if old is not None:
            keys, values = torch.cat([old[0], keys], dim=2), torch.cat([old[1], values], dim=2)
        self.layers[layer] = keys, values
        return keys, values


VARIANTS = {
    "dtopp": {},
    "topk": {"moe": MoEConfig(router=TopKConfig())},
    "dense": {"name": "LM-custom"},
    "tied": {"tied": True},
    "grouped": {"kv_heads": 2},
    "no norms, clipped": {"qk_norm": False, "clip_qkv": 0.5},
    "every other block": {"moe": MoEConfig(every=2, offset=1)},
    "shared experts": {"moe": MoEConfig(shared_experts=1)},
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def model(request):
    return build(**request.param)


def test_a_token_changes_no_logits_before_it(model):
    ids = tokens()
    changed = ids.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 64
    before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_documents_in_a_row_are_as_good_as_alone(model):
    ids = tokens(1)
    numbers = torch.tensor(
        [[0] * 5 + [1] * 4 + [0] * 3]
    )  # the third has a number that came before, as rows cut make it
    numbers[0, 9:] = 2
    together = model(ids, numbers)
    parts = [model(part) for part in ids.split([5, 4, 3], dim=1)]  # rotary positions count only between two tokens
    torch.testing.assert_close(together, torch.cat(parts, dim=1), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("steps", [[12], [5, 7], [1] * 12, [4, 1, 1, 6]], ids=str)
def test_tokens_in_steps_with_a_cache_give_the_logits_of_all_at_once(model, steps):
    ids, memory, made, done = tokens(), Memory(), [], 0
    for step in steps:
        positions = torch.arange(done, done + step)[None]
        made.append(model(ids[:, done : done + step], positions=positions, cache=memory))
        done += step
    torch.testing.assert_close(torch.cat(made, dim=1), model(ids), atol=2e-6, rtol=1e-5)


def test_only_differences_of_positions_count(model):
    ids, positions = tokens(), torch.arange(12)[None]
    torch.testing.assert_close(model(ids, positions=positions + 100), model(ids), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(model(ids, positions=2 * positions), model(ids), atol=1e-3)


def test_logits_of_the_last_tokens_are_those_of_all(model):
    ids = tokens()
    torch.testing.assert_close(model(ids, last=2), model(ids)[:, -2:])


def test_a_cache_in_training_is_filled_once_though_the_model_recomputes():
    model, ids, memory, made = build(recompute=True).train(), tokens(), Memory(), []
    for at, part in enumerate(ids.split([5, 7], dim=1)):
        positions = torch.arange(part.shape[1])[None] + 5 * at
        made.append(model(part, positions=positions, cache=memory))
    logits = torch.cat(made, dim=1)
    torch.testing.assert_close(logits, model(ids), atol=2e-6, rtol=1e-5)
    logits.square().mean().backward()
    assert memory.layers[0][0].shape[2] == 12


def test_every_parameter_learns(model):
    logits, aux = model.train()(tokens(), return_aux=True)
    (logits.square().mean() + sum(aux.values())).backward()
    assert [name for name, each in model.named_parameters() if each.grad is None or not each.grad.any()] == []


def test_a_tied_model_has_no_matrix_of_its_own_for_the_output():
    model = build(tied=True)
    assert model.head is None
    torch.testing.assert_close(model.project(model.embed.weight[:1]), model.embed.weight[:1] @ model.embed.weight.T)


@pytest.mark.parametrize("tied", [False, True])
def test_states_become_logits_by_the_call_of_a_module_that_hooks_can_see(tied):
    model, seen = build(tied=tied), []
    (model.embed if tied else model.head).register_forward_hook(lambda module, args, out: seen.append(out))
    logits = model.project(torch.randn(2, 3, 32))
    assert logits is seen[-1] and logits.shape == (2, 3, 64)


def test_at_the_start_all_tokens_are_about_equally_likely():
    loss = torch.nn.functional.cross_entropy(build(width=128)(tokens()).flatten(0, 1), tokens().flatten())
    assert loss.item() == pytest.approx(torch.tensor(64.0).log().item(), abs=0.15)


def test_weights_in_bf16_compute_and_norms_stay_in_fp32():
    model, ids = build(), tokens()
    exact = model(ids)
    half = model.bfloat16()(ids)
    assert half.dtype == torch.bfloat16
    # Roundings of 2^-9 over two blocks; a router at the edge may choose another expert.
    assert (half.float() - exact).abs().mean() < 0.02 * exact.std() + 0.01
