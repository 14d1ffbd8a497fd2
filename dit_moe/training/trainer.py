"""The training loop.

One step: forward and backward of every micro-batch → the next batch is made ready → one read of all numbers, agreed on
by all processes → stop if any is not finite → clip → AdamW → routers' controllers → EMA. What is learned depends on the
global batch alone, not on how many processes and micro-batches it is cut into, nor on whether the processes share the
weights out, and a resumed run goes on bit for bit.
"""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from dit_moe import checkpoint
from dit_moe.config import OF_A_RUN, parse
from dit_moe.distributed import locked, on_all, on_main
from dit_moe.files import write_atomically
from dit_moe.moe import calibrate, counted_active, needs_calibration, notes, update_routers
from dit_moe.training import run_folder
from dit_moe.training.config import TrainConfig
from dit_moe.training.data_loader import Feed, Prepare, Rows, shown
from dit_moe.training.devices import adding_up, build_accelerator, place, wrap
from dit_moe.training.ema import EMA
from dit_moe.training.errors import Interrupted, TrainingError
from dit_moe.training.fine_tune import keep_thresholds, load_start
from dit_moe.training.interrupt import InterruptWatch
from dit_moe.training.loss import Objective, training_loss
from dit_moe.training.optimizer import build_optimizer, learning_rate, load_optimizer_state, optimizer_state
from dit_moe.training.progress import Unit
from dit_moe.training.report import PEAK, Report
from dit_moe.training.sharding import unsharded


@dataclass(frozen=True, kw_only=True)
class Hook:
    """Something to do every so many steps: `call(step, ema_model)`, on every process, without gradients.

    Each process has the whole model then, and may call it as often as it likes. What it returns on the main process,
    JSON-ready numbers by name, becomes a line of evaluations.jsonl; None becomes nothing.
    """

    every: int
    call: Callable[[int, nn.Module], Mapping[str, Any] | None]
    measures: bool = False  # it returns numbers: a run that was stopped before they were logged makes up for them


