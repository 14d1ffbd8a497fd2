"""Compare routers: train the variants of a study with several seeds, score them alike, and put them side by side.

STUDY is a file, or the name of a built-in study (configs/studies/). Runs go into runs/compare-<its name>/, one folder
each, several side by side where the machine has the cores or the GPUs. Running the same command again goes on where it
stopped, and a study whose config was changed is not mixed with runs that were made before. `key=value` changes the
study (seeds=[0]) or all of its variants (train.steps=50).

    dit-moe compare digits
    dit-moe compare configs/studies/digits.yaml seeds=[0] train.steps=50 --out runs/try
    dit-moe compare digits --report               # tables and pictures of what is there by now; starts nothing
    # needs ImageNet and Inception's weights
    dit-moe compare imagenet256-s --list          # the commands of all runs, for a cluster; then once without --list
    dit-moe compare imagenet256-s --only topk/0   # one of them; may be started by torchrun
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dit_moe import config
from dit_moe.config import ConfigError
from dit_moe.distributed import locked, use_cpu
from dit_moe.files import read_object, require_own, require_writable, write_atomically
from dit_moe.locks import exclusive
from dit_moe.studies.draw import PICTURES, save_pictures
from dit_moe.studies.experiments import experiments_of, of_variant, plan, prepare_data, resolve
from dit_moe.studies.jobs import Job, Share, end_with_parent, run_jobs, share_machine
from dit_moe.studies.plan import PlannedRun, read_score, require_unmixed
from dit_moe.studies.progress import StudyProgress
from dit_moe.studies.results import gather
from dit_moe.studies.run import run_one
from dit_moe.studies.score import check_config, check_scoring
from dit_moe.studies.study import Study, find_study, load_study
from dit_moe.studies.table import to_csv, to_markdown
from dit_moe.studies.timing import is_of_here, read_timing, time_variants
from dit_moe.tasks.train import resolve_for_dry_run
from dit_moe.training import TrainingError
from dit_moe.training.run_folder import is_begun

STUDY, RESULTS = "study.yaml", "results.json"
WRITTEN = (STUDY, "table.md", "table.csv", RESULTS, *(f"{name}.png" for name in PICTURES))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `run` reads."""
    parser.add_argument("study", metavar="STUDY", help="a YAML file, or the name of a built-in study: digits")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the study, or to all variants")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default runs/compare-<name of the study>")
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="runs at a time; default one for each GPU, or for each core"
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--list", action="store_true", help="print the command of each run that is missing, and stop")
    instead.add_argument("--only", metavar="VARIANT/SEED", help="do this one run, and nothing else")
    instead.add_argument(
        "--report",
        action="store_true",
        help="write table and pictures of the runs that are there, also while others run",
    )


def run(args: argparse.Namespace) -> None:
    """Do what is missing and write results.json, table.md, table.csv and the pictures. ValueError for bad input."""
    end_with_parent()
    path = find_study(args.study)
    study = load_study(path, args.overrides)
    out = args.out or Path("runs", f"compare-{path.stem}")
    if args.jobs is not None and args.jobs < 1:
        raise ConfigError("--jobs", f"={args.jobs} must be at least 1")
    if args.only is not None:
        planned = plan(study, path.parent, out, only=args.only)
        require_unmixed(planned)
        run_one(study, planned[0])
        return
    if args.report and not out.is_dir():
        raise ConfigError("--report", f": {out} holds no runs; name their folder by --out, or leave --report out")
    experiments = experiments_of(study, path.parent)
    for name, experiment in experiments.items():
        with of_variant(name):
            check_config(study, experiment)
    if not (args.list or args.report):
        prepare_data(experiments.values())
    planned = plan(study, path.parent, out, resolved=resolve_for_dry_run if args.list else resolve)
    require_unmixed(planned)
    require_own(out, WRITTEN, _is_begun(out, planned))
    if args.report:
        print(_report(study, path.stem, out, planned), end="")
        return
    missing = [each for each in planned if read_score(study, each) is None]
    commands = {each.name: _command(path, args.overrides, out, each) for each in missing}
    if args.list:
        for command in commands.values():
            print(shlex.join(["dit-moe", *command]))
        return
    for each in _first_of_variants(missing):
        check_scoring(study, each)
    require_writable(out)
    with locked(out):
        _compare(study, path.stem, out, planned, missing, commands, args.jobs)


