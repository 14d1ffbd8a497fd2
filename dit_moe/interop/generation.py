"""Text from prompts, by the generation loop of transformers: KV cache, left-padded batches, top-k and top-p."""

# B batch, S tokens of a prompt, V vocabulary

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dit_moe.config import WorkFailed
from dit_moe.distributed import enough_memory
from dit_moe.experiments.run import TextRun
from dit_moe.interop.transformers_lm import wrap
from dit_moe.randomness import generator
from dit_moe.text.tokenizer import TextTokenizer

LESS_MEMORY = "lower sample.max_new_tokens, or give fewer or shorter sample.prompts"


def generate_text(run: TextRun, batch_size: int = 16) -> list[str]:
    """What the run writes after each prompt of its section `sample`, by the settings there, up to the document's end.

    A prompt's draws come from (seed, its index): they do not depend on the other prompts, and the global random state
    is not touched. `batch_size`, prompts at a time, changes no text but by rounding.

    WorkFailed if memory does not suffice.
    """
    sample = run.experiment.sample
    model, eos = wrap(run.model, run.tokenizer), run.tokenizer.eos
    texts: list[str] = []
    for start in range(0, len(sample.prompts), batch_size):
        tokens_BS, mask_BS = _left_padded(run.tokenizer, sample.prompts[start : start + batch_size], model.device)
        processors = LogitsProcessorList()
        if sample.temperature > 0:
            draws = [generator(sample.seed, "text", start + row) for row in range(len(tokens_BS))]
            processors.append(TemperatureLogitsWarper(float(sample.temperature)))
            processors.extend([TopKLogitsWarper(sample.top_k)] if sample.top_k is not None else [])
            processors.extend([TopPLogitsWarper(sample.top_p)] if sample.top_p is not None else [])
            processors.append(Draw(draws))
        autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=sample.precision == "bf16")
        with enough_memory(WorkFailed, LESS_MEMORY), autocast:
            out_BS = model.generate(
                tokens_BS,
                attention_mask=mask_BS,
                max_new_tokens=sample.max_new_tokens,
                do_sample=False,  # `Draw` has made the draw
                logits_processor=processors,
            )
        for ids in out_BS[:, tokens_BS.shape[1] :].tolist():
            texts.append(run.tokenizer.decode(ids[: ids.index(eos)] if eos in ids else ids))
    return texts


class Draw(LogitsProcessor):
    """Adds Gumbel noise to the logits, so that the greatest one is a draw from their distribution.

    Each row has its own generator; transformers' own sampling uses the global one.
    """

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self.generators = generators

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        waits_BV = torch.stack([torch.empty(scores.shape[1]).exponential_(generator=each) for each in self.generators])
        return scores - waits_BV.log().to(scores.device)


def _left_padded(tokenizer: TextTokenizer, prompts: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask, [B, S] both; every document begins behind an end of text, as in training."""
    rows = [[tokenizer.eos, *tokenizer.encode(prompt)] for prompt in prompts]
    length = max(map(len, rows))
    padded = [[tokenizer.eos] * (length - len(row)) + row for row in rows]
    mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(padded, device=device), torch.tensor(mask, device=device)
