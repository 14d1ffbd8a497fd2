"""The Diffusion Transformer: the original's numerics, and what experts add."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.layers import apply_rot_embed_cat

from dit_moe.models import MODELS, DiT, DiTConfig
from dit_moe.models.positions import rotary_position_embedding
from dit_moe.moe import ROUTERS, MoEConfig, update_routers
from dit_moe.moe.routers.topk import TopKConfig

GOLDEN = Path(__file__).parent.parent / "golden"
GRIDS = [(4,), (8,), (8, 4)]  # tokens a row, and of the grid that positions are spread over
TINY = {"width": 48, "depth": 2, "heads": 3, "in_channels": 4, "input_size": 8, "num_classes": 7}


def tiny(name: str = "DiT-custom/2-4E2A", **options) -> DiT:
    torch.manual_seed(0)
    model = MODELS.build(DiTConfig(name=name, **{**TINY, "learn_sigma": False, **options}))
    wake(model)
    return model


def wake(model: DiT) -> None:
    """Give the zero-initialised layers weights, so that every part of the network shows in the output."""
    for module in [*model.blocks, model.final_layer]:
        torch.nn.init.normal_(module.adaLN_modulation[-1].weight, std=0.1)
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.1)


def inputs(batch: int = 7, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 4, 8, 8, generator=generator)
    return x, 1000 * torch.rand(batch, generator=generator), torch.arange(batch) % 8


@pytest.mark.parametrize("name", ["dit", "sit"])
def test_the_original_s_weights_load_and_give_its_output(name):
    golden = np.load(GOLDEN / f"{name}.npz")
    config = json.loads(str(golden["config"]))
    model = MODELS.build(DiTConfig(name="DiT-custom/2", **TINY, learn_sigma=config["learn_sigma"])).eval()
    weights = {key[2:]: torch.from_numpy(golden[key]) for key in golden.files if key.startswith("w.")}
    assert list(weights) == list(model.state_dict())
    model.load_state_dict(weights)
    with torch.no_grad():
        out = model(*(torch.from_numpy(golden[key]) for key in "xty"))[:, : golden["out"].shape[1]]
    expected = torch.from_numpy(golden["out"])
    error = (out - expected).abs().max() / expected.abs().max()
    assert error <= 1e-5, error  # measured 0 (dit) and 3e-8 (sit) on the machine that made them


def test_initialisation_follows_the_paper():
    model = MODELS.build(DiTConfig(name="DiT-S/4", in_channels=4, input_size=32, num_classes=10, learn_sigma=True))
    x, t, y = torch.randn(1, 4, 32, 32), torch.tensor([5]), torch.tensor([3])
    assert model(x, t, y).abs().max() == 0  # zero-initialised output and gates
    block = model.blocks[0]
    bound = (6 / (384 + 3 * 384)) ** 0.5  # xavier-uniform
    assert 0.99 * bound < block.attn.qkv.weight.abs().max() <= bound
    patch = model.x_embedder.proj.weight.detach()
    assert 0.98 * (6 / (384 + 64)) ** 0.5 < patch.abs().max() <= (6 / (384 + 64)) ** 0.5
    assert model.y_embedder.embedding_table.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.t_embedder.mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
@pytest.mark.parametrize("implementation", ["grouped", "reference"])
@pytest.mark.parametrize("router", ["dtopp", "topk"])
def test_an_image_s_output_does_not_depend_on_its_batch_or_the_labels_around_it(device, implementation, router):
    config = MoEConfig(implementation=implementation, **({"router": TopKConfig()} if router == "topk" else {}))
    model = tiny(moe=config).eval().to(device)
    x, t, y = (each.to(device) for each in inputs())
    torch.backends.cudnn.allow_tf32 = False  # as the commands set it
    with torch.no_grad():
        together = model(x, t, y)
        others = model(x, t, torch.cat([y[:1], (y[1:] + 3) % 8]))
        alone = model(x[:1], t[:1], y[:1])
    scale = alone.abs().max()
    assert (together[:1] - alone).abs().max() / scale <= 1e-5
    assert (others[:1] - alone).abs().max() / scale <= 1e-5


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_both_expert_implementations_give_one_model_the_same_output_and_gradients(activation):
    results = []
    for implementation in ("grouped", "reference"):
        model = tiny(moe=MoEConfig(implementation=implementation, activation=activation, shared_experts=1))
        out, aux = model(*inputs(), return_aux=True)
        (out.square().mean() + sum(model.aux_weights[name] * term for name, term in aux.items())).backward()
        results.append((out.detach(), {k: p.grad for k, p in model.named_parameters() if p.requires_grad}))
    (fast, fast_grads), (slow, slow_grads) = results
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-4)
    for key, grad in slow_grads.items():
        assert grad is not None, key
        torch.testing.assert_close(fast_grads[key], grad, atol=1e-5, rtol=1e-3, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("router", ROUTERS.names())
def test_recompute_changes_neither_output_nor_gradients_nor_what_the_routers_report(router):
    """Of two layers, so that what one router hands on to the next is computed again too."""
    grads, reports = [], []
    for recompute in (False, True):
        model = tiny(recompute=recompute, moe=MoEConfig(router=ROUTERS.config_class(router)()))
        out, aux = model(*inputs(), return_aux=True)
        (out.square().mean() + sum(aux.values())).backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
        reports.append(update_routers(model))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert reports[0] == reports[1]


def test_aux_terms_are_means_over_layers_and_absent_from_dense_models_and_evaluation():
    model = tiny()
    seen = []
    for block in model.blocks:
        block.moe.register_forward_hook(lambda _, __, output: seen.append(output[1].aux.get("dynamic")))
    _, aux = model(*inputs(), return_aux=True)
    torch.testing.assert_close(aux["dynamic"], torch.stack(seen).mean())
    assert set(aux) == set(model.aux_weights)
    assert model.eval()(*inputs(), return_aux=True)[1] == {}
    dense = tiny("DiT-custom/2")
    assert dense(*inputs(), return_aux=True)[1] == {} and dense.aux_weights == {}


NORMS = {"attn.q_norm", "attn.k_norm"}


@pytest.mark.parametrize(
    "options, added",
    [
        ({"qk_norm": True}, {f"{norm}.weight" for norm in NORMS}),
        ({"qk_norm": "layer_norm"}, {f"{norm}.{which}" for norm in NORMS for which in ("weight", "bias")}),
        ({"norm": "rms_norm"}, {"norm1.weight", "norm2.weight"}),
        ({"activation": "swiglu"}, set()),
        ({"position_embedding": "both"}, set()),
    ],
    ids=lambda given: str(given) if isinstance(given, dict) else "",  # the order of a set is another in each process
)
def test_an_option_of_the_blocks_adds_its_norms_and_keeps_the_other_names(options, added):
    plain, other = (set(tiny("DiT-custom/2", **each).state_dict()) for each in ({}, options))
    names = {f"blocks.{i}.{name}" for i in range(2) for name in added}
    assert other - plain == names | ({"final_layer.norm_final.weight"} if "norm" in options else set())
    assert plain <= other


def test_rotary_attention_sees_only_how_far_apart_two_tokens_are():
    rotary_SQ = rotary_position_embedding(8, side=5)
    q, k = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))

    def score(first: tuple[int, int], second: tuple[int, int]) -> torch.Tensor:
        places = [5 * row + column for row, column in (first, second)]
        turned = [apply_rot_embed_cat(x, rotary_SQ[place]) for x, place in zip((q, k), places, strict=True)]
        return turned[0] @ turned[1]

    torch.testing.assert_close(score((0, 1), (2, 4)), score((2, 0), (4, 3)))
    assert (score((0, 1), (2, 4)) - score((0, 1), (4, 2))).abs() > 0.01  # rows and columns are told apart


def test_rotary_positions_of_a_larger_grid_go_on_or_are_spread_over_the_grid_trained_on():
    trained, larger, spread = (rotary_position_embedding(8, *sides).unflatten(0, (-1, sides[0])) for sides in GRIDS)
    torch.testing.assert_close(larger[:4, :4], trained)
    torch.testing.assert_close(spread[::2, ::2], trained)


def test_the_residual_stream_stays_in_fp32_under_autocast_whatever_the_positions():
    for position_embedding in ("absolute", "rotary"):
        model, seen = tiny(position_embedding=position_embedding), []
        model.blocks[1].register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].dtype))
        with torch.autocast("cpu", torch.bfloat16):
            model(*inputs())
        assert seen == [torch.float32]


def test_unresolved_fields_are_named_when_a_model_is_built():
    with pytest.raises(ValueError, match="input_size is missing"):
        MODELS.build(DiTConfig(name="DiT-S/2"))


def test_the_label_table_has_a_row_for_each_class_and_the_null_class():
    model = tiny()
    assert model.get_parameter(model.label_table).shape == (TINY["num_classes"] + 1, TINY["width"])
