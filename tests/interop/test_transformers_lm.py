"""Our model behind transformers' interface: saved and loaded, generating with a cache, padded, trained, cast."""

import json

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers", reason="needs the extra lm")

from accelerate import cpu_offload
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from dit_moe.config import ConfigError
from dit_moe.interop.transformers_lm import CACHE, CACHE_NAMES, DitMoeForCausalLM, DitMoeLMConfig, wrap
from dit_moe.models import MODELS
from dit_moe.moe import ROUTERS, observe_routers, routers_of
from dit_moe.text.tokenizer import TokenizerConfig, open_tokenizer
from tests.interop.models import tiny_lm, tokens

GREEDY = {"do_sample": False, "min_new_tokens": 30, "max_new_tokens": 30}
SHAPES = [("dtopp", {}), ("layerwise", {"kv_heads": 2}), ("topk", {"tied": True}), (None, {"tied": True})]


def load(folder, **how):
    return AutoModelForCausalLM.from_pretrained(folder, **how)


def router_state(model):
    return {name: tensor for name, tensor in model.state_dict().items() if ".router." in name}


# ---------------------------------------------------------------------------------------------------- saved and loaded


@pytest.mark.parametrize("router, changes", SHAPES)
def test_a_saved_model_comes_back_with_every_weight_and_buffer(tmp_path, router, changes):
    lm = tiny_lm(router, **changes)
    wrap(lm).save_pretrained(tmp_path)
    back = load(tmp_path)
    assert isinstance(back, DitMoeForCausalLM) and back.lm.config == lm.config and not back.training
    state = {f"lm.{name}": tensor for name, tensor in lm.state_dict().items()}
    assert back.state_dict().keys() == state.keys()
    for name, tensor in back.state_dict().items():
        assert tensor.dtype == state[name].dtype and torch.equal(tensor, state[name]), name
    assert torch.equal(back(tokens()).logits, lm(tokens()))
    again = DitMoeLMConfig(**json.loads(json.dumps(back.config.to_dict())))
    assert again.architecture == AutoConfig.from_pretrained(tmp_path).architecture == lm.config
    shape = (again.vocab_size, again.hidden_size, again.num_hidden_layers, again.num_attention_heads)
    kv_heads = changes.get("kv_heads", 4)
    assert (*shape, again.num_key_value_heads, again.max_position_embeddings) == (320, 32, 2, 4, kv_heads, 128)


def test_routers_stay_in_full_precision_in_a_model_loaded_or_cast_in_bf16(tmp_path):
    lm = tiny_lm()
    wrap(lm).save_pretrained(tmp_path / "fp32")
    loaded, cast = load(tmp_path / "fp32", dtype=torch.bfloat16), load(tmp_path / "fp32").to(torch.bfloat16)
    assert loaded.dtype == cast.dtype == torch.bfloat16
    loaded.save_pretrained(tmp_path / "bf16")
    exact = router_state(wrap(lm))
    kept = {"weight", "theta", "load_E", "u", "u0", "error_sum", "reached"}
    assert {name.rpartition(".")[2] for name in exact} == kept
    for model in (loaded, cast, load(tmp_path / "bf16")):
        assert model.lm.blocks[0].moe.experts.w_in.dtype == torch.bfloat16
        found = router_state(model)
        for name, tensor in exact.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
        with torch.no_grad():
            difference = (model(tokens()).logits.float() - lm(tokens())).square().mean().sqrt()
        assert difference < 0.1 * lm(tokens()).std()  # seen: 0.05
    model = wrap(lm)
    model(tokens(), labels=tokens()).loss.backward()  # a cast leaves the gradients of routers as they are, too
    before = lm.blocks[0].moe.router.weight.grad.clone()
    assert torch.equal(model.to(torch.bfloat16).lm.blocks[0].moe.router.weight.grad, before)
    assert lm.embed.weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("router", ["moepp", "dynmoe"])  # which have weights and buffers of their own
def test_what_a_router_keeps_is_loaded_in_bf16_as_it_was_saved(tmp_path, router):
    lm = wrap(tiny_lm(moe={"router": ROUTERS.config_class(router)()}))
    lm.save_pretrained(tmp_path)
    found = router_state(load(tmp_path, dtype=torch.bfloat16))
    for name, tensor in router_state(lm).items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("router", ["dtopp", "layerwise"])
