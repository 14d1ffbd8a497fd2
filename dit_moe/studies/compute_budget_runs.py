"""Runs measured at several compute budgets: what is measured, and what decides the numbers."""

from __future__ import annotations

import json
import statistics
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dit_moe import config
from dit_moe.config import ConfigError, Tree, section
from dit_moe.costs import forward_flops_at
from dit_moe.distributed import join_processes
from dit_moe.evaluation.comparison import Comparison
from dit_moe.evaluation.heldout_loss import HeldoutConfig, heldout_loss
from dit_moe.evaluation.own_extractor import extractor_of
from dit_moe.evaluation.runs import decisive, how_many, run_source, seeds_of, training_images
from dit_moe.evaluation.sources.base import EvaluationInput
from dit_moe.evaluation.text import heldout_text, perplexity
from dit_moe.experiments.image import Experiment, check_compute_budget
from dit_moe.experiments.run import ImageRun, TextRun, open_image_run, open_text_run, sampling_changes
from dit_moe.extractors.choice import chosen_extractor
from dit_moe.metrics.frechet import FrechetDistanceConfig
from dit_moe.moe import MoEConfig
from dit_moe.moe.compute_budget import ComputeBudget
from dit_moe.moe.routers.topp import TopPConfig
from dit_moe.progress import images_bar, work_bar
from dit_moe.sampling.generator import Generator, SampleConfig
from dit_moe.tasks import task_of

POINTS, LOWEST, HIGHEST = 7, 0.5, 2.0  # of the default targets, in those of training
NOT_SHARED = ("count", "target")  # of the section `sample`: of the distance alone, and what is changed
Measure = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """What is measured of models of images; None: the run's own, or the default. ValueError for what cannot be."""

    seeds: int | None = None  # of sampling
    metric: bool = True
    images: int | None = None  # held-out ones
    draws: int | None = None
    extractor: str | None = None  # in place of that of the run's config; a function is only run if it is named

    def __post_init__(self) -> None:
        for name, value in self.given.items():
            if value < 1:
                raise ValueError(f"--{name} {value} must be at least 1")
        if not self.metric and self.seeds is not None:
            raise ValueError("--seeds is for samples, which --no-metric leaves out; drop one")

    @property
    def given(self) -> dict[str, int]:
        """Those that are not None, by the name of the command's option."""
        values = {"seeds": self.seeds, "images": self.images, "draws": self.draws}
        return {name: value for name, value in values.items() if value is not None}


class RunAtBudgets:
    """A run to be measured at several targets, the mean numbers of active experts that its routers are set to.

    Args:
        name: what messages and results call it.
        model, sample: sections of its config.
        asked: targets; None: the default ones.
    """

    kind: str
    identities: dict[str, Tree]
    """What decides the numbers of each measure, beside the target."""

    def __init__(self, name: str, model: Any, sample: Any, asked: Sequence[float] | None) -> None:
        self.name, self.asked = name, asked
        with section(name):
            if model.moe is None:
                raise ConfigError("model", " is dense; its compute cannot be changed")
            if model.moe.router.ADJUSTABLE is None:
                raise ConfigError("model.moe.router", " has neither threshold nor k, so that nothing can be changed")
            self.moe: MoEConfig = model.moe
            for target in asked or ():
                check_compute_budget(replace(sample, target=target, p=None, vary="layer"), model)

    def targets(self, trained: float) -> list[float]:
        """To be measured once `trained`, the mean of the run as it was trained, is known."""
        # Nothing holds a fixed threshold to the target that its experts were made for.
        middle = round(trained, 4) if isinstance(self.moe.router, TopPConfig) else self.moe.target
        targets = default_targets(self.moe, middle) if self.asked is None else self.asked
        if self.moe.router.ADJUSTABLE == "k":  # the trained k gives what the run gives as it was trained, bit by bit
            targets = [target for target in targets if target != self.moe.target]
        return list(targets)

    def entry(self, measure: str) -> Tree:
        """What dial.json says of one of its measures, without points."""
        return {
            "kind": self.kind,
            "name": self.name,
            "trained_target": self.moe.target,
            "router": self.identities[measure]["model"]["moe"]["router"]["name"],
            "measure": measure,
            "identity": json.loads(json.dumps(self.identities[measure])),  # as it comes back from a file
        }

    def measure(self, target: float | None, names: Collection[str]) -> dict[str, Measure]:
        """Some of its measures at a target, or as trained; JSON-ready."""
        raise NotImplementedError


