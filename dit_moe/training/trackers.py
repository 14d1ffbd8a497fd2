"""Trackers, beside log.jsonl: TensorBoard, wandb and trackio, by way of accelerate.

A run that goes on from a checkpoint goes on in them, too. TensorBoard then hides the steps after the checkpoint. wandb
and trackio keep what they have of them: neither takes anything back.

Numbers are named by what they are of: "train/loss", "router/p", "router/active/layer_03", "eval/fd_digits_cnn64_n200".
"""

# H height, W width

from __future__ import annotations

import io
import json
import os
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker, get_available_trackers
from PIL import Image

from dit_moe.config import ConfigError, Matching
from dit_moe.extras import how_to_install
from dit_moe.files import write_atomically
from dit_moe.formatting import tell
from dit_moe.json_files import Name, read
from dit_moe.training.config import TrainConfig

KEPT = "trackers.json"  # in the run folder: by what trackers know the run
OF_ROUTERS = ("active", "active_peak", "dropped", "p")  # means over the layers, in a line of log.jsonl
NOT_OF_STEPS = (*OF_ROUTERS, "step", "layers", "changes")  # the rest of it is of the training itself
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


def require_installed(names: Iterable[str]) -> None:
    """ConfigError if the package of a tracker of the config is missing: accelerate itself would go on without it."""
    for name in names:
        if name not in map(str, get_available_trackers()):
            raise ConfigError("train.trackers", f"={name} is not installed; {how_to_install(name)}, {WITHOUT}")


class Trackers:
    """Those of the config, which get nothing before they are started. For the main process alone."""

    def __init__(self, accelerator: Accelerator, run: Path, config: TrainConfig) -> None:
        self._accelerator, self._run, self._config = accelerator, run, config
        self._names = tuple(dict.fromkeys(config.trackers))
        self._started: list[GeneralTracker] = []

    def start(self, config: Mapping[str, float], step: int) -> None:
        """Start them for what follows `step`: where they were, or as a new run if that is 0.

        Raises ConfigError, with none of them left running, if one cannot be started.
        """
        path, known = self._run / KEPT, Known()
        if step > 0 and path.exists():
            known = read(path, Known, "delete it, and the run begins anew in its trackers")
        name = self._config.run_name or self._run.absolute().name
        own = {
            "wandb": os.environ.get("WANDB_RUN_ID") or known.wandb or secrets.token_hex(4),
            "trackio": known.trackio or name,
        }
        group = {} if self._config.run_group is None else {"group": self._config.run_group}
        options = {
            "wandb": {"name": name, "id": own["wandb"], "resume": "allow", **group},
            "trackio": {"name": own["trackio"], "resume": "allow" if known.trackio else "never", **group},
        }
        for name in sorted(self._names, key="tensorboard".__eq__):  # last: it leaves files where the others may fail
            self._accelerator.trackers = []
            try:
                tracker = self._board(step) if name == "tensorboard" else name
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

    def _board(self, step: int) -> TensorBoard:
        """In a folder of its own in the run folder, or in that which earlier versions began there."""
        folder = "dit_moe" if (self._run / "dit_moe").is_dir() else "tensorboard"
        return TensorBoard(folder, self._run, purge_step=step + 1)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Give them the numbers of a step. One that fails costs a line, and not the run."""
        self._call(f"at step {step}", lambda tracker: tracker.log(dict(numbers), step=step))

    def log_picture(self, name: str, png: bytes, step: int) -> None:
        """Give them a picture as it was after a step."""
        if self._started:
            pixels_HWC = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
            self._call(f"at step {step}", lambda tracker: _log_pixels(tracker, name, pixels_HWC, step))

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


def _log_pixels(tracker: Any, name: str, pixels_HWC: np.ndarray, step: int) -> None:
    if tracker.name == "trackio":  # accelerate's has no log_images
        import trackio

        tracker.log({name: trackio.Image(pixels_HWC)}, step=step)
    else:
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({name: pixels_HWC[None]}, step=step, **layout)


# ---------------------------------------------------------------------------------------------------------- their names


def tracked(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of log.jsonl by the names that trackers show them under."""
    routers = {name: line[name] for name in OF_ROUTERS if line.get(name) is not None}
    others = {name.replace("_per_s", "_per_second"): value for name, value in line.items() if name not in NOT_OF_STEPS}
    by_layer = {
        f"{name}/layer_{layer:02}": value
        for name, values in (line.get("layers") or {}).items()
        for layer, value in enumerate(values)
    }
    return flatten({"train": others, "router": routers | by_layer})


def flatten(line: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The values under one level of names, "train/lr" and "eval/images": what trackers take."""
    flat: dict[str, float] = {}
    for key, value in line.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}/")
        elif isinstance(value, list):
            flat |= flatten({str(i): item for i, item in enumerate(value)}, f"{prefix}{key}/")
        elif value is not None:
            flat[prefix + key] = value
    return flat
