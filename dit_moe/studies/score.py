"""What a trained run of a study is scored by: the held-out loss, experts and FLOPs, a metric, and the time per step."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import torch

from dit_moe import config
from dit_moe.config import ConfigError, Tree, Within, convert
from dit_moe.evaluation.compute import number_names
from dit_moe.evaluation.runs import comparison_of, how_many, reconstructed, run_source, seeds_of, training_images
from dit_moe.evaluation.sources.base import EvaluationInput
from dit_moe.experiments.image import EvalConfig
from dit_moe.extractors import EXTRACTORS, FeatureExtractor
from dit_moe.files import write_atomically
from dit_moe.formatting import tell
from dit_moe.json_files import Count, NonNegative, Size, read_if_good
from dit_moe.metrics import configs_of
from dit_moe.studies.plan import PlannedRun, reference_of
from dit_moe.studies.study import Study
from dit_moe.tasks import AnyExperiment, task_of
from dit_moe.tasks.train import build_trainer, prepare
from dit_moe.training.devices import build_accelerator

SCORE = "score.json"  # in the run folder
PACKAGES = ("dit_moe", "torch", "torchvision", "diffusers", "timm", "numpy")
TEXT_METRICS = {"bits_per_byte": "bits per byte", "perplexity": "perplexity"}  # what `dit-moe perplexity` reports
LABELS = {  # how people call numbers of a report
    "fd_digits_cnn64.ratio": "Fréchet distance ÷ held-out digits'",
    "fd_digits_cnn64.generated": "Fréchet distance, digits CNN",
    "fid.generated": "FID",
}


def _is_text(experiment: AnyExperiment) -> bool:
    return task_of(experiment).kind == "text"


# ---------------------------------------------------------------------------------------------- before the training


def check_config(study: Study, experiment: AnyExperiment) -> None:
    """ConfigError for what a config alone tells cannot be scored: its data may yet have to be made."""
    if experiment.sample.requested is not None:
        field, value = experiment.sample.requested
        remedy = "a study compares runs as they were trained; drop it, or see dit-moe dial"
        raise ConfigError(f"sample.{field}", f"={value}: {remedy}")
    if _is_text(experiment):
        if study.metric not in (None, *TEXT_METRICS):
            raise ConfigError("metric", f"={study.metric} is none of a language model's: {', '.join(TEXT_METRICS)}")
        if experiment.data.heldout is None:
            raise ConfigError("data.heldout", " is missing; name a folder for the tokens of held-out text")
    elif study.metric is not None:
        assert isinstance(experiment.eval, EvalConfig)
        if experiment.eval.extractor is None:
            problem = f" is missing, and metric={study.metric} compares runs in one feature space"
            raise ConfigError("eval.extractor", f"{problem}; name one, or set metric=null for the held-out loss alone")
        _require_number(study.metric, experiment.eval, heldout=True, decoded=True)


def check_scoring(study: Study, run: PlannedRun) -> None:
    """ValueError, before the training, for what could not be scored after it."""
    experiment: Any = run.experiment
    check_config(study, experiment)
    try:
        task_of(experiment).require_heldout(experiment)
    except ValueError as error:
        raise ValueError(f"variant {run.variant.name} cannot be scored on held-out data: {error}") from None
    if study.metric is not None and not _is_text(experiment):
        reference = training_images(experiment)
        how_many(experiment, reference)
        comparison_of(experiment, reference, run.folder).check()
        decoded = reconstructed(experiment, reference) is not None
        _require_number(study.metric, experiment.eval, heldout=reference.heldout is not None, decoded=decoded)


def _require_number(name: str, settings: EvalConfig, *, heldout: bool, decoded: bool) -> None:
    """ConfigError unless the evaluation by `settings` will report a number of that name."""
    extractor: FeatureExtractor = EXTRACTORS.build(settings.extractor)
    metrics = configs_of(extractor.metrics) if settings.metrics is None else settings.metrics
    known = number_names(extractor, metrics, heldout=heldout, reconstructed=decoded, seeds=settings.seeds)
    if known is not None and name not in known:
        raise ConfigError("metric", f"={name} is no number of the evaluation's report; it has {', '.join(known)}")


# ----------------------------------------------------------------------------------------------- after the training


def score_loss(study: Study, run: PlannedRun) -> dict[str, Any]:
    """Of a trained run: held-out loss, experts, FLOPs, and what measured them; its metric is yet to come."""
    task = task_of(run.experiment)
    opened = task.open_run(run.folder, experiment=run.experiment)
    found = task.heldout_loss(opened, study.heldout)
    return {
        "identity": loss_identity(study, run),
        "made": provenance(run.precision()),
        "step": opened.step,
        "loss": found.loss,
        "terms": found.terms,
        "active": found.active,
        "active_layers": found.active_by_layer,
        "flops": found.flops,
        "metric": None,
    }


def score_metric(study: Study, run: PlannedRun, score: dict[str, Any]) -> dict[str, Any]:
    """`score` with the study's metric. Complete on the main process."""
    name = study.metric
    assert name is not None
    if _is_text(run.experiment):
        found = {"label": TEXT_METRICS[name], "better": "lower", "value": score["terms"][name]}
    else:
        found = _metric_of_images(name, run)
    return score | {"metric": {"identity": metric_identity(study, run), "name": name} | found}


