"""The experts on CPUs: one after the other, each on its own tokens, and the experts shared out over threads.

The rows of one expert fit a core's cache, so that what is gathered, activated and weighted there costs little beside
the products. The products of one expert are small, and two threads inside of one wait for each other: each product has
one thread instead, and the threads work on different experts.
"""

# N tokens, D width, E experts, H hidden width of one expert, F columns of the first matrix (H, or 2H for SwiGLU)
# R routed pairs, P of them with padding, C rows of a chunk

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dit_moe.moe.activations import IN_PLACE
from dit_moe.moe.routing import Routing
from dit_moe.moe.threads import over_threads

CHUNK = 1024  # most rows of an expert at once, so that they stay in cache
# oneDNN prepares a product of 16-bit numbers anew for each number of rows, which takes about as long as the product.
# So an expert's rows are filled up to a multiple of this.
PADDING = {torch.bfloat16: 16, torch.float16: 16}
COST_OF_EXPERT = 64  # in rows: what an expert costs beside its rows


def expert_by_expert(
    x_ND: Tensor,
    routing: Routing,
    w_in: Tensor,
    w_out: Tensor,
    bias_in: Tensor | None,
    bias_out: Tensor | None,
    activation: str,
) -> Tensor:
    """The gated sum of each token's experts, [N, D]. All but the gates have the dtype of the products.

    What is kept for the backward pass is the first product of each pair, [R, F], and nothing where gradients are off.
    """
    rows, keep = arrange(routing, len(x_ND), x_ND.dtype), torch.is_grad_enabled()
    tensors = x_ND, routing.weight_R, w_in, w_out, bias_in, bias_out
    out_ND: Tensor = _ExpertByExpert.apply(*tensors, rows, activation, keep)
    return out_ND


@dataclass(frozen=True)
class Rows:
    """The routed pairs by expert, each expert's filled up with rows of token 0 and weight 0."""

    token_P: Tensor
    weight_P1: Tensor  # the gates in the dtype of the products
    row_R: Tensor  # where each pair is among these rows
    by_token_R: Tensor  # the same numbers, those of the first token first
    start_N: Tensor  # where each token's begin in `by_token_R`
    sizes: list[int]  # rows of each chunk
    chunks: list[range]  # which chunks are an expert's
    costs: list[int]  # of each expert, in rows

    def split(self, *each: Tensor) -> list[tuple[Tensor, ...]]:
        """Views of these tensors, each [P, …], for each chunk."""
        return list(zip(*(tensor.split(self.sizes) for tensor in each), strict=True))

    def sum_by_token(self, out_PD: Tensor) -> Tensor:
        """The sum over the experts of each token, [N, D]."""
        return torch.embedding_bag(out_PD, self.by_token_R, self.start_N)[0]


