"""The experts' feed-forwards, and the ways to compute them: expert by expert on CPUs, grouped GEMMs on GPUs, and a
plain loop as the oracle of both.

The engine knows no router: it is given a `Routing` and returns the gated sum for every token.
"""

# N tokens, D width, E experts, H hidden width of one expert, F columns of the first matrix (H, or 2H for SwiGLU)
# R routed (token, expert) pairs

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_moe.moe.activations import ACTIVATIONS, Activation
from dit_moe.moe.expert_by_expert import expert_by_expert
from dit_moe.moe.grouped_mm import grouped_mm
from dit_moe.moe.routing import Routing

Implementation = Literal["auto", "by_expert", "grouped", "reference"]

LITTLE_WORK = 2**29  # multiply-adds in fp32 that grouped products are through with before threads have shared them out


def fastest(device: str, dtype: torch.dtype, work: int, experts: int) -> Literal["by_expert", "grouped"]:
    """The implementation that docs/performance.md found the fastest for so many multiply-adds of one layer."""
    if device != "cpu" or experts < torch.get_num_threads():  # a thread without an expert would have nothing to do
        return "grouped"
    # Of 16-bit numbers grouped products are prepared anew whenever an expert's number of rows is a new one.
    return "grouped" if work < LITTLE_WORK and dtype == torch.float32 else "by_expert"


class Experts(nn.Module):
    """E feed-forwards of width D and hidden width H, one stacked parameter per matrix.

    `w_in` is [E, D, F], where F is H, or 2H holding [gate | up] for SwiGLU; `w_out` is [E, H, D]. `bias_in` [E, F] and
    `bias_out` [E, D] are None without biases.
    """

    def __init__(
        self,
        experts: int,
        width: int,
        hidden: int,
        activation: Activation,
        implementation: Implementation,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.hidden, self.activation, self.implementation = hidden, activation, implementation
        columns = 2 * hidden if activation == "swiglu" else hidden
        self.w_in = nn.Parameter(torch.empty(experts, width, columns))
        self.w_out = nn.Parameter(torch.empty(experts, hidden, width))
        self.bias_in = nn.Parameter(torch.zeros(experts, columns)) if bias else None
        self.bias_out = nn.Parameter(torch.zeros(experts, width)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform for each expert's matrices, as for the linears of the dense DiT."""
        bound = math.sqrt(6 / (self.w_in.shape[1] + self.hidden))
        nn.init.uniform_(self.w_in, -bound, bound)
        nn.init.uniform_(self.w_out, -bound, bound)

    def forward(self, x_ND: Tensor, routing: Routing) -> Tensor:
        """The gated sum of each token's experts, [N, D] in x's dtype; a token without experts gets zeros."""
        implementation, dtype = self.implementation, _dtype_of_products(x_ND)
        if routing.used_R is not None:  # the others read on the host how many rows an expert has
            implementation = "grouped"
        if implementation == "auto":
            work = len(routing.token_R) * (self.w_in[0].numel() + self.w_out[0].numel())
            implementation = fastest(x_ND.device.type, dtype, work, len(self.w_in))
        if implementation == "by_expert":
            if x_ND.device.type != "cpu":
                wanted = "computes on CPUs alone; auto takes what is fastest on a device"
                raise ValueError(f"model.moe.implementation=by_expert {wanted}")
            w_in, w_out = self.w_in.to(dtype), self.w_out.to(dtype)
            bias_in, bias_out = (None if each is None else each.to(dtype) for each in (self.bias_in, self.bias_out))
            out_ND = expert_by_expert(x_ND.to(dtype), routing, w_in, w_out, bias_in, bias_out, self.activation)
            return out_ND.to(x_ND.dtype)
        rows_RD = x_ND.index_select(0, routing.token_R)
        out_RD = (self._grouped if implementation == "grouped" else self._reference)(rows_RD, routing)
        weighted_RD = out_RD * routing.weight_R[:, None]  # in fp32, whatever the experts computed in
        return torch.zeros_like(x_ND).index_add(0, routing.token_R, weighted_RD.to(x_ND.dtype))

    def _grouped(self, rows_RD: Tensor, routing: Routing) -> Tensor:
        dtype = _dtype_of_products(rows_RD)
        rows_RD, w_in, w_out = (each.to(dtype) for each in (rows_RD, self.w_in, self.w_out))
        if rows_RD.shape[0] == 0:  # keeps the graph, so that the gradients are zero and not missing
            unused = [w_in, w_out, *(bias for bias in (self.bias_in, self.bias_out) if bias is not None)]
            return rows_RD + 0 * torch.stack([each.sum().to(dtype) for each in unused]).sum()
        ends_E = routing.counts_E.cumsum(0).to(torch.int32)
        product = F.grouped_mm if routing.used_R is None else grouped_mm
        hidden_RF = _biased(product(rows_RD, w_in, offs=ends_E), self.bias_in, routing.expert_R)
        hidden_RH = ACTIVATIONS[self.activation](hidden_RF)
        return _biased(product(hidden_RH, w_out, offs=ends_E), self.bias_out, routing.expert_R)

    def _reference(self, rows_RD: Tensor, routing: Routing) -> Tensor:
        """One expert after the other in fp32. The weights are unbound once: indexing them one by one would make
        autograd write a full-size gradient for each."""
        activation, counts = ACTIVATIONS[self.activation], routing.counts_E.tolist()
        with torch.autocast(rows_RD.device.type, enabled=False):
            matrices = zip(self.w_in.float().unbind(0), self.w_out.float().unbind(0), strict=True)
            parts = zip(rows_RD.float().split(counts), routing.expert_R.split(counts), matrices, strict=True)
            outs = []
            for part, expert, (w_in, w_out) in parts:
                hidden = activation(_biased(part @ w_in, self.bias_in, expert))
                outs.append(_biased(hidden @ w_out, self.bias_out, expert))
            return torch.cat(outs)


def _dtype_of_products(x: Tensor) -> torch.dtype:
    """Autocast's dtype, or that of x without it: the engines' products are not on autocast's own list."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _biased(out_RF: Tensor, bias_EF: Tensor | None, expert_R: Tensor) -> Tensor:
    """Each row plus the bias of its expert, if there are biases."""
    return out_RF if bias_EF is None else out_RF + bias_EF.index_select(0, expert_R).to(out_RF.dtype)
