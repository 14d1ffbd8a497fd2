"""The language model as one of `transformers`: from_pretrained, save_pretrained, generate with a KV cache, Trainer.

Importing this module registers the model type ``dit_moe_lm`` with AutoConfig and AutoModelForCausalLM.
"""

# B batch, S tokens of a sequence, K tokens that may be attended to, D width, V vocabulary

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cached_property, partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import reduce
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from dit_moe import config
from dit_moe.formatting import tell
from dit_moe.interop.router_precision import RoutersInFP32
from dit_moe.models import LM, MODELS, LMConfig
from dit_moe.moe import counted_dropped, update_routers

if TYPE_CHECKING:
    from dit_moe.text.tokenizer import TextTokenizer

# transformers 5.24 calls the keys and values of earlier tokens `cache`, 5.23 `past_key_values`: in its calls, in its
# outputs and in its masks. Under the wrong name they are dropped without an error, and other text is written.
CACHE_NAMES = ("cache", "past_key_values")
CACHE = next(name for name in CACHE_NAMES if name in inspect.signature(create_causal_mask).parameters)


def _decided_by_lm(name: str, value: Callable[[LMConfig], Any]) -> Any:
    """A field that the architecture decides: it can be set to the value it has, and ValueError to any other."""

    def get(self: DitMoeLMConfig) -> Any:
        return value(self.architecture)

    def require_equal(self: DitMoeLMConfig, given: Any) -> None:
        if given != get(self):
            raise ValueError(f"{name}={given} contradicts the model, which has {get(self)}; leave it out")

    return property(get, require_equal)


class DitMoeLMConfig(PreTrainedConfig):
    """An `LMConfig` as JSON, and the token ids that generation needs.

    Args:
        lm: the fields of `LMConfig`, as `dit_moe.config.dump` writes them.
    """

    model_type = "dit_moe_lm"
    keys_to_ignore_at_inference = list(CACHE_NAMES)  # noqa: RUF012 (the base class's own type)

    lm: dict[str, Any] | None = None
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.lm is not None:  # transformers makes an empty one to compare with
            self.lm = config.dump(config.build(LMConfig, self.lm, "lm"))
        super().__post_init__(**kwargs)

    def __setattr__(self, key: str, value: Any) -> None:
        if key == "lm":
            self.__dict__.pop("architecture", None)
        super().__setattr__(key, value)

    def _remove_keys_not_serialized(self, d: dict[str, Any]) -> None:
        super()._remove_keys_not_serialized(d)
        d.pop("architecture", None)

    @cached_property
    def architecture(self) -> LMConfig:
        """What the model is built from. ConfigError for a field that is wrong or missing."""
        return config.build(LMConfig, self.lm or {}, "lm")

    # Fields that transformers' caches and lm-evaluation-harness read.
    vocab_size = _decided_by_lm("vocab_size", lambda lm: lm.need("vocab_size"))
    hidden_size = _decided_by_lm("hidden_size", lambda lm: lm.need("width"))
    num_hidden_layers = _decided_by_lm("num_hidden_layers", lambda lm: lm.need("depth"))
    num_attention_heads = _decided_by_lm("num_attention_heads", lambda lm: lm.need("heads"))
    num_key_value_heads = _decided_by_lm("num_key_value_heads", lambda lm: lm.kv_heads or lm.need("heads"))
    max_position_embeddings = _decided_by_lm("max_position_embeddings", lambda lm: lm.need("max_length"))
    tie_word_embeddings = _decided_by_lm("tie_word_embeddings", lambda lm: lm.tied)


