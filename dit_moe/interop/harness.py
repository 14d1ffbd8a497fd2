"""lm-evaluation-harness on our models: a run, or a folder in the format of transformers, on the harness's tasks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from dit_moe import built_in, config
from dit_moe.config import ConfigError, require
from dit_moe.distributed import join_processes
from dit_moe.experiments.run import open_text_run
from dit_moe.files import require_writable, sha256_of, write_atomically
from dit_moe.formatting import one_line, tell

DEFAULT_CONFIG = "lm/tasks"  # built-in
RESULT = "lm_eval.json"


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """One task, or group of tasks, of the harness."""

    name: str
    metric: str | None = None  # the number to report, "acc" or with a filter "exact_match,number"; None: all of them
    shots: int | None = None  # examples before each question; None: what the task says

    def __post_init__(self) -> None:
        require(self.shots is None or self.shots >= 0, self, "shots", "must be at least 0")


@dataclass(frozen=True, kw_only=True)
class TasksConfig:
    """A list of tasks."""

    tasks: tuple[TaskConfig, ...]
    include: str | None = None  # folder of further tasks, relative to the config file


@dataclass(frozen=True)
class HarnessModel:
    """A model that the harness can evaluate."""

    model: Any  # a transformers.PreTrainedModel
    tokenizer: Any  # a transformers.PreTrainedTokenizer
    mixed_precision: str | None
    folder: Path  # where the result goes
    facts: dict[str, Any]


def run_tasks(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    tasks: Sequence[str] = (),
    config_file: Path | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    out: Path | None = None,
) -> dict[str, Any]:
    """Evaluate a model on tasks of the harness, in this process, and write the report as JSON.

    Args:
        path: a run, one of its checkpoints, or a folder in the format of transformers.
        overrides: ``key=value`` changes to the section `sample` of a run.
        tasks, config_file: as `choose_tasks` takes them.
        limit: use the first so many questions of each task.
        batch_size: sequences at a time.
        out: where the report goes; None: lm_eval.json in the run folder, or in the folder.

    Raises ValueError for bad input, before the work starts; ModuleNotFoundError if lm_eval is not installed.
    """
    if join_processes().num_processes > 1:
        raise ValueError("dit-moe lm-eval works in one process; start it without a launcher")
    chosen, manager = choose_tasks(config_file, tasks)
    model = open_model(path, overrides, join_processes().device)
    place = out or model.folder / RESULT
    if place.suffix != ".json":
        raise ValueError(f"--out {place} should end in .json")
    require_writable(place.parent)
    report = evaluate(model, chosen, manager, limit=limit, batch_size=batch_size)
    write_atomically(place, json.dumps(report, indent=1) + "\n")
    return report


def choose_tasks(path: Path | None = None, names: Sequence[str] = ()) -> tuple[list[TaskConfig], Any]:
    """The tasks of a config file, or those `names` with the options that the file has for them; the harness's index.

    ValueError for a task that the harness does not know, or that is listed twice, also within a group.
    """
    from lm_eval.tasks import TaskManager

    path = built_in.find(path or DEFAULT_CONFIG, kind="list of tasks")
    listed = config.build(TasksConfig, config.load(path))
    folder = None if listed.include is None else path.parent / listed.include
    if folder is not None and not folder.is_dir():
        raise ConfigError("include", f"={listed.include}: there is no folder {folder}; name one relative to {path}")
    by_name = {task.name: task for task in listed.tasks}
    tasks = [by_name.get(name) or TaskConfig(name=name) for name in names or [task.name for task in listed.tasks]]
    manager = TaskManager(include_path=None if folder is None else str(folder))
    for task in tasks:
        if task.name not in manager.task_index:
            near = get_close_matches(task.name, manager.task_index, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "`lm_eval ls tasks` lists them"
            raise ValueError(f"lm-evaluation-harness {version('lm_eval')} has no task {task.name!r}; {hint}")
    found_in: dict[str, str] = {}  # the harness has one result for each, whichever was the last
    for task in tasks:
        for member in sorted(_members(task.name, manager.task_index)):
            if member in found_in:
                both = f"{found_in[member]!r} and {task.name!r}"
                raise ValueError(f"the task {member!r} is listed twice, in {both}; drop one of them")
            found_in[member] = task.name
    return tasks, manager


def _members(part: Any, index: dict[str, Any]) -> set[str]:
    """The single tasks of the harness behind a name, or behind an entry in the list of a group."""
    inline = part if isinstance(part, dict) else {}
    name: Any = inline.get("group", inline.get("task")) if inline else part
    entry = index.get(name)
    if entry is None:  # a group defines it on the spot
        parts = inline["task"] if "group" in inline else ()
    elif entry.kind.name in ("TASK", "PY_TASK"):
        return {name}
    else:
        parts = entry.tags if entry.kind.name == "TAG" else entry.cfg["task"]
    return {member for each in parts for member in _members(each, index)}


def open_model(path: Path, overrides: Sequence[str], device: torch.device) -> HarnessModel:
    """The model and tokenizer of a run, or of a folder in the format of transformers. ValueError for anything else."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dit_moe.interop.transformers_lm import wrap  # which makes our models known to AutoModelForCausalLM, too

    if (path / "config.json").is_file():
        if overrides:
            raise ValueError(f"{overrides[0]}: {path} is not a run with a section `sample` to change; drop it")
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False)
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        except Exception as error:  # of many kinds, from JSON to safetensors
            raise ValueError(f"{path} cannot be opened: {one_line(str(error), 300)}; mend the folder") from None
        digests = {file.name: sha256_of(file) for file in sorted(path.glob("*.safetensors"))}
        facts: dict[str, Any] = {"model": str(path), "weights_sha256": digests}
        return HarnessModel(model.to(device), tokenizer, None, path, facts)
    run = open_text_run(path, overrides, device=device)
    sample = run.experiment.sample
    facts = {
        "model": str(run.folder),
        "step": run.step,
        "weights_sha256": {f"{sample.weights}.safetensors": run.sha256},
        "experiment": config.dump(run.experiment),
    }
    mixed = "bfloat16" if sample.precision == "bf16" else None
    return HarnessModel(wrap(run.model, run.tokenizer), run.tokenizer.hf, mixed, run.home, facts)