class Trainer:
    """Trains `model` into a run folder, from its newest checkpoint if it has one.

    Args:
        config: the train section.
        model: on the CPU; called as ``model(…, return_aux=True) -> (output, {name: scalar})``, with
            ``model.aux_weights``; ``model.sharding_units`` for fsdp2; and with a ``model.label_table`` if it has one.
        objective: ``(predict, batch, random) -> {"loss": scalar, …}``; `predict` is the model without its aux terms.
        dataset: rows fetched by index lists; a row never depends on when it is fetched.
        prepare_batch: ``(rows, random) -> batch`` for the objective, for instance images to latents; on the device, and
            every tensor with one entry per row.
        run: the run folder; made if need be.
        config_yaml: the whole experiment's resolved config, kept with every checkpoint.
        seed: of the data order and of every draw.
        start: where a run from nothing takes its weights from (`fine_tune.open_start`); one that goes on ignores it.
        facts: JSON-ready, kept in every checkpoint's state.json; ``class_names`` in the order of the label table.
        hooks: run in between.
        unit: what the log counts.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        model: nn.Module,
        objective: Objective,
        dataset: Rows,
        prepare_batch: Prepare,
        run: str | Path,
        config_yaml: str,
        seed: int,
        start: checkpoint.Checkpoint | None = None,
        facts: Mapping[str, Any] = MappingProxyType({}),
        hooks: Sequence[Hook] = (),
        unit: Unit = Unit("images"),  # noqa: B008 (it is frozen)
    ) -> None:
        self.config, self.run, self.config_yaml, self.seed = config, Path(run), config_yaml, seed
        self.objective, self.start, self.facts, self.hooks, self.unit = objective, start, facts, hooks, unit
        self.accelerator = build_accelerator(config, self.run)
        self.precision = self.accelerator.mixed_precision.replace("no", "fp32")  # what "auto" came to
        self.feed = Feed(config, dataset, prepare_batch, seed)
        self.model = model.train()
        self.aux_weights: Mapping[str, float] = model.aux_weights  # type: ignore[assignment]
        self.ema = EMA(self.model, config.ema_decay)
        place(self.accelerator, self.ema.module, config, average=True)
        place(self.accelerator, self.model, config)
        self.optimizer = build_optimizer(self.model, config)
        self.step = 0  # optimizer steps done
        self.network: nn.Module = self.model  # as accelerate wraps it
        self._unsolved = needs_calibration(self.model)
        self._begun = ""  # how, in words
        self._since_line: dict[str, Any] | None = None  # `Report.since_line` of the checkpoint gone on from
        self._watch = InterruptWatch()

    # ------------------------------------------------------------------------------------------------ start and stop

    def train(self) -> None:
        """Train up to `config.steps`; returns at once if that was reached before.

        Raises:
            ValueError: the run folder cannot be written, is in use, holds another run, looks different to different
                processes, or its newest checkpoint is damaged.
            TrainingError: the run failed in the middle.
            Interrupted: SIGTERM or Ctrl-C came; the run has saved itself.
        """
        with locked(self.run):
            on_main(lambda: run_folder.require_own_run(self.run))
            steps = on_all(self._open_run)
            if min(steps) != max(steps):
                found = f"is at step {max(steps)} for one process and at step {min(steps)} for another"
                raise ValueError(f"{self.run} {found}; put it on a disk that every node sees")
            self._train()

    def _open_run(self) -> int:
        """Go on from the newest checkpoint, if there is one; returns its step."""
        newest = checkpoint.latest(self.run)
        if newest is not None:
            self._resume(checkpoint.open_checkpoint(newest))
        elif self.start is not None:
            self._begun = load_start(self.model, self.ema.module, self.start, self.facts.get("class_names"))
            if keep_thresholds(self.model, self.start, parse(self.config_yaml)):
                self._unsolved = False
        else:
            assert self.config.init_from is None, "`start` is what open_start returns"
        return self.step

    def _train(self) -> None:
        try:
            if self.accelerator.is_main_process and self.step < self.config.steps:
                write_atomically(self.run / "config.yaml", OF_A_RUN + self.config_yaml)
            report = Report(self.accelerator, self.config, self.run, self.step, self.unit, self._since_line)
            with report, self._watch:
                missed = self._missed(report)
                if missed or self.step < self.config.steps:
                    report.start_trackers(self.run, parse(self.config_yaml))
                self._call(missed, report)
                if self.step < self.config.steps:
                    self._loop(report)
                else:
                    report.say(f"{self.run} is finished: {self.step} steps; raise train.steps to go on")
        except torch.OutOfMemoryError as error:
            rows = max(map(len, self.feed.parts))
            raise TrainingError(f"step {self.step + 1}: out of memory; lower train.micro_batch (now {rows})") from error
        except (OSError, ValueError) as error:
            raise TrainingError(f"{self.run} stopped after step {self.step}: {error}") from error
        finally:
            self.feed.close()

    def _resume(self, saved: checkpoint.Checkpoint) -> None:
        run_folder.require_same_run(saved.config(), parse(self.config_yaml), self.run)
        checkpoint.load_into(self.model, saved.weights("model"), saved.folder)
        checkpoint.load_into(self.ema.module, saved.weights("ema"), saved.folder)
        load_optimizer_state(self.model, self.optimizer, saved.weights("optimizer"), saved.folder)
        self.step, self._unsolved = saved.step, False
        self._since_line = saved.state.get("since_line")
        self._begun = f"{self.run} goes on from step {self.step}"
        before = saved.state.get("precision", self.precision)
        if before != self.precision:
            note = f"{self.run} was trained in {before} so far, here train.mixed_precision=auto means {self.precision}"
            self.accelerator.print(note, file=sys.stderr)

    def _loop(self, report: Report) -> None:
        config = self.config
        for line in [*notes(self.model), self._begun]:
            if line:
                report.say(line)
        self.feed.start(self.step, config.steps)
        on_all(self.feed.check)
        if self._unsolved:
            self._solve_threshold()
        self.network = wrap(self.accelerator, self.model)
        while self.step < config.steps:
            values, telemetry = self._update(report=report.due(self.step + 1))
            stop, failed = (values.pop(name) > 0 for name in ("stop", "failed"))
            self.step += 1
            report.step(self.step, values, learning_rate(config, self.step - 1), telemetry)
            with report.untimed():
                if stop or self.step % config.checkpoint_every == 0 or self.step == config.steps:
                    report.sync()
                    self._save(report)
                if stop and self.step < config.steps:
                    signum = self._watch.signum or signal.SIGTERM  # it may have reached another process only
                    raise Interrupted(signum, f"{self.run} is saved at step {self.step}; run the same command to go on")
                self._call(self._due(), report)
            if failed:
                on_all(self.feed.check)

    def _solve_threshold(self) -> None:
        """Start DTop-p routers at their target on the first batch: the global one, whatever its parts are."""

        def run() -> None:
            for rows, batch in self.feed.ready:
                random = self.feed.random("train", self.step, rows)
                with self.accelerator.autocast():
                    training_loss(self.model, self.objective, batch, random, self.aux_weights)

        calibrate(self.model, run, reduce=self._sum)

    def _save(self, report: Report) -> None:
        own: dict[checkpoint.Part, dict[str, Tensor]] = {
            "model": checkpoint.state_of(self.model),
            "ema": checkpoint.state_of(self.ema.module),
            "optimizer": optimizer_state(self.model, self.optimizer),
        }
        main = self.accelerator.is_main_process
        parts = {part: checkpoint.gathered(tensors, keep=main) for part, tensors in own.items()}
        # What was seen is the position in the endless data order, too.
        seen = self.step * self.config.batch_size * self.unit.per_row
        position = {"step": self.step, self.unit.name: seen, "seed": self.seed}
        state = {**self.facts, **position, "precision": self.precision, "since_line": report.since_line}
        config_yaml, keep = self.config_yaml, self.config.keep_checkpoints
        # The others wait: one that ended now would have its launcher end the writing one.
        on_main(lambda: checkpoint.save(self.run, parts=parts, state=state, config_yaml=config_yaml, keep=keep))

    def _due(self) -> list[Hook]:
        return [hook for hook in self.hooks if self.step % hook.every == 0]

    def _missed(self, report: Report) -> list[Hook]:
        """Hooks whose numbers are lacking because the run ended between its newest checkpoint and them."""
        due = [hook for hook in self._due() if hook.measures and self.step > 0]
        return [] if not due or any(on_all(lambda: report.evaluated(self.step))) else due

    def _call(self, hooks: Sequence[Hook], report: Report) -> None:
        numbers: dict[str, Any] = {}
        if hooks:
            with torch.no_grad(), unsharded(self.ema.module):
                for hook in hooks:
                    numbers |= hook.call(self.step, self.ema.module) or {}
        report.evaluation(self.step, numbers)

    # ------------------------------------------------------------------------------------------------------ one step

    def _update(self, report: bool) -> tuple[dict[str, float], dict[str, Any]]:
        """One optimizer step; returns its numbers, averaged over the global batch, and with `report` the routers'."""
        sums: dict[str, Tensor] = {}
        parts = self.feed.parts
        for rows, batch in self.feed.ready:
            random, share = self.feed.random("train", self.step, rows), len(rows) / sum(map(len, parts))
            with nullcontext() if rows is parts[-1] else adding_up(self.accelerator, self.network):
                total, terms = training_loss(self.network, self.objective, batch, random, self.aux_weights)
                (total * share).backward()
            for name, term in terms.items():
                sums[name] = sums.get(name, 0) + term.float() * share
        self.feed.advance()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        norm = checkpoint.whole(norm)
        flags = {"stop": self._watch.signum > 0, "failed": self.feed.problem is not None}
        told = {name: torch.full_like(norm, float(flag)) for name, flag in flags.items()}
        active = counted_active(self.model)
        routed = {} if active is None else {PEAK: active.to(norm.dtype)}
        values = self._agree(sums | {"grad_norm": norm} | routed | told)
        if not (math.isfinite(values["total_loss"]) and math.isfinite(values["grad_norm"])):
            raise self._not_finite(values)
        if self.config.grad_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.config.grad_clip, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        telemetry = update_routers(self.model, self._sum, report=report)
        self.ema.update(self.model, self.step)
        return values, telemetry

    def _sum(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, "sum")

    def _agree(self, values: dict[str, Tensor]) -> dict[str, float]:
        """Means over processes. Waits for the device, after the routers have: each for its number of routed pairs."""
        reduced = self.accelerator.reduce(torch.stack(list(values.values())), "mean")
        return dict(zip(values, reduced.tolist(), strict=True))

    def _not_finite(self, values: dict[str, float]) -> TrainingError:
        names = [f"{name}={value}" for name, value in values.items() if not math.isfinite(value)]
        tainted = gather_object(self.feed.tainted(self.step))
        cause = (
            f"rows {shown(tainted)} of the data set are not finite themselves; mend or remove them"
            if tainted
            else "the data is finite, so lower train.lr, lengthen train.warmup_steps or set train.grad_clip"
        )
        return TrainingError(
            f"step {self.step + 1}: {', '.join(names)} before the update; the weights were not touched and nothing was "
            f"written. The batch is rows {shown(self.feed.order.batch(self.step))} of the data set; {cause}"
        )
