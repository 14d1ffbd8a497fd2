"""Trackers, beside log.jsonl: TensorBoard, wandb and trackio, by way of accelerate.

A run that goes on from a checkpoint goes on in them, too. TensorBoard then hides the steps after the checkpoint. wandb
and trackio keep what they have of them: neither takes anything back.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker

from dit_moe.config import ConfigError, Matching
from dit_moe.files import write_atomically
from dit_moe.formatting import tell
from dit_moe.json_files import Name, read

KEPT = "trackers.json"  # in the run folder: by what trackers know the run
WITHOUT = "or leave it out of train.trackers"
REMEDIES = {"wandb": f"run `wandb login`, set WANDB_MODE=offline, {WITHOUT}"}


@dataclass(frozen=True)
class Known:
    """What trackers know a run by: its id, its name; None for one that it was never started in."""

    wandb: Annotated[str, Matching(r"[\w-]{1,64}", "an id of at most 64 letters, digits, _ and -")] | None = None
    trackio: Name | None = None


class TensorBoard(TensorBoardTracker):
    """accelerate's, which would list the hyperparameters of each start as a run of their own."""

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Keep `values` as hyperparameters in the run's own file of events."""
        from torch.utils.tensorboard.summary import hparams  # needs tensorboard, as the writer does

        for summary in hparams(values, {}):
            self.writer.file_writer.add_summary(summary)
        self.writer.flush()


class Trackers:
    """Those of `names`, which get nothing before they are started. For the main process alone."""

    def __init__(self, accelerator: Accelerator, run: Path, names: Sequence[str]) -> None:
        self._accelerator, self._run, self._names = accelerator, run, tuple(dict.fromkeys(names))
        self._started: list[GeneralTracker] = []

    def start(self, config: Mapping[str, float], step: int) -> None:
        """Start them for what follows `step`: where they were, or as a new run if that is 0.

        Raises ConfigError, with none of them left running, if one cannot be started.
        """
        path, known = self._run / KEPT, Known()
        if step > 0 and path.exists():
            known = read(path, Known, "delete it, and the run begins anew in its trackers")
        own = {
            "wandb": os.environ.get("WANDB_RUN_ID") or known.wandb or secrets.token_hex(4),
            "trackio": known.trackio or self._run.name,
        }
        options = {
            "wandb": {"name": self._run.name, "id": own["wandb"], "resume": "allow"},
            "trackio": {"name": own["trackio"], "resume": "allow" if known.trackio else "never"},
        }
        for name in sorted(self._names, key="tensorboard".__eq__):  # last: it leaves files where the others may fail
            folder, self._accelerator.trackers = self._accelerator.logging_dir, []
            try:
                tracker = TensorBoard("dit_moe", folder, purge_step=step + 1) if name == "tensorboard" else name
                self._accelerator.log_with = [tracker]
                self._accelerator.init_trackers("dit_moe", dict(config), options)
            except Exception as error:  # each has its own
                self.finish()
                reason = " ".join(str(error).split())[:300]
                remedy = REMEDIES.get(name, f"mend that, {WITHOUT}")
                raise ConfigError("train.trackers", f"={name} cannot be started ({reason}); {remedy}") from None
            self._started += self._accelerator.trackers
        now = replace(known, **{name: own[name] for name in self._names if name in own})
        if now != known:
            write_atomically(path, json.dumps(asdict(now), indent=1) + "\n")

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Give them the numbers of a step. One that fails costs a line, and not the run."""
        self._call(f"at step {step}", lambda tracker: tracker.log(dict(numbers), step=step))

    def finish(self) -> None:
        """Let them go."""
        self._call("at the end", lambda tracker: tracker.finish())
        self._started = []

    def _call(self, when: str, call: Callable[[Any], None]) -> None:
        for tracker in tuple(self._started):
            try:
                call(tracker)
            except Exception as error:
                self._started.remove(tracker)
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                tell(f"warning: {tracker.name} failed {when} ({reason}) and gets no more; log.jsonl has it all")
