"""The loss of one micro-batch: the objective's, plus what the network says about itself while it is computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dit_moe.randomness import BatchRandom

Batch = dict[str, Tensor]
Objective = Callable[[Callable[..., Tensor], Batch, BatchRandom], dict[str, Tensor]]


def training_loss(
    network: Callable[..., tuple[Tensor, dict[str, Tensor]]],
    objective: Objective,
    batch: Batch,
    random: BatchRandom,
    aux_weights: Mapping[str, float],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Evaluate `objective` with `network` and add the auxiliary terms of its calls, weighted.

    Returns the total to differentiate, and every term by itself, detached and unweighted: the objective's under its
    own names ("loss" among them), the network's as "aux_<name>", averaged over the calls, and "total_loss".
    """
    calls: list[dict[str, Tensor]] = []

    def predict(*args: Any, **kwargs: Any) -> Tensor:
        output, aux = network(*args, return_aux=True, **kwargs)
        calls.append(aux)
        return output

    terms = objective(predict, batch, random)
    total = terms["loss"]
    for name in calls[0]:
        term = torch.stack([aux[name] for aux in calls]).mean()
        total = total + aux_weights[name] * term
        terms = terms | {f"aux_{name}": term}
    return total, {name: term.detach() for name, term in (terms | {"total_loss": total}).items()}