def _metric_of_images(name: str, run: PlannedRun) -> dict[str, Any]:
    experiment: Any = run.experiment
    opened: Any = task_of(experiment).open_run(run.folder, experiment=experiment)
    reference = training_images(experiment)
    settings = seeds_of(experiment.sample, how_many(experiment, reference), experiment.eval.seeds)
    samples = [EvaluationInput(source=run_source(opened, each)) for each in settings]
    report = comparison_of(experiment, reference, run.folder).evaluate(samples)
    if report is None:
        return {}  # not the main process
    numbers = report.flat()
    if name not in numbers:
        raise ConfigError("metric", f"={name} is no number of the evaluation's report; it has {', '.join(numbers)}")
    better = report.provenance.better.get(name.partition(".")[0])
    return {"label": LABELS.get(name, name), "better": better, "value": numbers[name]}


# ------------------------------------------------------------------------------------------------------- kept in files


def loss_identity(study: Study, run: PlannedRun) -> dict[str, Any]:
    """What a run's held-out loss, experts and FLOPs depend on: they are measured anew when any of this changes."""
    tree = config.dump(run.experiment)
    if _is_text(run.experiment):
        how = {name: tree["eval"][name] for name in ("stride", "batch_size", "max_documents")}
        how["precision"] = tree["sample"]["precision"]
    else:
        how = config.dump(study.heldout)
    return {
        "weights_sha256": run.weights_sha256(),
        "heldout": how | {"data": run.heldout or tree["data"].get("heldout")},
        "dit_moe": version("dit_moe"),
    }


def metric_identity(study: Study, run: PlannedRun) -> dict[str, Any]:
    """What the metric depends on beside that."""
    tree = config.dump(run.experiment)
    text = _is_text(run.experiment)  # whose metrics come with the loss
    identity = {"metric": study.metric} | ({} if text else {"eval": tree["eval"], "sample": tree["sample"]})
    return identity if reference_of(study, run.experiment) is None else identity | {"reference": run.reference}


class _Machine(TypedDict):
    cpu: str
    cores: Size | None
    gpu: str | None


class _Made(TypedDict):
    """What `provenance` gives."""

    machine: _Machine
    versions: dict[str, str]
    threads: Size
    precision: str


class _Metric(TypedDict):
    identity: Tree
    name: str
    label: str
    better: Literal["lower", "higher"] | None
    value: float


class _DistanceNotNegative:
    """For the `_Metric` of a score: a part of a distance, as "fid.ratio" is, cannot be below 0."""

    def require(self, metric: Any, path: str) -> None:
        """ConfigError if it is."""
        if "." in metric["name"]:
            convert(NonNegative, metric["value"], f"{path}.value")


class _Score(TypedDict):
    """What score.json holds."""

    identity: Tree
    made: _Made
    step: Count
    loss: float
    terms: dict[str, float]
    active: NonNegative | None
    active_layers: list[NonNegative] | None
    flops: Annotated[float, Within(1, 1e30)]
    metric: Annotated[_Metric, _DistanceNotNegative()] | None
    memory: NotRequired[Count | None]


class _Timing(TypedDict):
    """What timing.json holds."""

    runs: Tree
    steps: Size
    made: _Made
    seconds_per_step: dict[str, NonNegative]