def harness_of(opened: HarnessModel, batch_size: int = 16) -> Any:
    """The model behind the harness's interface; likelihoods in fp32, whatever its weights or products are in."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        pretrained=opened.model,
        tokenizer=opened.tokenizer,
        batch_size=batch_size,
        softmax_dtype=torch.float32,
        mixed_precision_dtype=opened.mixed_precision,
    )


def evaluate(
    opened: HarnessModel, tasks: Sequence[TaskConfig], manager: Any, *, limit: int | None = None, batch_size: int = 16
) -> dict[str, Any]:
    """Run the tasks; returns what the JSON file holds. The mean is that of one number per task, if each has one."""
    from lm_eval import simple_evaluate

    harness = harness_of(opened, batch_size)
    raw: dict[str, dict[str, Any]] = {key: {} for key in ("results", "n-shot", "n-samples", "versions")}
    in_order = sorted(tasks, key=lambda task: (task.shots is not None, task.shots or 0))
    for shots, group in groupby(in_order, key=lambda task: task.shots):  # the harness takes one number for all
        names: list[Any] = [task.name for task in group]
        made: Any = simple_evaluate(
            model=harness, tasks=names, num_fewshot=shots, limit=limit, task_manager=manager, log_samples=False
        )
        for key, collected in raw.items():
            collected.update(made.get(key, {}))
    rows = [row for task in tasks for row in _rows(task, raw["results"].get(task.name, {}), raw["n-shot"])]
    chosen = [row["value"] for row in rows if row["value"] is not None]
    return {
        **opened.facts,
        "tasks": rows,
        "mean": sum(chosen) / len(tasks) if len(chosen) == len(tasks) and all(task.metric for task in tasks) else None,
        "limit": limit,
        "harness": json.loads(json.dumps(raw, default=str)),
        "versions": {name: version(name) for name in ("dit_moe", "torch", "transformers", "lm_eval", "datasets")},
    }


def _rows(task: TaskConfig, result: dict[str, Any], shots: dict[str, int]) -> list[dict[str, Any]]:
    """What to report of a task: its metric, or all of them. The harness calls them "<metric>,<filter>"."""
    found = {
        key.removesuffix(",none"): (value, result.get("_stderr,".join(key.split(",", 1))))
        for key, value in result.items()
        if "," in key and "_stderr," not in key
    }
    common = {"task": task.name, "shots": shots.get(task.name, task.shots)}
    if task.metric is not None and task.metric not in found:  # known only now, and hours of work are not thrown away
        tell(f"warning: task {task.name} reports no {task.metric}, but {', '.join(found) or 'nothing'}")
        found[task.metric] = (None, None)
    return [
        # The harness says "N/A" where it knows no error.
        {**common, "metric": metric, "value": value, "stderr": error if isinstance(error, float) else None}
        for metric, (value, error) in found.items()
        if task.metric in (None, metric)
    ]