def test_an_export_that_holds_p_comes_back_with_the_same_thresholds(tmp_path, router):
    lm = tiny_lm(router)
    wrap(lm).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for layer, each in enumerate(routers_of(lm)):
        prefix = f"lm.blocks.{layer}.moe.router.controller."
        for name in ("u", "u0", "reached"):
            weights.pop(prefix + name)
        weights |= {f"{prefix}p": each.controller.p.float(), f"{prefix}p0": torch.tensor(0.5)}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    back = load(tmp_path)
    for each, now in zip(routers_of(lm), routers_of(back.lm), strict=True):
        assert now.controller.u.item() == pytest.approx(each.controller.u.item(), rel=1e-6)  # of p in fp32
        assert now.controller.u0.item() == pytest.approx(0.693147) and now.controller.reached
        assert now.controller.error_sum == each.controller.error_sum
    torch.testing.assert_close(back(tokens()).logits, lm(tokens()))


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_a_file_that_does_not_fit_its_config_is_an_error_and_no_random_weights(tmp_path, change):
    wrap(tiny_lm()).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "lm.blocks.0.moe.router.controller.u"
    weights.pop(name) if change == "missing" else weights.update({"lm.strange": torch.zeros(1)})
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{change} keys {name if change == 'missing' else 'lm.strange'}"):
        load(tmp_path)


def test_a_mistake_in_the_config_is_named_by_its_path():
    with pytest.raises(ConfigError, match=r"^lm.moe.experts=-1 "):
        DitMoeLMConfig(lm={"name": "LM-tiny-8E2A", "moe": {"experts": -1}})
    with pytest.raises(ConfigError, match=r"vocab_size is missing"):
        DitMoeForCausalLM(DitMoeLMConfig(lm={"name": "LM-tiny-8E2A", "max_length": 8}))


def test_what_the_architecture_decides_can_be_repeated_but_not_contradicted(tmp_path):
    wrap(tiny_lm()).save_pretrained(tmp_path)
    assert load(tmp_path, tie_word_embeddings=False, hidden_size=32).lm.head is not None
    for name, value, has in (("tie_word_embeddings", True, False), ("hidden_size", 64, 32)):
        with pytest.raises(ValueError, match=f"^{name}={value} contradicts the model, which has {has}; leave it out"):
            load(tmp_path, **{name: value})
    config = wrap(tiny_lm()).config
    assert config.architecture is config.architecture and "architecture" not in config.to_dict()
    config.lm = config.lm | {"vocab_size": 64}
    assert config.vocab_size == 64


def test_wrapping_copies_nothing_and_a_model_from_a_config_starts_as_ours_do():
    lm = tiny_lm()
    model = wrap(lm)
    torch.manual_seed(3)
    made = AutoModelForCausalLM.from_config(model.config).lm.state_dict()
    torch.manual_seed(3)
    expected = MODELS.build(model.config.architecture).state_dict()
    assert made.keys() == expected.keys() and all(torch.equal(made[name], expected[name]) for name in made)
    assert model.lm is lm and not model.training and model.get_input_embeddings() is lm.embed
    assert model.get_output_embeddings() is lm.head
    assert wrap(tiny_lm(tied=True)).get_output_embeddings().weight.shape == (320, 32)


@pytest.mark.parametrize("router, tied", [("dtopp", False), (None, True)])
def test_offloaded_weights_compute_the_same(router, tied):
    lm, x = tiny_lm(router, tied=tied), tokens()
    expected = lm(x)
    model = cpu_offload(wrap(lm), torch.device("cpu"))
    assert {each.device.type for each in lm.parameters()} == {"meta"}
    assert torch.equal(model(x).logits, expected)
    assert torch.equal(cpu_offload(tiny_lm(router, tied=tied), torch.device("cpu"))(x), expected)  # without wrapping


