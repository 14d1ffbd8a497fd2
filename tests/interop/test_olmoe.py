"""OLMoE's weights give OLMoE's numbers in our model, and come back."""

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra lm")

from transformers import OlmoeConfig, OlmoeForCausalLM

from dit_moe.interop.olmoe import config_to_olmoe, from_olmoe, to_olmoe, weights_from_olmoe
from dit_moe.interop.transformers_lm import wrap
from dit_moe.moe.routers.loss_free import LossFreeConfig
from dit_moe.moe.routers.topk import TopKConfig
from tests.interop.models import tiny_config, tiny_lm, tokens


def olmoe(**changes):
    """Random weights wide enough for every part to matter."""
    torch.manual_seed(0)
    shape = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "initializer_range": 0.1}
    ids = {"pad_token_id": None, "eos_token_id": None}
    return OlmoeForCausalLM(OlmoeConfig(**shape | heads | experts | ids | changes)).eval()


def relative(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize(
    "implementation, kv_heads, normed, tied, clip, theta",
    [  # any two settings of any two columns are together in a row
        ("grouped", 4, False, False, None, 10_000.0),
        ("grouped", 2, True, False, 0.5, 500.0),
        ("grouped", 1, False, True, 0.5, 10_000.0),
        ("grouped", 4, True, True, 0.5, 500.0),
        ("reference", 1, True, False, None, 500.0),
        ("reference", 2, False, True, None, 10_000.0),
        ("reference", 4, True, False, 0.5, 10_000.0),
        ("reference", 4, False, True, 0.5, 500.0),
        ("grouped", 2, True, True, None, 10_000.0),
        ("grouped", 1, False, False, None, 500.0),
    ],
)
def test_olmoes_weights_give_olmoes_logits_loss_and_every_gradient(implementation, kv_heads, normed, tied, clip, theta):
    theirs = olmoe(
        num_key_value_heads=kv_heads,
        norm_topk_prob=normed,
        tie_word_embeddings=tied,
        clip_qkv=clip,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    ours, x = from_olmoe(theirs, implementation), tokens(vocab=96)
    expected, got = theirs(x, labels=x), wrap(ours)(x, labels=x)
    assert relative(got.logits, expected.logits) <= 1e-5  # worst seen 7e-7
    assert relative(got.loss, expected.loss) <= 1e-4  # worst seen 1e-7
    expected.loss.backward()
    got.loss.backward()
    wanted = weights_from_olmoe({name: weight.grad for name, weight in theirs.named_parameters()})
    found = {name: weight.grad for name, weight in ours.named_parameters()}
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert gradient.abs().max() > 0, name
        assert relative(found[name], gradient) <= 1e-4, name  # worst seen 4e-6


@pytest.mark.parametrize("tied", [False, True])
def test_the_way_there_and_back_through_folders_has_the_same_logits_bit_for_bit(tmp_path, tied):
    theirs, x = olmoe(tie_word_embeddings=tied, clip_qkv=0.5), tokens(vocab=96)
    theirs.save_pretrained(tmp_path / "theirs")
    to_olmoe(from_olmoe(tmp_path / "theirs")).save_pretrained(tmp_path / "back")
    back = OlmoeForCausalLM.from_pretrained(tmp_path / "back")
    assert torch.equal(back(x).logits, theirs(x).logits)
    said = {name: value for name, value in theirs.config.to_dict().items() if not name.startswith("_")}
    assert {name: value for name, value in back.config.to_dict().items() if name in said} == said


def test_our_model_becomes_an_olmoe_with_the_same_logits_and_text():
    lm, x = tiny_lm("topk", kv_heads=2, rope_theta=300.0), tokens()
    theirs = to_olmoe(lm, eos_token_id=256, pad_token_id=256)
    assert relative(theirs(x).logits, lm(x)) <= 1e-5 and theirs.config.eos_token_id == 256
    how = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None, "pad_token_id": None}
    assert torch.equal(wrap(lm).generate(x[:1, :5], **how), theirs.generate(x[:1, :5], **how))


def test_weights_in_bf16_come_as_fp32_and_unrounded():
    theirs = olmoe().to(torch.bfloat16)
    ours = from_olmoe(theirs)
    assert {weight.dtype for weight in ours.parameters()} == {torch.float32}
    assert torch.equal(ours.head.weight, theirs.lm_head.weight.float())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"attention_bias": True}, "attention_bias=True"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_parameters=.*linear"),
    ],
)
def test_an_olmoe_with_what_we_do_not_have_is_refused_by_the_field_or_weight(changes, message):
    with pytest.raises(ValueError, match=message):
        from_olmoe(olmoe(**changes))
    with pytest.raises(ValueError, match=r"model.layers.0.strange is not one of OLMoE's"):
        weights_from_olmoe({"model.layers.0.strange": torch.zeros(1)})


@pytest.mark.parametrize(
    "router, changes, message",
    [
        (None, {}, "moe is missing"),
        ("dtopp", {}, "moe.router.name=dtopp"),
        ("topk", {"moe": {"shared_experts": 1}}, "moe.shared_experts=1"),
        ("topk", {"moe": {"bias": True}}, "moe.bias=True"),
        ("topk", {"moe": {"every": 2}}, "moe.every=2"),
        ("topk", {"moe": {"offset": 1}}, "moe.offset=1"),
        ("topk", {"moe": {"activation": "gelu"}}, "moe.activation=gelu"),
        ("topk", {"qk_norm": False}, "qk_norm=False"),
        ("topk_drn", {}, "moe.router.drn=True"),
        ("topk", {"moe": {"router": TopKConfig(score="sigmoid")}}, "moe.router.score=sigmoid"),
        ("topk", {"moe": {"router": TopKConfig(gate_scale=2.0)}}, "moe.router.gate_scale=2"),
        ("topk", {"moe": {"router": TopKConfig(bias_rate=1e-3)}}, "moe.router.bias_rate=0.001"),
        ("topk", {"moe": {"router": LossFreeConfig()}}, "moe.router.name=loss_free"),
    ],
)
def test_a_model_that_cannot_be_an_olmoe_is_refused_by_the_field(router, changes, message):
    with pytest.raises(ValueError, match=message):
        config_to_olmoe(tiny_config(router, **changes))