def default_targets(moe: MoEConfig, middle: float) -> list[float]:
    """From half to twice `middle`, what the routers use as trained, as far as they allow it."""
    lowest = max(LOWEST * middle, moe.router.min_experts)
    highest = min(HIGHEST * middle, moe.router.max_experts or moe.experts)
    if moe.router.ADJUSTABLE == "k":
        return [float(k) for k in range(int(-(-lowest // 1)), int(highest) + 1)]
    steps = [round(lowest * (highest / lowest) ** (i / (POINTS - 1)), 4) for i in range(POINTS)]
    return sorted({*(step for step in steps if abs(step - middle) > 1e-3), middle})


def _where() -> Tree:
    versions = {name: version(name) for name in ("dit_moe", "torch")}
    return {"device": join_processes().device.type, "versions": versions}


class ImageRunAtBudgets(RunAtBudgets):
    """A run of images: held-out loss, and the Fréchet distance of its samples."""

    kind = "images"

    def __init__(self, folder: Path, changes: Sequence[str], asked: list[float] | None, options: ImageOptions) -> None:
        overrides = sampling_changes([*changes, "target=null", "p=null", "vary=layer"])
        self.run: ImageRun = open_image_run(folder, overrides, device=join_processes().device)
        experiment = self.run.experiment
        super().__init__(folder.resolve().name, experiment.model, experiment.sample, asked)
        self.heldout = HeldoutConfig(**{name: n for name, n in options.given.items() if name != "seeds"})
        self.dataset, self.split = task_of(experiment).open_split(self.run, None)
        shared = decisive(experiment)
        shared["sample"] = {name: value for name, value in shared["sample"].items() if name not in NOT_SHARED}
        shared |= {"weights_sha256": self.run.sha256, "step": self.run.step, "data": config.dump(experiment.data)}
        shown = {"split": self.split, "fingerprint": self.dataset.fingerprint, "heldout": config.dump(self.heldout)}
        self.identities = {"loss": shared | shown}
        if options.metric:
            self.seeds = options.seeds or experiment.eval.seeds
            reference = _reference(experiment)
            counted = any(change.startswith("count=") for change in overrides)
            self.count = experiment.sample.count if counted else how_many(experiment, reference)
            chosen = chosen_extractor(options.extractor, experiment.eval.extractor)
            judged = replace(experiment, eval=replace(experiment.eval, extractor=chosen))
            extractor = extractor_of(judged, self.run.home)
            self.comparison = Comparison(reference, extractor, [FrechetDistanceConfig()], progress=images_bar)
            self.comparison.check(self._samples(experiment.sample))
            compared = {"extractor": extractor.identity(), "reference": _identity(reference)}
            self.identities["distance"] = shared | compared | {"seeds": self.seeds, "images": self.count}

    def measure(self, target: float | None, names: Collection[str]) -> dict[str, Measure]:
        sample = replace(self.run.experiment.sample, target=target)
        generator = self.run.generator(sample)
        made = {"loss": lambda: self._loss(generator), "distance": lambda: self._distance(generator, sample)}
        shared = {"target": target, "thresholds": generator.thresholds} | _where()
        return {name: shared | made[name]() for name in names}

    def _loss(self, generator: Generator) -> Measure:
        run, heldout = self.run, self.heldout
        images = min(len(self.dataset), heldout.images or len(self.dataset))
        batches = -(-images // heldout.batch_size) * heldout.draws
        budget = nullcontext() if generator.budget is None else generator.budget.at()
        with budget, work_bar("held-out loss", batches, "batches") as advance:
            found = heldout_loss(run.model, run.objective, run.stage, self.dataset, heldout, lambda: advance(1))
        assert found.active is not None
        return {
            "value": found.loss,
            "active": found.active,
            "layers": [layer.mean for layer in found.layers],
            "flops": forward_flops_at(run.experiment.model, found.active),
        }

    def _samples(self, sample: SampleConfig, budget: ComputeBudget | None = None) -> list[EvaluationInput]:
        """Of all sampling seeds; the budget that `sample` asks for is solved once, and not for each seed."""
        settings = seeds_of(sample, self.count, self.seeds)
        return [EvaluationInput(source=run_source(self.run, each, budget)) for each in settings]

    def _distance(self, generator: Generator, sample: SampleConfig) -> Measure:
        report = self.comparison.evaluate(self._samples(sample, generator.budget))
        assert report is not None
        active = statistics.fmean(one["active_experts"] for one in report.provenance.samples)
        distance = next(iter(report.distances.values()))
        return {
            "value": distance.generated,
            "std": distance.generated_std,
            "floor": distance.floor,
            "active": active,
            "flops": forward_flops_at(self.run.experiment.model, active) * generator.evaluations(),
        }


def _reference(experiment: Experiment) -> EvaluationInput:
    try:
        return training_images(experiment)
    except ValueError as error:
        raise ValueError(f"{error}; or measure the held-out loss alone, with --no-metric") from None


def _identity(reference: EvaluationInput) -> Tree:
    """What samples are compared with."""
    sides = {"images": reference.source, "heldout": reference.heldout}
    found: Tree = {name: source.identity() for name, source in sides.items() if source is not None}
    if reference.statistics is not None:
        found["statistics"] = reference.statistics.sha256
    return found | ({} if reference.features is None else {"features": str(reference.features)})


class TextRunAtBudgets(RunAtBudgets):
    """A language model's run: bits per byte."""

    kind = "text"

    def __init__(self, folder: Path, changes: Sequence[str], asked: list[float] | None) -> None:
        self.folder, self.changes = folder, list(changes)
        opened = self._open(None)
        experiment, text = opened.experiment, heldout_text(opened)
        super().__init__(folder.resolve().name, experiment.model, experiment.sample, asked)
        tree = config.dump(experiment)
        identity = {
            "weights_sha256": opened.sha256,
            "step": opened.step,
            "model": tree["model"],
            "sample": {name: tree["sample"][name] for name in ("weights", "precision")},
            "eval": {name: tree["eval"][name] for name in ("stride", "max_documents")},
            "length": tree["data"]["length"],
            "heldout": text.identity["fingerprint"],
        }
        self.identities = {"bits": identity}

    def _open(self, target: float | None) -> TextRun:
        shown = "null" if target is None else repr(target)
        changes = [*self.changes, f"target={shown}", "p=null", "vary=layer"]
        return open_text_run(self.folder, changes, scoring=True, device=join_processes().device)

    def measure(self, target: float | None, names: Collection[str]) -> dict[str, Measure]:
        opened = self._open(target)
        report, network = perplexity(opened, heldout_text(opened)), opened.experiment.model
        bits = {
            "target": target,
            "thresholds": report["thresholds"],
            "value": report["bits_per_byte"],
            "std_error": report["bits_per_byte_std_error"],
            "active": report["active_experts"],
            "layers": report["active_experts_by_layer"],
            "flops": forward_flops_at(network, report["active_experts"]) / network.tokens,
        }
        return {"bits": bits | _where()}