def arrange(routing: Routing, tokens: int, dtype: torch.dtype) -> Rows:
    padding = PADDING.get(dtype, 1)
    padded_E = -(-routing.counts_E // padding) * padding
    added_E = padded_E - routing.counts_E
    shift_E = added_E.cumsum(0) - added_E
    row_R = torch.arange(len(routing.token_R)) + shift_E.index_select(0, routing.expert_R)
    padded = padded_E.tolist()
    token_P, weight_P = row_R.new_zeros(sum(padded)), routing.weight_R.new_zeros(sum(padded))
    token_P[row_R], weight_P[row_R] = routing.token_R, routing.weight_R.detach()
    count_N = torch.bincount(routing.token_R, minlength=tokens)
    sizes: list[int] = []
    chunks = []
    for rows in padded:
        parts = [min(CHUNK, rows - done) for done in range(0, rows, CHUNK)]
        chunks.append(range(len(sizes), len(sizes) + len(parts)))
        sizes += parts
    return Rows(
        token_P=token_P,
        weight_P1=weight_P.to(dtype)[:, None],
        row_R=row_R,
        by_token_R=row_R.index_select(0, routing.token_R.argsort(stable=True)),
        start_N=count_N.cumsum(0) - count_N,
        sizes=sizes,
        chunks=chunks,
        costs=[rows + COST_OF_EXPERT for rows in padded],
    )


class _ExpertByExpert(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_R: Tensor,
        w_in: Tensor,
        w_out: Tensor,
        bias_in: Tensor | None,
        bias_out: Tensor | None,
        rows: Rows,
        activation: str,
        keep: bool,
    ) -> Tensor:
        # Parameters want gradients under no_grad, too, so what the context says would keep the rows there.
        hidden_PF = x_ND.new_empty(len(rows.token_P) if keep and any(ctx.needs_input_grad) else 0, w_in.shape[2])
        out_PD = x_ND.new_empty(len(rows.token_P), x_ND.shape[1])
        matrices = [_unbind(each) for each in (w_in, w_out, bias_in, bias_out)]
        over_threads(rows.costs, _forward(x_ND, rows, hidden_PF, out_PD, matrices, activation))
        ctx.save_for_backward(x_ND, hidden_PF, w_in, w_out, bias_in, bias_out)
        ctx.rows, ctx.activation = rows, activation
        return rows.sum_by_token(out_PD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, hidden_PF, *parameters = ctx.saved_tensors
        rows: Rows = ctx.rows
        gradients = [None if each is None else torch.empty_like(each) for each in parameters]
        grad_weight_P = torch.empty(len(rows.token_P))
        grad_x_PD = x_ND.new_empty(len(rows.token_P), x_ND.shape[1])
        tensors = x_ND, grad_ND.to(x_ND.dtype), rows, hidden_PF, grad_weight_P, grad_x_PD
        matrices, into = [_unbind(each) for each in parameters], [_unbind(each) for each in gradients]
        over_threads(rows.costs, _backward(*tensors, matrices, into, ctx.activation))
        grad_weight_R = grad_weight_P.index_select(0, rows.row_R)
        return rows.sum_by_token(grad_x_PD), grad_weight_R, *gradients, None, None, None


def _unbind(stacked: Tensor | None) -> tuple[Tensor, ...]:
    """One by expert, at once; empty if there are none."""
    return () if stacked is None else stacked.unbind(0)


def _forward(
    x_ND: Tensor,
    rows: Rows,
    hidden_PF: Tensor,
    out_PD: Tensor,
    matrices: list[tuple[Tensor, ...]],
    activation: str,
) -> Callable[[list[int]], None]:
    """What one thread does for its experts: fills their rows of `out_PD`, the gated outputs, and, if it has any, those
    of `hidden_PF`."""
    w_in, w_out, bias_in, bias_out = matrices
    chunks = rows.split(rows.token_P, rows.weight_P1, out_PD)
    kept = hidden_PF.split(rows.sizes) if len(hidden_PF) else ()
    activate, most = IN_PLACE[activation].forward, max(rows.sizes, default=0)

    def work(mine: list[int]) -> None:
        x_MD, active_MH = x_ND.new_empty(most, x_ND.shape[1]), x_ND.new_empty(most, w_out[0].shape[0])
        hidden_MF = x_ND.new_empty(0 if kept else most, hidden_PF.shape[1])
        for e in mine:
            for i in rows.chunks[e]:
                token_C, weight_C1, out_CD = chunks[i]
                count = len(token_C)
                hidden_CF = kept[i] if kept else hidden_MF[:count]
                x_CD = torch.index_select(x_ND, 0, token_C, out=x_MD[:count])
                if bias_in:
                    torch.addmm(bias_in[e], x_CD, w_in[e], out=hidden_CF)
                else:
                    torch.mm(x_CD, w_in[e], out=hidden_CF)
                weighted_CH = activate(hidden_CF, active_MH[:count]).mul_(weight_C1)  # narrower than the output
                torch.mm(weighted_CH, w_out[e], out=out_CD)
                if bias_out:
                    out_CD.addcmul_(weight_C1, bias_out[e])

    return work


def _backward(
    x_ND: Tensor,
    grad_ND: Tensor,
    rows: Rows,
    hidden_PF: Tensor,
    grad_weight_P: Tensor,
    grad_x_PD: Tensor,
    matrices: list[tuple[Tensor, ...]],
    gradients: list[tuple[Tensor, ...]],
    activation: str,
) -> Callable[[list[int]], None]:
    """What one thread does for its experts: fills their `gradients`, and their rows of the gates' and the tokens'."""
    w_in, w_out, _, bias_out = matrices
    grad_w_in, grad_w_out, grad_bias_in, grad_bias_out = gradients
    chunks = rows.split(rows.token_P, rows.weight_P1, hidden_PF, grad_weight_P, grad_x_PD)
    functions, most = IN_PLACE[activation], max(rows.sizes, default=0)

    def work(mine: list[int]) -> None:
        x_MD, grad_MD = (x_ND.new_empty(most, x_ND.shape[1]) for _ in range(2))
        active_MH, grad_active_MH = (x_ND.new_empty(most, w_out[0].shape[0]) for _ in range(2))
        grad_hidden_MF = x_ND.new_empty(most, hidden_PF.shape[1])
        for e in mine:
            if not rows.chunks[e]:
                for each in gradients:
                    if each:
                        each[e].zero_()
            for i in rows.chunks[e]:
                token_C, weight_C1, hidden_CF, grad_weight_C, grad_x_CD = chunks[i]
                count, first = len(token_C), i == rows.chunks[e].start
                x_CD = torch.index_select(x_ND, 0, token_C, out=x_MD[:count])
                grad_CD = torch.index_select(grad_ND, 0, token_C, out=grad_MD[:count])
                grad_hidden_CF = grad_hidden_MF[:count]
                active_CH = functions.again(hidden_CF, active_MH[:count], grad_hidden_CF)
                grad_active_CH = torch.mm(grad_CD, w_out[e].t(), out=grad_active_MH[:count])
                torch.sum(active_CH * grad_active_CH, -1, dtype=torch.float32, out=grad_weight_C)
                if bias_out:
                    grad_weight_C.addmv_(grad_CD.float(), bias_out[e].float())
                    _add_column_sums(grad_bias_out[e], grad_CD * weight_C1, first)
                _add_product(grad_w_out[e], active_CH.mul_(weight_C1), grad_CD, first)
                functions.backward(grad_active_CH.mul_(weight_C1), hidden_CF, grad_hidden_CF)
                if grad_bias_in:
                    _add_column_sums(grad_bias_in[e], grad_hidden_CF, first)
                _add_product(grad_w_in[e], x_CD, grad_hidden_CF, first)
                torch.mm(grad_hidden_CF, w_in[e].t(), out=grad_x_CD)

    return work


def _add_product(grad: Tensor, left_CX: Tensor, right_CY: Tensor, first: bool) -> None:
    """leftᵀ · right added to the gradient [X, Y], or written there."""
    if first:
        torch.mm(left_CX.t(), right_CY, out=grad)
    else:
        grad.addmm_(left_CX.t(), right_CY)


def _add_column_sums(grad: Tensor, rows_CX: Tensor, first: bool) -> None:
    """The sum of the rows added to the gradient [X], or written there."""
    if first:
        torch.sum(rows_CX, 0, out=grad)
    else:
        grad += rows_CX.sum(0)
