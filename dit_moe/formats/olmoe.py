"""OLMoE (arXiv 2409.02060), in the files of transformers: the top-k variant of our language model by other names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, ClassVar

from dit_moe import config
from dit_moe.config import Tree
from dit_moe.formats.base import Format, Found, NotThisFormat, register
from dit_moe.formats.moe_blocks import initial_load
from dit_moe.formats.rules import Rule, experts, same
from dit_moe.models import LMConfig
from dit_moe.moe import MoEConfig
from dit_moe.moe.experts import Implementation
from dit_moe.moe.routers.topk import TopKConfig
from dit_moe.text.tokenizer import TokenizerConfig, open_tokenizer

ALIKE = {  # ours: theirs, in files and in memory
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
    "blocks.#.norm1.weight": "model.layers.#.input_layernorm.weight",
    "blocks.#.norm2.weight": "model.layers.#.post_attention_layernorm.weight",
    "blocks.#.attn.q.weight": "model.layers.#.self_attn.q_proj.weight",
    "blocks.#.attn.k.weight": "model.layers.#.self_attn.k_proj.weight",
    "blocks.#.attn.v.weight": "model.layers.#.self_attn.v_proj.weight",
    "blocks.#.attn.out.weight": "model.layers.#.self_attn.o_proj.weight",
    "blocks.#.attn.q_norm.weight": "model.layers.#.self_attn.q_norm.weight",
    "blocks.#.attn.k_norm.weight": "model.layers.#.self_attn.k_norm.weight",
    "blocks.#.moe.router.weight": "model.layers.#.mlp.gate.weight",
}
EXPERT = "model.layers.#.mlp.experts.*"  # in files: in memory, transformers has those of a block in one tensor


@register("olmoe")
class OLMoEFormat(Format):
    """A folder of transformers with an OlmoeForCausalLM and its tokenizer."""

    suite: ClassVar[str] = "OLMoE"

    def experiment(self, found: Found) -> Tree:
        if found.settings.get("model_type") != "olmoe":
            raise NotThisFormat("there is no config.json of the model_type olmoe beside it")
        from transformers import OlmoeConfig  # here, as it takes seconds

        model = config_from_olmoe(OlmoeConfig(**found.settings))
        data = {"path": "data/tokens", "length": min(2048, model.need("max_length"))}
        return {"model": config.dump(model), "data": data}

    def state(self, found: Found) -> Tree:
        folder = found.folder
        if folder is None or not (folder / "tokenizer.json").is_file():
            raise ValueError("there is no tokenizer.json beside it; put the model's tokenizer into its folder")
        tokenizer = asdict(open_tokenizer(TokenizerConfig(name=str(folder))).config)
        encoding = {"corpus": {"name": "unknown", "fingerprint": None}, "tokenizer": tokenizer, "split": "train"}
        return {"tokenizer": tokenizer, "trained_on": {"encoding": encoding, "fingerprint": "unknown"}}

    def rules(self, model: Any) -> Sequence[Rule]:
        gate, up, down = (f"{EXPERT}.{part}_proj.weight" for part in ("gate", "up", "down"))
        alike = {ours: theirs for ours, theirs in ALIKE.items() if not (model.tied and ours == "head.weight")}
        return [
            *(same(ours, theirs) for ours, theirs in alike.items()),
            experts("blocks.#.moe.experts.w_in", gate, up),
            experts("blocks.#.moe.experts.w_out", down),
            initial_load(model.moe),
        ]


def config_from_olmoe(theirs: Any, implementation: Implementation = "grouped") -> LMConfig:
    """The shape of an OLMoE, of its OlmoeConfig. ValueError names a field that our model cannot follow."""
    rope: dict[str, Any] = dict(theirs.rope_parameters or {})
    for field, possible, problem in (
        ("attention_bias", (False,), "our attention has no biases"),
        ("attention_dropout", (0,), "our model has no dropout; set it to 0"),
        ("hidden_act", ("silu", "swish"), "our experts have silu (SwiGLU)"),
    ):
        if getattr(theirs, field) not in possible:
            raise ValueError(f"{field}={getattr(theirs, field)!r}: {problem}")
    kind = rope.get("rope_type", "default")
    if kind != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"rope_parameters={rope}: our rotary embedding is unscaled and whole, rope_type=default")
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    if head_dim * theirs.num_attention_heads != theirs.hidden_size:
        raise ValueError(f"head_dim={head_dim}: times num_attention_heads it must be hidden_size={theirs.hidden_size}")
    kv_heads = theirs.num_key_value_heads
    return LMConfig(
        name=f"LM-custom-{theirs.num_experts}E{theirs.num_experts_per_tok}A",
        depth=theirs.num_hidden_layers,
        width=theirs.hidden_size,
        heads=theirs.num_attention_heads,
        mlp_hidden=theirs.num_experts_per_tok * theirs.intermediate_size,
        kv_heads=None if kv_heads == theirs.num_attention_heads else kv_heads,
        vocab_size=theirs.vocab_size,
        max_length=theirs.max_position_embeddings,
        tied=theirs.tie_word_embeddings,
        rope_theta=float(rope.get("rope_theta", 10_000.0)),
        norm_eps=theirs.rms_norm_eps,
        clip_qkv=theirs.clip_qkv,
        init_std=theirs.initializer_range,
        moe=MoEConfig(
            experts=theirs.num_experts,
            target=theirs.num_experts_per_tok,
            router=TopKConfig(renormalize=theirs.norm_topk_prob, balance_loss=theirs.router_aux_loss_coef),
            expert_hidden=theirs.intermediate_size,
            implementation=implementation,
        ),
    )