def read_loss(study: Study, run: PlannedRun) -> dict[str, Any] | None:
    """What score.json holds of a run that is trained to its end, if its loss is of this study; its metric may not be.

    None if there is no such thing.
    """
    score: Any = read_if_good(run.folder / SCORE, _Score)
    return score if score and run.is_trained() and score["identity"] == loss_identity(study, run) else None


def read_score(study: Study, run: PlannedRun) -> dict[str, Any] | None:
    """The score of a finished run; None if it is not trained to its end, or not scored, or in another way."""
    score = read_loss(study, run)
    if score is None or study.metric is None:
        return None if score is None else score | {"metric": None}
    metric, wanted = score["metric"], metric_identity(study, run)
    if metric is not None and "reference" in wanted and run.reference is None:  # a report needs no images
        wanted["reference"] = metric["identity"].get("reference")
    return score if metric is not None and metric["identity"] == wanted else None


def provenance(precision: str) -> dict[str, Any]:
    """Of this process: {"machine": {"cpu", "cores", "gpu"}, "versions", "threads", "precision"}, the last as given."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "gpu": gpu},
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "threads": torch.get_num_threads(),
        "precision": precision,
    }


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return platform.processor() or platform.machine()
    named = re.search(r"^model name.*?:(.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return named[1].strip() if named else platform.machine()


# -------------------------------------------------------------------------------------------------- the time per step

TIMING = "timing.json"
ROUNDS = 3  # through all variants: what slows the machine for a while slows all alike
WARM_UP = 2  # steps


def read_timing(out: Path, runs: Sequence[PlannedRun], steps: int) -> dict[str, Any] | None:
    """What `time_variants` wrote, wherever that was, if it is of these runs."""
    found: Any = read_if_good(out / TIMING, _Timing)
    return found if found and _timing_identity(runs, steps).items() <= found.items() else None


def was_measured_here(timing: dict[str, Any], runs: Sequence[PlannedRun]) -> bool:
    """Whether this process, with this software and so many threads, made it."""
    return bool(timing["made"] == _made(runs))


def time_variants(out: Path, runs: Sequence[PlannedRun], steps: int) -> dict[str, Any]:
    """{"runs", "steps", "made", "seconds_per_step": by the variant's name}, kept in timing.json."""
    tell(f"timing {len(runs)} variants")
    seconds = seconds_per_step(runs, steps)
    timing = _timing_identity(runs, steps) | {"made": _made(runs), "seconds_per_step": seconds}
    write_atomically(out / TIMING, json.dumps(timing, indent=1) + "\n")
    return timing


def _timing_identity(runs: Sequence[PlannedRun], steps: int) -> dict[str, Any]:
    timed = {
        run.name: {
            "weights_sha256": run.weights_sha256(),
            "micro_batch": run.experiment.train.micro_batch,
            "deterministic": run.experiment.train.deterministic,
        }
        for run in runs
    }
    return {"runs": timed, "steps": steps}


def _made(runs: Sequence[PlannedRun]) -> dict[str, Any]:
    precisions = {build_accelerator(run.experiment.train, run.folder).mixed_precision for run in runs}
    return provenance(", ".join(sorted(each.replace("no", "fp32") for each in precisions)))


def seconds_per_step(runs: Sequence[PlannedRun], steps: int) -> dict[str, float]:
    """Seconds that a `TrainingStep` takes by the variant's name, the median of `ROUNDS` times `steps`.

    Reading and encoding are not in it. One of `runs` for each variant, trained: routers are then as they become.
    """
    seconds: dict[str, list[float]] = {run.variant.name: [] for run in runs}
    for _ in range(ROUNDS):
        for run in runs:
            seconds[run.variant.name] += _time(run, steps)
    return {name: statistics.median(found) for name, found in seconds.items()}


def _time(run: PlannedRun, steps: int) -> list[float]:
    experiment, dataset = prepare(run.experiment)
    trainer = build_trainer(experiment, dataset, run.folder)
    trainer.open_run()
    seconds = []
    try:
        trainer.prefetcher.start(trainer.step, trainer.step + 1)
        trainer.prefetcher.check()
        for i in range(WARM_UP + steps):
            start = time.perf_counter()
            trainer.training_step(trainer.step + i, trainer.prefetcher.ready)  # always the same batch
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i >= WARM_UP:
                seconds.append(time.perf_counter() - start)
    finally:
        trainer.prefetcher.close()
    return seconds
