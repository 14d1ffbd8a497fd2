"""The training loop, from the start of a run, or its newest checkpoint, to its end.

What is learned depends on the global batch alone, not on how many processes and micro-batches it is cut into, nor on
whether the processes share the weights out, and a resumed run goes on bit for bit. The step itself is in `step.py`.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from dit_moe import checkpoint
from dit_moe.config import OF_A_RUN, Tree, completed, parse
from dit_moe.data.listing import note
from dit_moe.distributed import is_out_of_memory, locked, on_all, on_main
from dit_moe.files import write_atomically
from dit_moe.formatting import tell
from dit_moe.models.base import TransformerConfig
from dit_moe.moe import collapsed, needs_calibration, notes
from dit_moe.training.config import TrainConfig
from dit_moe.training.curves_of_runs import CurvesPicture
from dit_moe.training.data_loader import Dataset, Prefetcher, Prepare, shown
from dit_moe.training.devices import build_accelerator, local, remarks, unsharded
from dit_moe.training.interrupt import Interrupted, InterruptWatch, TrainingError
from dit_moe.training.log import Logger, Unit
from dit_moe.training.profile import TRACE, StepProfile, untimed
from dit_moe.training.run_start import (
    fits_start,
    keep_thresholds,
    load_start,
    note_edited_config,
    require_own_run,
    require_same_run,
)
from dit_moe.training.step import (
    NotFinite,
    Objective,
    TrainingStep,
    learning_rate,
    load_optimizer_state,
    optimizer_state,
)
from dit_moe.training.trackers import Trackers, flatten

DATA_ARE_FINITE = "the data is finite"  # in the message on a training that diverged by itself


@dataclass(frozen=True, kw_only=True)
class Hook:
    """Something to do every so many steps: `call(step, ema_model)`, on every process, without gradients.

    Each process has the whole model then, and may call it as often as it likes. What it returns on the main process, by
    name: JSON-ready numbers become a line of evaluations.jsonl, the paths of PNGs are for the trackers; or None.
    """

    every: int
    call: Callable[[int, nn.Module], Mapping[str, Any] | None]
    measures: bool = False  # it returns numbers: a run that was stopped before they were logged makes up for them


class Trainer:
    """Trains `model` into a run folder, from its newest checkpoint if it has one.

    Args:
        config: the train section.
        model, objective: as `TrainingStep` takes them; with a ``model.label_table`` if it has one.
        dataset: rows fetched by index lists; a row never depends on when it is fetched.
        prepare_batch: ``(rows, random) -> batch`` for the objective, for instance images to latents; on the device, and
            every tensor with one entry per row.
        run: the run folder; made if need be.
        config_yaml: the whole experiment's resolved config, kept with every checkpoint.
        config_class: what it is a config of, by which one that an earlier version kept is read; None: as it stands.
        seed: of the data order and of every draw.
        start: where a new run takes its weights from (`open_start`); one that goes on ignores it.
        start_settings: those that they were trained with and that are others here, in words; "" if there are none.
        facts: JSON-ready, kept in every checkpoint's state.json; ``class_names`` in the order of the label table.
        hooks: run in between.
        curves: the picture that is drawn of the log, in the run folder; None: none is.
        unit: what the log counts.
        keep_inputs: puts into the run folder what it takes to use the run elsewhere; called on the main process.

    `profile` may be set before `train`: what is to be found out of its first steps.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        model: nn.Module,
        objective: Objective,
        dataset: Dataset,
        prepare_batch: Prepare,
        run: str | Path,
        config_yaml: str,
        config_class: type | None = None,
        seed: int,
        start: checkpoint.Checkpoint | None = None,
        start_settings: str = "",
        facts: Mapping[str, Any] = MappingProxyType({}),
        hooks: Sequence[Hook] = (),
        curves: CurvesPicture | None = None,
        unit: Unit = Unit("images"),  # noqa: B008 (it is frozen)
        keep_inputs: Callable[[], object] = lambda: None,
    ) -> None:
        self.config, self.run, self.config_yaml, self.seed = config, Path(run), config_yaml, seed
        self.config_class = config_class
        self.start, self.facts, self.hooks, self.curves, self.unit = start, facts, hooks, curves, unit
        self.keep_inputs, self.start_settings = keep_inputs, start_settings
        self.accelerator = build_accelerator(config, self.run)
        self.precision = self.accelerator.mixed_precision.replace("no", "fp32")  # what "auto" came to
        self.prefetcher = Prefetcher(config, dataset, prepare_batch, seed)
        self.implementation = self._implementation(getattr(model, "config", None))  # of experts, what "auto" came to
        self.training_step = TrainingStep(config, self.accelerator, model, objective)
        self.model, self.ema = self.training_step.model, self.training_step.ema
        self.profile: StepProfile | None = None
        self.step = 0  # optimizer steps done
        self._calibrate = needs_calibration(self.model)
        self._begun = ""  # how, in words
        self._changes: list[dict[str, Any]] = []  # step, and what was changed from there on: {key: [before, since]}
        self._unlogged: dict[str, Any] | None = None  # `Logger.unlogged` of the checkpoint that the run goes on from
        self._watch = InterruptWatch()

    def _implementation(self, network: Any) -> str | None:
        """How the experts of a model with this config are computed here; None without experts."""
        if not isinstance(network, TransformerConfig):
            return None
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        return network.implementation(max(map(len, self.prefetcher.rows)), self.accelerator.device.type, dtype)

    # ------------------------------------------------------------------------------------------------ start and stop

    def train(self) -> None:
        """Train up to `config.steps`; returns at once if that was reached before.

        Raises:
            ValueError: the run folder cannot be written, is in use, holds another run, looks different to different
                processes, or its newest checkpoint is damaged; or a tracker cannot be started.
            TrainingError: the run failed in the middle.
            Interrupted: one of `interrupt.SIGNALS` came; the run has saved itself.
        """
        with locked(self.run):
            on_main(lambda: require_own_run(self.run))
            steps = on_all(self.open_run)
            if min(steps) != max(steps):
                found = f"is at step {max(steps)} for one process and at step {min(steps)} for another"
                raise ValueError(f"{self.run} {found}; put it on a disk that every node sees")
            if self.profile is not None:
                self.profile.require_fit(self.config.steps - self.step)
            on_main(self.keep_inputs)
            self._train()

    def open_run(self) -> int:
        """Go on from the newest checkpoint, if there is one; returns its step. `train` calls it."""
        newest = checkpoint.latest(self.run)
        if newest is not None:
            self._resume(checkpoint.open_checkpoint(newest))
        elif self.start is not None:
            classes, settings = self.facts.get("class_names"), self.start_settings
            self._begun = load_start(self.model, self.ema.module, self.start, classes, settings)
            if settings:
                note(f"{self.start.folder} was trained with {settings}")
            if keep_thresholds(self.model, self._kept_in(self.start), parse(self.config_yaml)):
                self._calibrate = False
        else:
            assert self.config.init_from is None, "`start` is what open_start returns"
        return self.step

    def _kept_in(self, saved: checkpoint.Checkpoint) -> Tree:
        """The config of a checkpoint, with every key of today."""
        return completed(saved.config(), self.config_class)

    def _resume(self, saved: checkpoint.Checkpoint) -> None:
        note_edited_config(saved, self.config_yaml)
        changes = require_same_run(
            self._kept_in(saved), parse(self.config_yaml), self.run, lambda: fits_start(self.model, saved)
        )
        checkpoint.load_into(self.model, saved.weights("model"), saved.folder)
        checkpoint.load_into(self.ema.module, saved.weights("ema"), saved.folder)
        load_optimizer_state(self.model, self.training_step.optimizer, saved.weights("optimizer"), saved.folder)
        self.step, self._calibrate = saved.step, False
        self._unlogged = saved.state.get("since_line")
        self._changes = saved.state.get("changes", [])
        self._begun = f"{self.run} goes on from step {self.step}"
        if changes:
            self._changes = [*self._changes, {"step": self.step, **changes}]
        steps = saved.config()["train"]["steps"]
        longer = {"train.steps": (steps, self.config.steps)} if steps != self.config.steps else {}
        if longer or changes:
            told = ", ".join(f"{key}={now} (was {was})" for key, (was, now) in (longer | changes).items())
            self._begun += f", from now on with {told}"
        other = {name: saved.state[name] for name, now in self._machine().items() if saved.state.get(name, now) != now}
        if other and self.accelerator.is_main_process:
            was, now = (", ".join(f"{k} {each[k]}" for k in other) for each in (other, self._machine()))
            tell(f"{self.run} was trained with {was} so far, here with {now}: it goes on, but not bit for bit")
        before = saved.state.get("precision", self.precision)
        if before != self.precision:
            note = f"{self.run} was trained in {before} so far, here train.mixed_precision=auto means {self.precision}"
            if self.accelerator.is_main_process:
                tell(note)

    def _machine(self) -> dict[str, Any]:
        """What a run may go on without, but not to the same bits."""
        found = {"torch": torch.__version__, "dit_moe": version("dit_moe"), "processes": self.accelerator.num_processes}
        return found | ({} if self.implementation is None else {"implementation": self.implementation})

    def _train(self) -> None:
        trackers = Trackers(self.accelerator, self.run, self.config)

        def start_trackers() -> None:
            on_main(lambda: trackers.start(flatten(parse(self.config_yaml)), self.step))

        if self.step < self.config.steps:  # before anything is written: one that cannot be started ends the command
            start_trackers()
        try:
            if self.accelerator.is_main_process and self.step < self.config.steps:
                write_atomically(self.run / "config.yaml", OF_A_RUN + self.config_yaml)
            since = self._unlogged, self._changes
            logger = Logger(trackers, self.config, self.run, self.step, self.unit, *since, self.curves)
            with logger, self._watch:
                missed = self._missed_hooks(logger)
                if missed and self.step >= self.config.steps:
                    start_trackers()
                self._call(missed, logger)
                if self.step < self.config.steps:
                    self._loop(logger)
                else:
                    logger.message(f"{self.run} is finished: {self.step} steps; raise train.steps to go on")
        except NotFinite as error:
            raise self._explained(error) from None
        except (OSError, ValueError) as error:
            raise TrainingError(f"{self.run} stopped after step {self.step}: {error}") from error
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            rows = max(map(len, self.prefetcher.rows))
            remedy = f"lower train.micro_batch (now {rows})" if rows > 1 else "set model.recompute=true"
            raise TrainingError(f"step {self.step + 1}: out of memory; {remedy}") from error
        finally:
            self.prefetcher.close()

    def _explained(self, error: NotFinite) -> TrainingError:
        """Which rows were in the batch, and whether they are the cause. All processes call it together."""
        not_finite = gather_object(self.prefetcher.not_finite(self.step))
        cause = (
            f"rows {shown(not_finite)} of the data set are not finite themselves; mend or remove them"
            if not_finite
            else f"{DATA_ARE_FINITE}, so {self._remedy()}"
        )
        batch = shown(self.prefetcher.batches.batch(self.step))
        return TrainingError(
            f"step {self.step + 1}: {error} before the update; the weights were not touched and nothing was "
            f"written. The batch is rows {batch} of the data set; {cause}"
        )

    def _remedy(self) -> str:
        """What to do about weights that have gone too far, and from which of them the run then goes on."""
        saved = [each for each in checkpoint.checkpoints(self.run) if checkpoint.step_of(each) < self.step]
        newest, first = (
            checkpoint.latest(self.run),
            "lower train.lr, lengthen train.warmup_steps or set train.grad_clip",
        )
        where = f"goes on from step {checkpoint.step_of(saved[-1])}" if saved else "starts anew"
        if newest is None or saved[-1:] == [newest]:
            nothing = "" if saved else ", as nothing was saved yet"
            return f"{first}: the same command with that {where}{nothing}"
        return f"{first}, and delete {newest}, which holds the weights that failed: the same command then {where}"

    # ------------------------------------------------------------------------------------------------------ the loop

    def _loop(self, logger: Logger) -> None:
        config = self.config
        this_one = f"training {self.run}: {config.steps:,} steps"
        if self.implementation is not None and self.model.config.moe.implementation == "auto":  # type: ignore[union-attr]
            this_one += f"; model.moe.implementation=auto means {self.implementation}"
        for line in [this_one, *remarks(), *notes(self.model), self._begun]:
            if line:
                logger.message(line)
        self.prefetcher.start(self.step, config.steps)
        on_all(self.prefetcher.check)
        if self._calibrate:
            self.training_step.calibrate(self.prefetcher.ready)
        if self.profile is not None:
            self.profile.start(self.model, self.accelerator.device)
            self.training_step.phase = self.profile.phase
        while self.step < config.steps:
            values, routers = self.training_step(
                self.step, self.prefetcher.ready, meanwhile=self._prefetch, report=logger.due(self.step + 1)
            )
            stop, failed = (values.pop(name) > 0 for name in ("stop", "failed"))
            self.step += 1
            with self.training_step.phase("logging"):
                logger.step(self.step, values, learning_rate(config, self.step - 1), routers)
            if self.profile is not None:
                self._end_profiled_step(self.profile, logger)
            with logger.untimed():
                if stop or self.step % config.checkpoint_every == 0 or self.step == config.steps:
                    with logger.recurring("checkpoint", config.checkpoint_every):
                        logger.sync()
                        self._save(logger)
                if stop and self.step < config.steps:
                    signum = self._watch.signum or signal.SIGTERM  # it may have reached another process only
                    raise Interrupted(signum, f"{self.run} is saved at step {self.step}; run the same command to go on")
                self._call(self._due_hooks(), logger)
            if failed:
                on_all(self.prefetcher.check)
        if (note := collapsed(self.model, routers)) is not None:
            logger.message(note)

    def _end_profiled_step(self, profile: StepProfile, logger: Logger) -> None:
        if (report := profile.end_step(self.run, write=self.accelerator.is_main_process)) is not None:
            self.profile, self.training_step.phase = None, untimed
            logger.message(f"{report}\n  {self.run / TRACE} is for chrome://tracing, or for ui.perfetto.dev")

    def _prefetch(self) -> dict[str, bool]:
        """Make the next batch ready; returns whether to stop after this step, and whether there is no next batch."""
        self.prefetcher.advance()
        return {"stop": self._watch.signum > 0, "failed": self.prefetcher.error is not None}

    def _require_finite(self) -> None:
        bad = [name for name, each in self.model.named_parameters() if not local(each).isfinite().all()]
        if bad:
            problem = f"step {self.step}: its update made weights that are not finite ({bad[0]}), so it is not saved"
            raise TrainingError(f"{problem}; {self._remedy()}")

    def _save(self, logger: Logger) -> None:
        on_all(self._require_finite)
        own: dict[checkpoint.Part, dict[str, Tensor]] = {
            "model": checkpoint.state_of(self.model),
            "ema": checkpoint.state_of(self.ema.module),
            "optimizer": optimizer_state(self.model, self.training_step.optimizer),
        }
        main = self.accelerator.is_main_process
        parts = {part: checkpoint.gathered(tensors, keep=main) for part, tensors in own.items()}
        # What was seen is the position in the endless data order, too.
        seen = self.step * self.config.batch_size * self.unit.per_row
        position = {"step": self.step, self.unit.name: seen, "seed": self.seed}
        state = {**self.facts, **position, "precision": self.precision, "since_line": logger.unlogged}
        state |= self._machine()
        state |= {"changes": self._changes} if self._changes else {}
        config_yaml, keep = self.config_yaml, self.config.keep_checkpoints
        # The others wait: one that ended now would have its launcher end the writing one.
        on_main(lambda: checkpoint.save(self.run, parts=parts, state=state, config_yaml=config_yaml, keep=keep))

    def _due_hooks(self) -> list[Hook]:
        return [hook for hook in self.hooks if self.step % hook.every == 0]

    def _missed_hooks(self, logger: Logger) -> list[Hook]:
        """Hooks whose numbers are missing because the run ended between its newest checkpoint and them."""
        due = [hook for hook in self._due_hooks() if hook.measures and self.step > 0]
        return [] if not due or any(on_all(lambda: logger.evaluated(self.step))) else due

    def _call(self, hooks: Sequence[Hook], logger: Logger) -> None:
        numbers: dict[str, Any] = {}
        if hooks:
            with torch.no_grad(), unsharded(self.ema.module):
                for hook in hooks:
                    with logger.recurring(f"hook {self.hooks.index(hook)}", hook.every):
                        numbers |= hook.call(self.step, self.ema.module) or {}
        logger.evaluation(self.step, numbers)