# ----------------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("router, changes", SHAPES)
def test_a_cache_changes_no_token_of_greedy_text(router, changes):
    lm = tiny_lm(router, **changes)
    model, prompt = wrap(lm), tokens(2, 7)
    cached = model.generate(prompt, **GREEDY)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **GREEDY))
    text = prompt
    for _ in range(30):
        text = torch.cat([text, lm(text)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(cached, text)
    least = 2 if changes.get("tied") else 12  # it is no loop of one token, to which tied weights incline
    assert min(len(set(row)) for row in cached[:, 7:].tolist()) > least
    if router == "dtopp":  # these tests would tell little of a router that gives all tokens as many experts
        counts = []
        with observe_routers(routers_of(lm), lambda i, x_ND, routing: counts.append(routing.token_R.bincount())):
            lm(tokens())
        assert all(len(set(each.tolist())) > 2 for each in counts)


@pytest.mark.parametrize("how", [{"cache_implementation": "static"}, {"num_beams": 3}])
def test_other_ways_of_generating_agree_with_and_without_their_cache(how):
    model, prompt = wrap(tiny_lm()), tokens(2, 7)
    short = GREEDY | {"min_new_tokens": 20, "max_new_tokens": 20}
    without = model.generate(prompt, use_cache=False, **short, **{k: v for k, v in how.items() if k == "num_beams"})
    assert torch.equal(model.generate(prompt, **short, **how), without)


def padded(rows, side, pad=256):
    """Rows of ids, and their mask, as one batch."""
    length = max(map(len, rows))
    fill = [[pad] * (length - len(row)) for row in rows]
    ids = [f + r if side == "left" else r + f for f, r in zip(fill, rows, strict=True)]
    ones = [[1] * len(row) for row in rows]
    zeros = [[0] * len(f) for f in fill]
    mask = [z + o if side == "left" else o + z for z, o in zip(zeros, ones, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


ROWS = [tokens(1, length)[0].tolist() for length in (3, 20, 11)]


@pytest.mark.parametrize("router, changes", SHAPES)
def test_rows_of_a_padded_batch_have_the_logits_and_write_the_text_of_each_alone(router, changes):
    lm = tiny_lm(router, **changes)
    model = wrap(lm)
    for side in ("right", "left"):
        ids, mask = padded(ROWS, side)
        logits = model(ids, attention_mask=mask).logits
        assert logits.isfinite().all()  # at the padding, too: it would spread through the keys
        for row, kept, alone in zip(logits, mask.bool(), ROWS, strict=True):
            torch.testing.assert_close(row[kept], lm(torch.tensor([alone]))[0], rtol=1e-4, atol=2e-5)
    together = model.generate(ids, attention_mask=mask, pad_token_id=256, **GREEDY)[:, ids.shape[1] :]
    for row, alone in zip(together, ROWS, strict=True):
        assert torch.equal(row, model.generate(torch.tensor([alone]), **GREEDY)[0, len(alone) :])


def test_wrapping_and_generating_leave_a_model_in_training_as_it_was():
    lm = tiny_lm().train()
    lm.blocks[0].eval()
    routers_of(lm)[1].eval()
    modes = [module.training for module in lm.modules()]
    before = {name: tensor.clone() for name, tensor in lm.state_dict().items()}
    model = wrap(lm)
    assert model.training and [module.training for module in lm.modules()] == modes
    model.generate(tokens(2, 5), max_new_tokens=5)
    assert model.training and [module.training for module in lm.modules()] == modes
    assert all(router.stats.sums is None for router in routers_of(lm))
    assert all(torch.equal(tensor, before[name]) for name, tensor in lm.state_dict().items())


def test_ids_that_the_tokenizer_does_not_have_are_never_written():
    lm, tokenizer = tiny_lm(), open_tokenizer(TokenizerConfig())
    with torch.no_grad():
        lm.head.weight[tokenizer.vocab_size :] *= 30
    bare, known = wrap(lm), wrap(lm, tokenizer)
    assert (bare.generate(tokens(2, 5), **GREEDY) >= tokenizer.vocab_size).any()
    assert (known.generate(tokens(2, 5), **GREEDY) < tokenizer.vocab_size).all()
    assert known.config.eos_token_id == known.generation_config.eos_token_id == tokenizer.eos


# ------------------------------------------------------------------------------------------------- losses and arguments


def test_the_loss_is_the_mean_over_labelled_next_tokens_and_in_training_the_routers_weighted_terms():
    lm, x = tiny_lm(), tokens()
    labels = x.masked_fill(torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.3, -100)
    expected = F.cross_entropy(lm(x)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    out = wrap(lm)(x, labels=labels)
    torch.testing.assert_close(out.loss, expected)
    assert out.aux_loss is None
    lm.train()
    _, terms = lm(x, return_aux=True)
    expected = sum(lm.aux_weights[name] * term for name, term in terms.items())
    out = wrap(lm)(x, labels=x)
    torch.testing.assert_close(out.aux_loss, expected)
    torch.testing.assert_close(out.loss - out.aux_loss, wrap(lm.eval())(x, labels=x).loss)
    assert CACHE not in out


def test_the_losses_of_micro_batches_add_up_to_that_of_the_whole_batch():
    model, x = wrap(tiny_lm("heavy").train()), tokens(4)
    items = torch.tensor(x[:, 1:].numel())
    whole = model(x, labels=x)
    assert whole.aux_loss > 0.5  # it tells
    parts = [model(part, labels=part, num_items_in_batch=items).loss for part in x.split([1, 3])]
    torch.testing.assert_close(sum(parts), whole.loss)
    shifted = F.pad(x, (0, 1), value=-100)[:, 1:].contiguous()
    torch.testing.assert_close(model(x, labels=x, shift_labels=shifted, num_items_in_batch=items).loss, whole.loss)


@pytest.mark.parametrize("how", ["of the config", "by transformers"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_recomputing_changes_no_gradient_with_or_without_a_cache(how):
    grads, calls = [], []
    for recompute in (False, True):
        model = wrap(tiny_lm(recompute=recompute and how == "of the config").train())
        if recompute and how == "by transformers":
            model.gradient_checkpointing_enable()
        for use_cache in (False, True):
            ran = []
            handle = model.lm.blocks[0].attn.q.register_forward_hook(lambda *args, ran=ran: ran.append(1))
            model(tokens(), labels=tokens(), use_cache=use_cache).loss.backward()
            handle.remove()
            calls.append(len(ran))
            grads.append([parameter.grad.clone() for parameter in model.parameters()])
            model.zero_grad()
    assert calls == [1, 1, 2, 1]
    for each in grads[1:]:
        torch.testing.assert_close(each, grads[0], rtol=1e-4, atol=1e-6)


def test_only_the_wanted_logits_are_returned():
    model, x = wrap(tiny_lm()), tokens()
    whole = model(x).logits
    torch.testing.assert_close(model(x, logits_to_keep=3).logits, whole[:, -3:])
    torch.testing.assert_close(model(x, logits_to_keep=torch.tensor([0, 5])).logits, whole[:, [0, 5]])
    assert torch.equal(model(x, return_dict=False)[0], whole)


def test_outputs_and_arguments_that_the_model_does_not_have_are_errors(tmp_path):
    model, x = wrap(tiny_lm()), tokens()
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    for wanted in ("output_attentions", "output_hidden_states", "output_router_logits"):
        path.write_text(json.dumps(saved | {wanted: True}))
        for call in (lambda name=wanted: model(x, **{name: True}), lambda: load(tmp_path)(x)):
            with pytest.raises(ValueError, match=f"{wanted}=True"):
                call()
    with pytest.raises(TypeError, match="past_keys"):
        model(x, past_keys=None)
    with pytest.raises(ValueError, match="past_keys"):
        model.generate(x, past_keys=3)
    with pytest.raises(ValueError, match="inputs_embeds: this model reads input_ids"):
        model(x, inputs_embeds=torch.zeros(1))
    cache = model(x, inputs_embeds=None)[CACHE]  # as peft passes it
    with pytest.raises(ValueError, match="two names of one argument"):
        model(x, cache=cache, past_key_values=cache)


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_padded_batch_goes_on_from_a_cache_at_its_own_positions(name):
    model = wrap(tiny_lm())
    ids, mask = padded(ROWS, "left")
    whole = model(ids, attention_mask=mask).logits
    first = model(ids[:, :-4], attention_mask=mask[:, :-4])
    rest = model(ids[:, -4:], attention_mask=mask, **{name: first[CACHE]}).logits
    torch.testing.assert_close(rest[mask[:, -4:].bool()], whole[:, -4:][mask[:, -4:].bool()], rtol=1e-4, atol=2e-5)


def test_positions_that_start_again_part_packed_documents():
    lm, x = tiny_lm(), tokens(1, 20)
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None]
    packed = wrap(lm)(x, position_ids=positions, use_cache=False).logits
    alone = torch.cat([lm(x[:, :8]), lm(x[:, 8:])], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=2e-5)