def _is_begun(out: Path, planned: Sequence[PlannedRun]) -> bool:
    """Whether the study, or a run of it, was begun in the folder `out`."""
    study = out / STUDY
    begun = study.is_file() and study.read_bytes().startswith(config.OF_A_STUDY.encode())
    return begun or "settings" in read_object(out / RESULTS) or any(is_begun(run.folder) for run in planned)


def _command(path: Path, overrides: Sequence[str], out: Path, run: PlannedRun) -> list[str]:
    return ["compare", str(path), *overrides, "--out", str(out), "--only", run.name]


def _first_of_variants(runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    return list({run.variant.name: run for run in reversed(runs)}.values())


def _compare(
    study: Study,
    name: str,
    out: Path,
    planned: Sequence[PlannedRun],
    missing: Sequence[PlannedRun],
    commands: dict[str, list[str]],
    wanted: int | None,
) -> None:
    """Run what is missing, and write what came of it, also of a part."""
    share = share_machine(len(missing), wanted, gpu_names())
    write_atomically(out / STUDY, config.OF_A_STUDY + config.to_yaml(study))
    failed: list[Job] = []
    try:
        failed = _run_missing(missing, commands, share)
    finally:  # after a Ctrl-C, too; and before the times, which are the least of it
        table = _report(study, name, out, planned)
    if study.timing_steps and not failed and _time(study, out, planned):
        table = _report(study, name, out, planned)
    print(table, end="")
    if failed:
        first = failed[0]
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise TrainingError(f"{first.name}{more} failed: {first.last_words()}; all of it is in {first.output}")


def gpu_names() -> list[str]:
    """Of the GPUs that may be used, as CUDA_VISIBLE_DEVICES is to name them; none where the CPU is to be used."""
    if use_cpu():
        return []
    count, named = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    names = map(str, range(count)) if named is None else (name.strip() for name in named.split(","))
    return list(names)[:count]


def _run_missing(missing: Sequence[PlannedRun], commands: dict[str, list[str]], share: Share) -> list[Job]:
    """Those that failed."""
    program = [sys.executable, "-m", "dit_moe.cli"]
    jobs = [Job(each.name, [*program, *commands[each.name]], each.folder / "output.txt") for each in missing]
    failed: list[Job] = []
    with StudyProgress(missing) as progress:

        def ended(job: Job) -> None:
            progress.ended(job)
            if job.returncode:
                failed.append(job)

        run_jobs(jobs, share, progress.update, ended)
    return failed


def _time(study: Study, out: Path, planned: Sequence[PlannedRun]) -> bool:
    """Time the variants, unless this machine did so before with the same runs, software and threads; whether it did."""
    runs = _first_of_variants(planned)
    timing = read_timing(out, runs, study.timing_steps)
    if timing is not None and is_of_here(timing, runs):
        return False
    try:
        time_variants(out, runs, study.timing_steps)
    except torch.OutOfMemoryError as error:
        problem = str(error).splitlines()[0]
        print(f"note: no times per step: {problem}; lower train.micro_batch, or set timing_steps=0", file=sys.stderr)
        return False
    return True


def _report(study: Study, name: str, out: Path, planned: Sequence[PlannedRun]) -> str:
    """Write results.json, last, and what is made of it; returns the table."""
    with exclusive(out, RESULTS, wait=True):  # --report also writes them, while the runs go on
        results: dict[str, Any] = gather(study, name, planned, _times(study, out, planned))
        table = to_markdown(results)
        write_atomically(out / "table.md", table)
        write_atomically(out / "table.csv", to_csv(results))
        save_pictures(results, out)
        write_atomically(out / RESULTS, json.dumps(results, indent=1, allow_nan=False) + "\n")
    return table


def _times(study: Study, out: Path, planned: Sequence[PlannedRun]) -> dict[str, Any] | None:
    """Those measured by now, if they are of these runs."""
    runs = _first_of_variants(planned)
    if not study.timing_steps or not all(each.is_trained() for each in runs):
        return None
    return read_timing(out, runs, study.timing_steps)
