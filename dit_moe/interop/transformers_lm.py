"""The language model as one of `transformers`: from_pretrained, save_pretrained, generate with a KV cache.

Importing this module registers the model type ``dit_moe_lm`` with AutoConfig and AutoModelForCausalLM.
"""

# B batch, S tokens of a sequence, K tokens that may be attended to, D width, V vocabulary

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from dit_moe import config
from dit_moe.models import LM, MODELS, LMConfig
from dit_moe.moe import routers_of

if TYPE_CHECKING:
    from dit_moe.text.tokenizer import TextTokenizer


class DitMoeLMConfig(PreTrainedConfig):
    """An `LMConfig` as JSON, and the token ids that generation needs.

    Args:
        lm: the fields of `LMConfig`, as `dit_moe.config.dump` writes them; there is no second list of them here.
    """

    model_type = "dit_moe_lm"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (the base class's own type)

    lm: dict[str, Any] | None = None
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.lm is not None:  # transformers makes an empty one to compare with
            self.lm = config.dump(config.build(LMConfig, self.lm, "lm"))
        super().__post_init__(**kwargs)

    @property
    def architecture(self) -> LMConfig:
        """What the model is built from. ConfigError for a field that is wrong or missing."""
        return config.build(LMConfig, self.lm or {}, "lm")

    # The names by which transformers' caches and lm-evaluation-harness ask.

    @property
    def vocab_size(self) -> int:
        return self.architecture.need("vocab_size")

    @property
    def hidden_size(self) -> int:
        return self.architecture.need("width")

    @property
    def num_hidden_layers(self) -> int:
        return self.architecture.need("depth")

    @property
    def num_attention_heads(self) -> int:
        return self.architecture.need("heads")

    @property
    def num_key_value_heads(self) -> int:
        return self.architecture.kv_heads or self.num_attention_heads

    @property
    def max_position_embeddings(self) -> int:
        return self.architecture.need("max_length")

    @property
    def tie_word_embeddings(self) -> bool:
        return self.architecture.tied


class DitMoeForCausalLM(PreTrainedModel, GenerationMixin):
    """`LM` behind the interface of transformers.

    Thresholds of the routers are buffers and travel with the weights; nothing here moves them. Routers stay in the
    precision they have, fp32, whatever dtype the rest is loaded in or cast to: a threshold in bf16 is up to 0.4 % off.

    Args:
        config: what to build.
        lm: a network to wrap instead, not copied.
    """

    config_class = DitMoeLMConfig
    base_model_prefix = "lm"
    main_input_name = "input_ids"
    _no_split_modules = ["DecoderBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    # Controllers' buffers have a dtype of their own, which from_pretrained keeps.
    _keep_in_fp32_modules_strict = [r"router\.weight", r"router\.theta", r"router\.load_E"]  # noqa: RUF012

    def __init__(self, config: DitMoeLMConfig, lm: LM | None = None) -> None:
        super().__init__(config)
        self.lm: LM = MODELS.build(config.architecture) if lm is None else lm
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers, but ValueError, not a warning and random weights, where the file lacks some."""
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        for problem in ("missing_keys", "unexpected_keys"):
            if info[problem]:
                names = ", ".join(sorted(info[problem])[:3])
                raise ValueError(f"{args[0]} does not fit its config.json: {problem.replace('_', ' ')} {names}, …")
        return (model, info) if output_loading_info else model

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the network comes initialised, and from_pretrained takes no incomplete file."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves and casts, such as ``.to(torch.bfloat16)``; the latter leave routers as they are."""
        routers = [tensor for router in routers_of(self.lm) for tensor in (*router.parameters(), *router.buffers())]
        kept = {id(each) for each in [*routers, *(tensor.grad for tensor in routers)]}

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if id(tensor) in kept and moved.dtype != tensor.dtype else moved

        return super()._apply(move, recurse)

    def get_input_embeddings(self) -> nn.Module:
        return self.lm.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        raise NotImplementedError("the vocabulary of a trained model is fixed; train one with another vocab_size")

    def get_output_embeddings(self) -> nn.Module:
        return self.lm.embed if self.lm.head is None else self.lm.head

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but always in evaluation mode, in which routers count no tokens."""
        training = self.training
        self.eval()
        try:
            return super().generate(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.train(training)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Logits of the token after each of `input_ids`, int64 [B, S].

        Args:
            attention_mask: [B, K], 0 for padding, on either side; or a mask [B, 1, S, K] that is used as it is.
            position_ids: [B, S]; None: counted from the first token that is no padding.
            past_key_values: keys and values of the K − S tokens before.
            labels: [B, S], −100 where there is none; they are shifted here.
            logits_to_keep: logits of so many last tokens only, or of these positions; 0: of all.

        In training mode, `aux_loss` is the weighted sum of the routers' loss terms, and `loss` includes it, as the
        trainer's does.
        """
        for wanted in ("output_attentions", "output_hidden_states"):
            if kwargs.get(wanted):
                raise ValueError(f"{wanted}=True: this model does not return them; leave it out")
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            position_ids = self._positions(input_ids, attention_mask, past_key_values)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=torch.empty(*input_ids.shape, 0, dtype=self.dtype, device=input_ids.device),  # for its shape
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
            # A static cache has room behind the tokens, so that a causal mask cannot be left to the model's default.
            allow_is_causal_skip=past_key_values is None or not past_key_values.is_compileable,
        )
        last = logits_to_keep or None if isinstance(logits_to_keep, int) else None
        logits_BSV, terms = self.lm(
            input_ids, positions=position_ids, mask=mask, cache=past_key_values, last=last, return_aux=True
        )
        if isinstance(logits_to_keep, Tensor):
            logits_BSV = logits_BSV[:, logits_to_keep]
        loss = None if labels is None else self.loss_function(logits_BSV, labels, self.vocab_size, **kwargs)
        weights = self.lm.aux_weights
        aux_loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum() if terms else None
        if loss is not None and aux_loss is not None:
            loss = loss + aux_loss
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits_BSV,
            past_key_values=past_key_values,
        )

    @property
    def vocab_size(self) -> int:
        return self.lm.config.need("vocab_size")

    @staticmethod
    def _positions(tokens_BS: Tensor, mask: Tensor | None, cache: Cache | None) -> Tensor:
        length = tokens_BS.shape[1]
        if mask is not None and mask.ndim == 2:
            return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
        start = 0 if cache is None else cache.get_seq_length()
        return torch.arange(start, start + length, device=tokens_BS.device)[None]


def wrap(lm: LM, tokenizer: TextTokenizer | None = None) -> DitMoeForCausalLM:
    """`lm` as a transformers model, not copied; with a tokenizer, generation stops at its end of a document."""
    eos = None if tokenizer is None else tokenizer.eos
    pad = None if tokenizer is None else tokenizer.hf.pad_token_id
    settings = DitMoeLMConfig(
        lm=config.dump(lm.config), bos_token_id=eos, eos_token_id=eos, pad_token_id=eos if pad is None else pad
    )
    training = lm.training
    model = DitMoeForCausalLM(settings, lm)
    model.train(training)
    if tokenizer is not None and model.generation_config is not None:
        # Rows of the embedding beyond the tokenizer's ids only round its size up; nothing could be written for them.
        unused = list(range(tokenizer.vocab_size, model.vocab_size))
        model.generation_config.suppress_tokens = unused or None
    return model


AutoConfig.register(DitMoeLMConfig.model_type, DitMoeLMConfig, exist_ok=True)
AutoModelForCausalLM.register(DitMoeLMConfig, DitMoeForCausalLM, exist_ok=True)