class DitMoeForCausalLM(RoutersInFP32, PreTrainedModel, GenerationMixin):
    """`LM` behind the interface of transformers.

    The routers' thresholds are buffers that are saved with the weights; `RouterCallback` moves them. Routers stay in
    fp32, whatever dtype the rest is loaded in or cast to.

    Args:
        config: what to build.
        lm: a network to wrap instead, not copied.
    """

    config_class = DitMoeLMConfig
    base_model_prefix = "lm"
    main_input_name = "input_ids"
    _no_split_modules = ["DecoderBlock"]  # noqa: RUF012
    _skip_keys_device_placement = list(CACHE_NAMES)  # noqa: RUF012
    _supports_sdpa = True
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # `forward` takes num_items_in_batch
    # Controllers' buffers have a dtype of their own, which from_pretrained keeps.
    _keep_in_fp32_modules_strict = [r"router\.(?!controller)\w+"]  # noqa: RUF012

    def __init__(self, config: DitMoeLMConfig, lm: LM | None = None) -> None:
        super().__init__(config)
        self.lm: LM = MODELS.build(config.architecture) if lm is None else lm
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers, but missing weights are a ValueError, where that warns and makes random ones."""
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        source = args[0] if args else kwargs["pretrained_model_name_or_path"]
        if info["unexpected_keys"]:  # of an earlier version: unlike transformers, load_state_dict upgrades them
            missing, unexpected = model.load_state_dict(_stored_weights(source, kwargs), strict=False)
            info |= {"missing_keys": set(missing), "unexpected_keys": set(unexpected)}
        for problem in ("missing_keys", "unexpected_keys"):
            if info[problem]:
                names = ", ".join(sorted(info[problem])[:3])
                raise ValueError(f"{source} does not fit its config.json: {problem.replace('_', ' ')} {names}, …")
        return (model, info) if output_loading_info else model

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the network is initialised already, and from_pretrained refuses incomplete files."""

    def get_input_embeddings(self) -> nn.Module:
        return self.lm.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        raise NotImplementedError("the vocabulary of a trained model is fixed; train one with another vocab_size")

    def get_output_embeddings(self) -> nn.Module:
        return self.lm.embed if self.lm.head is None else self.lm.head

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but always in evaluation mode, in which routers keep no statistics."""
        parent: Any = super()
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            return parent.generate(*args, **kwargs)
        finally:
            for module, training in modes:
                module.training = training

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        past_key_values: Cache | None = None,
        num_items_in_batch: int | Tensor | None = None,
        shift_labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        inputs_embeds: None = None,
    ) -> MoeCausalLMOutputWithPast:
        """Logits of the token after each of `input_ids`, int64 [B, S].

        Args:
            attention_mask: [B, K], 0 for padding, on either side; or a mask [B, 1, S, K] that is used as it is.
            position_ids: [B, S]; None: counted from the first token that is no padding.
            cache: keys and values of the K − S tokens before; `past_key_values` is its name in earlier transformers.
            labels: [B, S], −100 where there is none; they are shifted here.
            logits_to_keep: logits of so many last tokens only, or of these positions; 0: of all.
            num_items_in_batch: how many labels all micro-batches of the step have together.
            shift_labels: [B, S], labels shifted already, used in place of `labels` but only beside them.

        In training mode, `aux_loss` is the weighted sum of the routers' loss terms, and `loss` includes it, as the
        trainer's does. With `num_items_in_batch`, `loss` is this micro-batch's share of both.

        Raises ValueError for outputs that this model does not have, TypeError for unknown arguments.
        """
        outputs = {
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "output_router_logits": output_router_logits,
        }
        for name, wanted in outputs.items():
            if wanted or getattr(self.config, name, False):
                raise ValueError(f"{name}=True: this model does not return them; leave it out of call and config")
        if inputs_embeds is not None:  # peft always passes it, mostly None
            raise ValueError("inputs_embeds: this model reads input_ids; leave it out")
        if cache is not None and past_key_values is not None:
            raise ValueError("cache and past_key_values are two names of one argument; give one of them")
        cache = past_key_values if cache is None else cache
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            position_ids = self._positions(input_ids, attention_mask, cache)
        named_cache: dict[str, Any] = {CACHE: cache}
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=torch.empty(*input_ids.shape, 0, dtype=self.dtype, device=input_ids.device),  # for its shape
            attention_mask=attention_mask,
            position_ids=position_ids,
            # A static cache has room behind the tokens, so that a causal mask cannot be left to the model's default.
            allow_is_causal_skip=cache is None or not cache.is_compileable,
            **named_cache,
        )
        last = logits_to_keep or None if isinstance(logits_to_keep, int) else None
        logits_BSV, terms = self.lm(
            input_ids, positions=position_ids, mask=mask, cache=cache, last=last, return_aux=True
        )
        if isinstance(logits_to_keep, Tensor):
            logits_BSV = logits_BSV[:, logits_to_keep]
        loss = None
        if labels is not None:
            counted = {"num_items_in_batch": num_items_in_batch, "shift_labels": shift_labels}
            loss = self.loss_function(logits_BSV, labels, self.vocab_size, **counted)
        weights = self.lm.aux_weights
        aux_loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum() if terms else None
        if labels is not None and aux_loss is not None:
            loss = loss + aux_loss * self._share(labels, num_items_in_batch, shift_labels)
        return MoeCausalLMOutputWithPast(loss=loss, aux_loss=aux_loss, logits=logits_BSV, **named_cache)

    @property
    def vocab_size(self) -> int:
        return self.lm.config.need("vocab_size")

    @staticmethod
    def _share(labels_BS: Tensor, num_items_in_batch: int | Tensor | None, shift_labels: Tensor | None) -> Any:
        """The part of a step's labels that these are, counted as transformers counts."""
        if num_items_in_batch is None:
            return 1.0
        counted = labels_BS[..., 1:] if shift_labels is None else shift_labels
        return counted.ne(-100).sum() / num_items_in_batch

    @staticmethod
    def _positions(tokens_BS: Tensor, mask: Tensor | None, cache: Cache | None) -> Tensor:
        length = tokens_BS.shape[1]
        if mask is not None and mask.ndim == 2:
            return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
        start = 0 if cache is None else cache.get_seq_length()
        return torch.arange(start, start + length, device=tokens_BS.device)[None]


