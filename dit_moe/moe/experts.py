"""The experts' feed-forwards, and the two ways to compute them: a plain loop (the oracle) and grouped GEMMs.

The engine knows no router: it is given a `Routing` and returns the gated sum for every token.
"""

# N tokens, D width, E experts, H hidden width of one expert, F columns of the first matrix (H, or 2H for SwiGLU)
# R routed (token, expert) pairs

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_moe.moe.routing import Routing

Activation = Literal["gelu", "silu", "swiglu"]
Implementation = Literal["grouped", "reference"]


def swiglu(hidden_RF: Tensor) -> Tensor:
    """SiLU(gate) · up of rows that hold [gate | up]."""
    gate_RH, up_RH = hidden_RF.chunk(2, dim=-1)
    return F.silu(gate_RH) * up_RH


def gelu(hidden_RH: Tensor) -> Tensor:
    """The tanh form, as in the dense DiT."""
    return F.gelu(hidden_RH, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": gelu, "silu": F.silu, "swiglu": swiglu}
MATRICES: dict[str, int] = {"gelu": 2, "silu": 2, "swiglu": 3}  # of a feed-forward with that activation


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
        rows_RD = x_ND.index_select(0, routing.token_R)
        compute = self._grouped if self.implementation == "grouped" else self._reference
        out_RD = compute(rows_RD, routing)
        weighted_RD = out_RD * routing.weight_R[:, None]  # in fp32, whatever the experts computed in
        return torch.zeros_like(x_ND).index_add(0, routing.token_R, weighted_RD.to(x_ND.dtype))

    def _grouped(self, rows_RD: Tensor, routing: Routing) -> Tensor:
        device = rows_RD.device.type
        autocast = torch.is_autocast_enabled(device)  # grouped_mm is not on autocast's own list
        dtype = torch.get_autocast_dtype(device) if autocast else rows_RD.dtype
        rows_RD, w_in, w_out = (each.to(dtype) for each in (rows_RD, self.w_in, self.w_out))
        if rows_RD.shape[0] == 0:  # keeps the graph, so that the gradients are zero and not missing
            unused = [w_in, w_out, *(bias for bias in (self.bias_in, self.bias_out) if bias is not None)]
            return rows_RD + 0 * torch.stack([each.sum().to(dtype) for each in unused]).sum()
        ends_E = routing.counts_E.cumsum(0).to(torch.int32)
        hidden_RF = _biased(F.grouped_mm(rows_RD, w_in, offs=ends_E), self.bias_in, routing.expert_R)
        hidden_RH = ACTIVATIONS[self.activation](hidden_RF)
        return _biased(F.grouped_mm(hidden_RH, w_out, offs=ends_E), self.bias_out, routing.expert_R)

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


def _biased(out_RF: Tensor, bias_EF: Tensor | None, expert_R: Tensor) -> Tensor:
    """Each row plus the bias of its expert, if there are biases."""
    return out_RF if bias_EF is None else out_RF + bias_EF.index_select(0, expert_R).to(out_RF.dtype)
