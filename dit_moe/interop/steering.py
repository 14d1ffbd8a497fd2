"""What our trainer does for the routers after an optimizer step, for the `Trainer` of transformers."""

from __future__ import annotations

from functools import partial
from typing import Any

from accelerate.utils import reduce
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dit_moe.moe import update_routers


class RouterCallback(TrainerCallback):
    """Moves thresholds and the loads of the balance loss, by the counts of all micro-batches and processes.

    `Trainer(model, args, callbacks=[RouterCallback()], ...)`. Tokens of padding count as any other.
    """

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        update_routers(kwargs["model"], partial(reduce, reduction="sum"), report=False)
