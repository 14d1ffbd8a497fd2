"""The training loss of a language model: cross-entropy of the next token."""

# B batch, S tokens the model sees, N = B·S tokens, V vocabulary

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dit_moe.config import require
from dit_moe.randomness import BatchRandom

CHUNK = 2**27  # logits in fp32 at a time: 512 MiB


@dataclass(frozen=True, kw_only=True)
class NextTokenConfig:
    """Options of the loss."""

    z_loss: float = 0.0
    """Weight of the mean squared log of the softmax's denominator, which keeps logits small (PaLM: 1e-4)."""

    def __post_init__(self) -> None:
        require(self.z_loss >= 0, self, "z_loss", "must be at least 0")


class NextToken:
    """``objective(model, {"tokens": int64 [B, S + 1]}, random)``: mean over all B·S predictions, in nats, in fp32.

    With "documents" [B, S + 1] in the batch, tokens attend only within their document.
    """

    def __init__(self, config: NextTokenConfig) -> None:
        self.config = config

    def __call__(
        self, model: Callable[..., Tensor], batch: Mapping[str, Tensor], random: BatchRandom
    ) -> dict[str, Tensor]:
        tokens, documents = batch["tokens"], batch.get("documents")
        seen = () if documents is None else (documents[:, :-1],)
        logits_NV, targets_N = model(tokens[:, :-1], *seen).flatten(0, 1), tokens[:, 1:].flatten()
        loss, z = next_token_losses(logits_NV, targets_N)
        terms = {"loss": loss + self.config.z_loss * z, "next_token": loss.detach()}
        return terms | ({"z_loss": z.detach()} if self.config.z_loss else {})


def next_token_losses(logits_NV: Tensor, targets_N: Tensor, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """Means of the cross-entropy and of the squared log-denominator, in fp32.

    Never more than `chunk` elements of the logits are held in fp32, in either direction.
    """
    parts = list(
        zip(*(each.split(max(1, chunk // logits_NV.shape[1])) for each in (logits_NV, targets_N)), strict=True)
    )
    if len(parts) == 1:
        sums = [_sums(*parts[0])]
    else:
        sums = [checkpoint(_sums, *part, use_reentrant=False) for part in parts]
    loss, z = torch.stack(sums).sum(0) / len(targets_N)
    return loss, z


def _sums(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    logits_NV = logits_NV.float()
    log_denominator_N = logits_NV.logsumexp(-1)
    of_target_N = logits_NV.gather(1, targets_N[:, None]).squeeze(1)
    return torch.stack([(log_denominator_N - of_target_N).sum(), log_denominator_N.square().sum()])
