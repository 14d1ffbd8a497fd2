"""Judge a language model on the tasks of lm-evaluation-harness: a run, or a folder in the format of transformers.

The model goes through the harness's `hf` interface, in this process. Its data sets come from the Hugging Face hub. The
table goes to stdout, everything to a JSON file: by default lm_eval.json in the run folder, or in the exported one.

    # needs the Hugging Face Hub
    dit-moe lm-eval runs/lm/LM-1.3B-64E8A-dtopp --config configs/lm/tasks.yaml
    dit-moe lm-eval exported/lm_tiny --tasks arc_easy,piqa --limit 100 --out arc.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import version
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dit_moe import config
from dit_moe.config import ConfigError, require
from dit_moe.distributed import join_processes
from dit_moe.experiments.run import open_text_run
from dit_moe.files import require_writable, sha256_of, write_atomically
from dit_moe.rounding import rounded

DEFAULT_CONFIG = Path("configs/lm/tasks.yaml")
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
    """A list of tasks to judge by."""

    tasks: tuple[TaskConfig, ...]
    include: str | None = None  # folder of further tasks, relative to the config file


@dataclass(frozen=True)
class Subject:
    """What is judged."""

    model: Any  # a transformers.PreTrainedModel
    tokenizer: Any  # a transformers.PreTrainedTokenizer
    mixed_precision: str | None
    folder: Path  # where the result goes
    facts: dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `run` reads."""
    parser.add_argument(
        "model", type=Path, metavar="RUN_OR_FOLDER", help="a run folder, or a folder with config.json and weights"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the section `sample` of a run")
    parser.add_argument(
        "--tasks", metavar="NAMES", help="these tasks of the harness, by comma; default all of --config"
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help=f"list of tasks and their options; default {DEFAULT_CONFIG}"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="judge by the first N questions of each task only")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="sequences at a time; default 16")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"the result; default {RESULT} in the model's folder")


def run(args: argparse.Namespace) -> None:
    """Judge, write and print. ValueError for bad input, before the work starts."""
    if find_spec("lm_eval") is None:
        raise ValueError("the package lm_eval is not installed; pip install 'dit_moe[lm]'")
    for option in ("limit", "batch_size"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise ValueError(f"--{option.replace('_', '-')} {value} must be at least 1")
    if join_processes().num_processes > 1:
        raise ValueError("dit-moe lm-eval works in one process; start it without a launcher")
    tasks, manager = choose_tasks(args.config, args.tasks.split(",") if args.tasks else None)
    subject = open_subject(args.model, args.overrides, join_processes().device)
    out = args.out or subject.folder / RESULT
    if out.suffix != ".json":
        raise ValueError(f"--out {out} should end in .json")
    require_writable(out.parent)
    report = judge(subject, tasks, manager, limit=args.limit, batch_size=args.batch_size)
    write_atomically(out, json.dumps(report, indent=1) + "\n")
    print_table(report)


def choose_tasks(path: Path | None = None, names: Sequence[str] | None = None) -> tuple[list[TaskConfig], Any]:
    """The tasks of a config file, or those named, by the file's options where it has them; and the harness's index.

    ValueError for a task that the harness does not know, or that is listed twice, be it within a group.
    """
    from lm_eval.tasks import TaskManager

    if path is None and names and not DEFAULT_CONFIG.is_file():  # outside the repository; nothing of it is needed
        listed, folder = TasksConfig(tasks=()), None
    else:
        path = path or DEFAULT_CONFIG
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
                raise ValueError(f"the task {member!r} is judged twice, in {both}; drop one of them")
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


def open_subject(path: Path, overrides: Sequence[str], device: torch.device) -> Subject:
    """The model and tokenizer of a run, or of a folder in the format of transformers. ValueError for anything else."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dit_moe.interop.transformers_lm import wrap  # which makes our models known to AutoModelForCausalLM, too

    if (path / "config.json").is_file():
        if overrides:
            raise ValueError(f"{overrides[0]}: {path} is no run, whose section `sample` could be changed; drop it")
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(path)
            tokenizer = AutoTokenizer.from_pretrained(path)
        except OSError as error:
            raise ValueError(f"{path} cannot be opened: {' '.join(str(error).split())[:300]}") from None
        digests = {file.name: sha256_of(file) for file in sorted(path.glob("*.safetensors"))}
        facts: dict[str, Any] = {"model": str(path), "weights_sha256": digests}
        return Subject(model.to(device), tokenizer, None, path, facts)
    run = open_text_run(path, overrides, device=device)
    sample = run.experiment.sample
    facts = {
        "model": str(run.folder),
        "step": run.step,
        "weights_sha256": {f"{sample.weights}.safetensors": run.sha256},
        "experiment": config.dump(run.experiment),
    }
    mixed = "bfloat16" if sample.precision == "bf16" else None
    return Subject(wrap(run.model, run.tokenizer), run.tokenizer.hf, mixed, run.folder.parent.parent, facts)


def harness_of(subject: Subject, batch_size: int = 16) -> Any:
    """The model behind the harness's interface; likelihoods in fp32, whatever its weights or products are in."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        pretrained=subject.model,
        tokenizer=subject.tokenizer,
        batch_size=batch_size,
        softmax_dtype=torch.float32,
        mixed_precision_dtype=subject.mixed_precision,
    )


def judge(
    subject: Subject, tasks: Sequence[TaskConfig], manager: Any, *, limit: int | None = None, batch_size: int = 16
) -> dict[str, Any]:
    """Run the tasks; returns what the JSON file holds. The mean is that of one number per task, if each has one."""
    from lm_eval import simple_evaluate

    harness = harness_of(subject, batch_size)
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
        **subject.facts,
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
        print(
            f"warning: task {task.name} reports no {task.metric}, but {', '.join(found) or 'nothing'}", file=sys.stderr
        )
        return [{**common, "metric": task.metric, "value": None, "stderr": None}]
    return [
        # The harness says "N/A" where it knows no error.
        {**common, "metric": metric, "value": value, "stderr": error if isinstance(error, float) else None}
        for metric, (value, error) in found.items()
        if task.metric in (None, metric)
    ]


def print_table(report: dict[str, Any]) -> None:
    """The tasks and their mean, to stdout."""
    table = Table("task", "metric", "shots")
    for column in ("value", "±"):
        table.add_column(column, justify="right")
    for row in report["tasks"]:
        value = "none" if row["value"] is None else rounded(row["value"], 4, 2)
        error = "" if row["stderr"] is None else rounded(row["stderr"], 4, 2)
        shots = "" if row["shots"] is None else str(row["shots"])
        table.add_row(row["task"], row["metric"], shots, value, error)
    if report["mean"] is not None:
        table.add_section()
        table.add_row("mean", "", "", rounded(report["mean"], 4, 2), "")
    Console().print(table)
