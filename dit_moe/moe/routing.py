"""The ragged hand-off between routers and experts, and the prefix rule that top-p routing lives by.

A router decides which (token, expert) pairs exist; the experts compute them. Neither knows the other: a `Routing` is a
list of pairs sorted by expert, of any length, so a token may use one expert or all of them.
"""

# B samples, N tokens, D width, E experts, P = N·E possible pairs, F numbers of a patch, R routed (token, expert) pairs

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

LARGEST_U = 87.0  # exp(−87) is about the smallest normal number of fp32: from here on every expert is active
ROUNDING = 1e-6  # of a token: 4.6 · 5 falls short of 23


@dataclass(frozen=True, kw_only=True)
class RoutingContext:
    """What a router may look at beside the states of its N tokens."""

    samples: int = 1  # B; the tokens are those of so many samples, one after the other, of equal length
    labels_B: Tensor | None = None  # int64, the class of each sample
    null_label: int | None = None  # the one of `labels_B` that stands for no class
    time_BD: Tensor | None = None  # embedding of the time
    unmodulated_ND: Tensor | None = None  # the normalised tokens before the modulation by time and label
    target_NF: Tensor | None = None  # what the network learns to say of each token: the objective's target of its patch
    earlier_NE: Tensor | None = None  # what the router of the MoE layer before handed on

    def by_token(self, value_B: Tensor, tokens: int) -> Tensor:
        """What is known of each sample, [B, …], for each of the `tokens` in all, [N, …]."""
        return value_B.repeat_interleave(tokens // max(1, self.samples), dim=0)


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Which token goes to which expert, and with which weight.

    The pairs are sorted by expert, and by token within an expert.
    """

    token_R: Tensor  # int64, row of the token
    expert_R: Tensor  # int64, non-decreasing
    weight_R: Tensor  # fp32, the gate that the expert's output is multiplied with; carries the gradient
    counts_E: Tensor  # int64, pairs of each expert
    aux: dict[str, Tensor]  # scalar loss terms by name, empty in evaluation
    used_R: Tensor | None = None  # bool, false of rows behind the last pair, which are none; None: all rows are pairs
    prob_NE: Tensor | None = None  # each token's distribution over experts, without gradient
    added_ND: Tensor | None = None  # what experts without weights add to each token's output
    handed_on_NE: Tensor | None = None  # for the router of the next MoE layer

    def trimmed(self) -> Routing:
        """Without the rows that are no pairs; for those the device is waited for."""
        if self.used_R is None:
            return self
        token_R, expert_R, weight_R = (each[self.used_R] for each in (self.token_R, self.expert_R, self.weight_R))
        return replace(self, token_R=token_R, expert_R=expert_R, weight_R=weight_R, used_R=None)


def routing_from_mask(
    mask_NE: Tensor,
    weight_NE: Tensor,
    aux: dict[str, Tensor] | None = None,
    capacity: int | None = None,
    **others: Tensor | None,
) -> Routing:
    """The Routing of the pairs that `mask_NE` marks, weighted by `weight_NE` (zero outside the mask or not).

    Args:
        capacity: R, whatever the mask is, so that nothing waits for the device. Of fewer pairs the rows behind the
            last one have weight 0. Of more pairs than rows those are kept that lie evenly in the sorted list: every
            expert loses the same share, to within one pair, and in it tokens far apart. To drop the end of the list
            would starve the last experts, and the smallest gates those that are still learning. Gates stay as they are.
        others: further fields of `Routing`.
    """
    tokens, mask_P, used_R = max(1, mask_NE.shape[0]), mask_NE.T.flatten(), None
    counts_E = mask_NE.sum(0)
    if capacity is None:
        pair_R = mask_P.nonzero().squeeze(1)  # the one place where the host waits to learn R
    else:
        number_P, ends_E, row_R = mask_P.cumsum(0), counts_E.cumsum(0), torch.arange(capacity, device=mask_NE.device)
        kept_R = torch.where(ends_E[-1] > capacity, row_R * ends_E[-1] // max(1, capacity), row_R)  # which of the pairs
        pair_R = torch.searchsorted(number_P, kept_R + 1).clamp(max=len(mask_P) - 1)
        counts_E = torch.searchsorted(kept_R, ends_E).diff(prepend=ends_E.new_zeros(1))
        used_R = kept_R < ends_E[-1]
    weight_R = weight_NE.T.flatten().index_select(0, pair_R)
    return Routing(
        token_R=pair_R % tokens,
        expert_R=pair_R // tokens,
        weight_R=weight_R if used_R is None else weight_R.where(used_R, 0),
        counts_E=counts_E,
        aux=aux or {},
        used_R=used_R,
        **others,
    )


def mass_left(prob_NE: Tensor, ranking_NE: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """For each token its experts in falling order of probability, or of `ranking_NE`, and the mass from each one on.

    Returns (left_NE, order_NE): the j-th best expert ``order_NE[n, j]`` belongs to the top-p prefix iff what stands
    before it is less than p, that is iff ``left_NE[n, j] > 1 − p``. Summed from the small end, so that it stays exact
    where p is so near 1 that only `threshold_u` can tell it from 1.
    """
    sorted_NE, order_NE = sort_experts(prob_NE if ranking_NE is None else ranking_NE)
    if ranking_NE is not None:
        sorted_NE = prob_NE.gather(-1, order_NE)
    return sorted_NE.flip(-1).cumsum(-1).flip(-1), order_NE


def sort_experts(score_NE: Tensor) -> tuple[Tensor, Tensor]:
    """Each token's scores in falling order, and whose they are; of equal ones those of the first experts come first."""
    fast = score_NE.device.type == "cpu" and score_NE.dtype == torch.float32 and not score_NE.requires_grad
    if torch.compiler.is_compiling() or not fast:
        return score_NE.sort(dim=-1, descending=True, stable=True)
    # NumPy sorts integers with vector instructions, ten times as fast as torch. The bits of a score, with those of
    # negative ones turned round, have the order of the scores; the expert's number beside them makes all different.
    # −0 becomes 0, and every NaN the positive one, which stands first as in torch's sort.
    bits_NE = (score_NE + 0.0).masked_fill_(score_NE.isnan(), torch.nan).view(torch.int32)
    rising_NE = bits_NE ^ ((bits_NE >> 31) & 0x7FFFFFFF)
    key_NE = (rising_NE.bitwise_not().to(torch.int64) << 32) | torch.arange(score_NE.shape[1])
    key_NE.numpy().sort(axis=-1)
    order_NE = key_NE & 0xFFFFFFFF
    rising_NE = (key_NE >> 32).to(torch.int32).bitwise_not()
    return (rising_NE ^ ((rising_NE >> 31) & 0x7FFFFFFF)).view(torch.float32), order_NE


def limit_experts(left_NE: Tensor, at_least: int, at_most: int) -> Tensor:
    """`left_NE` such that every threshold keeps between `at_least` and `at_most` experts of each token."""
    left_NE = left_NE.clone()
    left_NE[:, :at_least] = torch.inf
    left_NE[:, at_most:] = -torch.inf
    return left_NE


def prefix_mask(left_NE: Tensor, order_NE: Tensor, *, tail: Tensor | float) -> Tensor:
    """Bool [N, E]: each token's smallest prefix of experts that leaves out at most `tail` = 1 − p. DTop-p, step 3."""
    return torch.zeros_like(order_NE, dtype=torch.bool).scatter(-1, order_NE, left_NE > tail)


def best_experts(score_NE: Tensor, k: int) -> Tensor:
    """Bool [N, E]: the k experts of each token with the highest score. Of equal scores any may be chosen, always k."""
    best_NK = score_NE.topk(k, dim=-1).indices
    return torch.zeros_like(score_NE, dtype=torch.bool).scatter(-1, best_NK, True)


def best_tokens(score_NE: Tensor, target: float, samples: int = 1) -> Tensor:
    """Bool [N, E]: each expert's ⌊target·S/E⌋ best of the S tokens of each sample, and at least one. Expert choice.

    Of equal scores the first tokens are taken.
    """
    score_BSE = score_NE.unflatten(0, (max(1, samples), -1)) if len(score_NE) else score_NE[None]
    count = tokens_per_expert(score_BSE.shape[1], score_NE.shape[1], target)
    best_BKE = score_BSE.sort(dim=1, descending=True, stable=True).indices[:, :count]
    return torch.zeros_like(score_BSE, dtype=torch.bool).scatter(1, best_BKE, True).view(score_NE.shape)


def tokens_per_expert(tokens: int, experts: int, target: float) -> int:
    """How many of so many tokens an expert takes for a mean of `target` experts a token, at least one."""
    return max(1, int(target * tokens / experts + ROUNDING))


def best_pairs(score_NE: Tensor, target: float, samples: int = 1) -> Tensor:
    """Bool [N, E]: the ⌊target·S⌋ best (token, expert) pairs of the S tokens of each sample.

    Of equal scores those of the first tokens are taken, and of a token's those of its first experts.
    """
    score_BP = score_NE.reshape(max(1, samples), -1)
    count = int(target * score_BP.shape[1] / score_NE.shape[1] + ROUNDING)
    best_BK = score_BP.sort(dim=1, descending=True, stable=True).indices[:, :count]
    return torch.zeros_like(score_BP, dtype=torch.bool).scatter(1, best_BK, True).view(score_NE.shape)


def threshold_u(p: float) -> float:
    """u = −ln(1 − p), from 0 to `LARGEST_U`: how thresholds are kept, since sharp routers need a 1 − p below 1e-7."""
    return LARGEST_U if p >= 1 else min(-math.log1p(-p), LARGEST_U)


def threshold_p(u: float) -> float:
    """The inverse of `threshold_u`, for people: rounded, so that 0.9 comes back as 0.9."""
    return 1.0 if u >= LARGEST_U else round(-math.expm1(-u), 14)


def threshold_tail(u: float) -> float:
    """1 − p of `threshold_u`, exact to the last digit."""
    return 0.0 if u >= LARGEST_U else math.exp(-u)