def wrap(lm: LM, tokenizer: TextTokenizer | None = None) -> DitMoeForCausalLM:
    """`lm` as a transformers model, not copied; with a tokenizer, generation stops at its end of a document."""
    model = DitMoeForCausalLM(DitMoeLMConfig(lm=config.dump(lm.config)), lm)
    model.training = lm.training  # its own flag; the modules of `lm` keep theirs
    if tokenizer is not None:
        set_tokens(model, tokenizer)
    return model


def set_tokens(model: PreTrainedModel, tokenizer: TextTokenizer) -> None:
    """Let generation begin and stop with the tokenizer's end of text, and write only ids that it has."""
    pad = tokenizer.hf.pad_token_id
    ids = {"bos_token_id": tokenizer.eos, "eos_token_id": tokenizer.eos}
    ids["pad_token_id"] = tokenizer.eos if pad is None else pad
    generation: Any = model.generation_config
    for name, value in ids.items():
        setattr(model.config, name, value)
        setattr(generation, name, value)
    # Rows of the embedding beyond the tokenizer's ids only round its size up.
    generation.suppress_tokens = list(range(tokenizer.vocab_size, model.config.vocab_size)) or None


def _stored_weights(source: str | PathLike[str], options: dict[str, Any]) -> dict[str, Tensor]:
    """All tensors in a folder, or in the files that `from_pretrained` has just fetched by these keyword arguments."""
    folder = Path(source)
    if not folder.is_dir():
        where = {name: options[name] for name in ("revision", "cache_dir") if name in options}
        folder = Path(snapshot_download(str(source), allow_patterns="**.safetensors", local_files_only=True, **where))
    stored: dict[str, Tensor] = {}
    for path in (folder / options.get("subfolder", "")).glob("*.safetensors"):
        stored |= load_file(path)
    return stored


class RouterCallback(TrainerCallback):
    """Moves thresholds and the loads of the balance loss, by the counts of all micro-batches and processes.

    `Trainer(model, args, callbacks=[RouterCallback()], ...)`. Tokens of padding count as any other. Experts that a
    capacity has no room for are told of at the next line of the log, once.
    """

    def __init__(self) -> None:
        self._dropped: Tensor | None = None  # the most that a step has dropped of a token's experts
        self._told = False

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        dropped = counted_dropped(kwargs["model"])
        if dropped is not None:
            self._dropped = dropped if self._dropped is None else torch.maximum(dropped, self._dropped)
        update_routers(kwargs["model"], partial(reduce, reduction="sum"), report=False)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._dropped is not None and not self._told and (most := self._dropped.item()) > 0:
            self._told = True
            what = f"{most:.3g} experts per token were dropped in a step, for want of room"
            tell(f"warning: {what}; raise moe.capacity_factor")


AutoConfig.register(DitMoeLMConfig.model_type, DitMoeLMConfig, exist_ok=True)
AutoModelForCausalLM.register(DitMoeLMConfig, DitMoeForCausalLM, exist_ok=True)
