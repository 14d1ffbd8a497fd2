"""OLMoE's checkpoints (arXiv 2409.02060) into the top-k variant of our language model, and back.

The two compute the same function; only names and the layout of the experts' matrices differ: ours are [E, in, out],
those of transformers [E, out, in].
"""

# E experts, D width, H hidden width of one expert

from __future__ import annotations

import re
from collections.abc import Mapping
from os import PathLike

import torch
from torch import Tensor, nn
from transformers import OlmoeConfig, OlmoeForCausalLM
from transformers.initialization import no_init_weights

from dit_moe.checkpoint import load_into
from dit_moe.config import ConfigError
from dit_moe.formats.olmoe import ALIKE, config_from_olmoe
from dit_moe.models import LM, MODELS, LMConfig
from dit_moe.moe import ROUTERS
from dit_moe.moe.experts import Implementation
from dit_moe.moe.routers.topk import TopKConfig

NAMES = ALIKE | {
    "blocks.#.moe.experts.w_in": "model.layers.#.mlp.experts.gate_up_proj",
    "blocks.#.moe.experts.w_out": "model.layers.#.mlp.experts.down_proj",
}
THEIRS = {theirs: ours for ours, theirs in NAMES.items()}
TRANSPOSED = ("experts.w_in", "experts.w_out", "experts.gate_up_proj", "experts.down_proj")


def from_olmoe(source: OlmoeForCausalLM | str | PathLike[str], implementation: Implementation = "grouped") -> LM:
    """Our model with the weights of an OLMoE: one in memory, a folder, or a name on the Hugging Face hub.

    Weights become fp32. The config's `router_aux_loss_coef` becomes the coefficient of our balance loss, which takes
    each layer by itself and shares of pairs, as OLMoE was trained; that of transformers pools the layers and takes
    pairs per token, k times as much.

    ValueError names a field of the config that our model cannot follow.
    """
    if not isinstance(source, OlmoeForCausalLM):
        source = OlmoeForCausalLM.from_pretrained(source, dtype=torch.float32)
    lm: LM = MODELS.build(config_from_olmoe(source.config, implementation))
    state = weights_from_olmoe(source.state_dict())
    if lm.config.tied:
        state.pop("head.weight", None)
    load_into(lm, lm.state_dict() | state, "the OLMoE model")
    return lm.train(source.training)


def to_olmoe(lm: LM, *, eos_token_id: int | None = None, pad_token_id: int | None = None) -> OlmoeForCausalLM:
    """`lm` as an OlmoeForCausalLM with copies of its weights; the token ids go into its config.

    ConfigError that says why unless `lm` has top-k routers without normalised logits, experts in every block, and no
    shared experts.
    """
    with no_init_weights():  # they are all loaded
        model = OlmoeForCausalLM(config_to_olmoe(lm.config, eos_token_id, pad_token_id))
    weights = lm.state_dict()
    if lm.config.tied:
        weights["head.weight"] = weights["embed.weight"]
    model.load_state_dict(weights_to_olmoe(weights))
    module: nn.Module = model
    module.to(lm.embed.weight.device).train(lm.training)
    return model


def weights_from_olmoe(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by OLMoE's names → by ours. Gradients map alike."""
    return {_renamed(name, THEIRS): _laid_out(name, tensor) for name, tensor in state.items()}


def weights_to_olmoe(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by our names → by OLMoE's; what it does not have, such as the routers' last loads, is left out."""
    return {
        _renamed(name, NAMES): _laid_out(name, tensor)
        for name, tensor in state.items()
        if re.sub(r"\.\d+\.", ".#.", name) in NAMES
    }


def _renamed(name: str, names: Mapping[str, str]) -> str:
    block = re.search(r"\.(\d+)\.", name)
    pattern = re.sub(r"\.\d+\.", ".#.", name, count=1)
    if pattern not in names:
        raise ValueError(f"the weight {name} is not one of OLMoE's")
    return names[pattern].replace("#", block[1]) if block else names[pattern]


def _laid_out(name: str, tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2).contiguous() if name.endswith(TRANSPOSED) else tensor


def config_to_olmoe(ours: LMConfig, eos_token_id: int | None = None, pad_token_id: int | None = None) -> OlmoeConfig:
    """The inverse. ConfigError names what OLMoE does not have."""
    moe = ours.moe
    if moe is None:
        raise ConfigError("moe", " is missing: OLMoE has experts in every block; export the model as it is")
    router = moe.router
    if type(router) is not TopKConfig:  # what derives from it has options of its own
        name = ROUTERS.name_of(router)
        raise ConfigError("moe.router.name", f"={name}: OLMoE's routers are top-k; export the model as it is")
    for field, wanted in {"shared_experts": 0, "bias": False, "every": 1, "offset": 0, "activation": "swiglu"}.items():
        if getattr(moe, field) != wanted:
            raise ConfigError(f"moe.{field}", f"={getattr(moe, field)}: OLMoE has {wanted}; export the model as it is")
    for field, wanted in {"drn": False, "score": "softmax", "gate_scale": 1, "bias_rate": 0}.items():
        if (value := getattr(router, field)) != wanted:
            raise ConfigError(f"moe.router.{field}", f"={value}: OLMoE has {wanted}; export the model as it is")
    if not ours.qk_norm:
        raise ConfigError("qk_norm", "=False: OLMoE normalises queries and keys; export the model as it is")
    return OlmoeConfig(
        vocab_size=ours.need("vocab_size"),
        hidden_size=ours.need("width"),
        intermediate_size=ours.expert_hidden,
        num_hidden_layers=ours.need("depth"),
        num_attention_heads=ours.need("heads"),
        num_key_value_heads=ours.kv_heads or ours.need("heads"),
        max_position_embeddings=ours.need("max_length"),
        initializer_range=ours.init_std,
        rms_norm_eps=ours.norm_eps,
        tie_word_embeddings=ours.tied,
        rope_parameters={"rope_type": "default", "rope_theta": ours.rope_theta},
        clip_qkv=ours.clip_qkv,
        num_experts=moe.experts,
        num_experts_per_tok=int(moe.target),
        norm_topk_prob=router.renormalize is True,
        router_aux_loss_coef=router.balance_loss,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
    )
