"""What `dit-moe compare` does: train and score the runs of a study that are missing, and report on those that exist."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from dit_moe import built_in, config, plugins
from dit_moe.config import ConfigError
from dit_moe.distributed import is_out_of_memory, locked, on_main
from dit_moe.downloads import no_downloads
from dit_moe.files import require_own, require_writable, write_atomically
from dit_moe.formatting import tell
from dit_moe.json_files import read_object
from dit_moe.locks import exclusive
from dit_moe.plotting import save_figure
from dit_moe.studies.figures import draw_differences, draw_loss_vs_flops, draw_quality_vs_active
from dit_moe.studies.figures_routing import draw_active_by_layer, draw_active_over_training, draw_p_over_training
from dit_moe.studies.jobs import Job, gpu_names, run_jobs, share_machine
from dit_moe.studies.plan import PlannedRun, first_of_variants, plan, prepare_data, run_folder
from dit_moe.studies.results import StudyResults, gather
from dit_moe.studies.score import (
    check_config,
    check_scoring,
    read_score,
    read_timing,
    time_variants,
    was_measured_here,
)
from dit_moe.studies.search import (
    DIVERGED,
    FOLDER,
    Search,
    chosen_options,
    keep_search,
    read_search,
    searched_for,
    tuned,
)
from dit_moe.studies.study import (
    BUILT_IN,
    Study,
    experiments_of,
    find_study,
    load_study,
    of_variant,
    require_taken,
    with_found_configs,
)
from dit_moe.studies.study import FILE as STUDY
from dit_moe.studies.table import to_csv, to_markdown
from dit_moe.studies.train_and_score import train_and_score
from dit_moe.tasks.train import resolve_for_dry_run
from dit_moe.training.interrupt import TrainingError
from dit_moe.training.run_start import is_begun
from dit_moe.training.step import NotFinite
from dit_moe.training.trainer import DATA_ARE_FINITE

FIGURES: dict[str, Callable[..., Any]] = {  # name of the file: (results, dark=False) → figure or None
    "loss_vs_flops": draw_loss_vs_flops,
    "difference_to_baseline": draw_differences,
    "active_over_training": draw_active_over_training,
    "p_over_training": draw_p_over_training,
    "active_by_layer": draw_active_by_layer,
    "quality_vs_active": draw_quality_vs_active,
}
RESULTS = "results.json"
WRITTEN = (STUDY, "table.md", "table.csv", RESULTS, *(f"{name}.png" for name in FIGURES))


@dataclass(frozen=True)
class StudyFolder:
    """A study and the folder `out` of its runs and results."""

    study: Study
    path: Path  # of its file
    overrides: Sequence[str]
    out: Path
    chosen: Mapping[str, Sequence[str]] | None = None  # by its search, for each variant
    written: Study | None = None  # as it was before that
    is_round: bool = False  # of a search
    wanted: Collection[str] = ()  # names of the variants that are to be run; none: all

    @classmethod
    def open(cls, name: str, overrides: Sequence[str], out: Path | None, wanted: Collection[str] = ()) -> Self:
        """Of a file, or of a built-in study. ConfigError for mistakes in it."""
        path = find_study(name)
        default = path.parent if path == Path(name, STUDY) else Path("runs", f"compare-{path.stem}")
        study = with_found_configs(load_study(path, overrides), path.parent)
        require_taken(study, overrides, path.parent)
        for each in wanted:
            study.variant(each)
        return cls(study, path, overrides, out or default, wanted=wanted)

    @classmethod
    def of_round(cls, study: Study, out: Path) -> Self:
        """Of a round of a search, which has no file yet."""
        folder = cls(study, out / STUDY, (), out, is_round=True)
        folder._keep_study()
        return folder

    def _keep_study(self) -> None:
        """In its folder, which then stands for it."""
        require_writable(self.out)
        write_atomically(self.out / STUDY, config.OF_A_STUDY + config.to_yaml(self.written or self.study))

    def searched(self, needed: Collection[str] = ()) -> Self:
        """With what the study's search chose; ConfigError if that is yet to be done for a variant of `needed`."""
        chosen = None
        if self.study.search is not None:
            chosen = chosen_options(self.study, self.path.parent, self.out)
        study = tuned(self.study, self.path.parent, self.out, needed)
        return replace(self, study=study, chosen=chosen, written=self.study)

    @property
    def _to_run(self) -> list[str]:
        """Names of variants."""
        return [variant.name for variant in self.study.variants if not self.wanted or variant.name in self.wanted]

    @property
    def words(self) -> list[str]:
        """What names this study, and its folder, where the command is given."""
        name = built_in.name_of(self.path)
        study = str(self.path) if name is None else name.removeprefix(BUILT_IN)
        return [study, *self.overrides, "--out", str(self.out)]

    def files(self) -> list[Path]:
        """The table and the figures, which need not all be there."""
        return [self.out / name for name in ("table.md", *(f"{name}.png" for name in FIGURES))]

    def first_runs(self) -> list[Path]:
        """The run with the first seed of each variant that is asked for and has one."""
        variants = [self.study.variant(name) for name in self._to_run]
        runs = [run_folder(self.out, variant, self.study.seeds[0]) for variant in variants]
        return [run for run in runs if (run / "log.jsonl").exists()]

    def run_only(self, name: str) -> None:
        """Train and score the run VARIANT/SEED."""
        study = self.searched([name.rpartition("/")[0]]).study
        (run,) = plan(study, self.path.parent, self.out, only=name)
        try:
            train_and_score(study, run)
        except TrainingError as error:
            if DATA_ARE_FINITE in str(error):
                on_main(run.note_divergence)
            raise

    @no_downloads()
    def missing_commands(self) -> list[str]:
        """A shell command for each run that is missing. Data that do not exist yet are not made.

        Of a study with a search first those of its next round.
        """
        self._experiments()
        commands: list[str] = []

        def losses(of_round: StudyFolder) -> dict[str, float] | None:
            commands[:] = of_round.missing_commands()
            return None if commands else of_round.losses()

        if not self._search(losses):
            return commands
        study = self.searched(self._to_run).study
        runs = plan(study, self.path.parent, self.out, resolved=resolve_for_dry_run)
        self._require_own(runs)
        return [shlex.join(["dit-moe", *self._command(run)]) for run in self._missing(runs)]

    def report(self) -> str:
        """Write results.json and what is made of it, of the runs that exist; returns the table."""
        if not self.out.is_dir():
            problem = f": {self.out} holds no runs; name their folder by --out, or leave --report out"
            raise ConfigError("--report", problem)
        self._experiments()
        searched = self.searched()
        runs = plan(searched.study, self.path.parent, self.out)
        self._require_own(runs)
        return searched._report(runs)

    def run_missing(self, at_a_time: int | None) -> tuple[str, list[Job]]:
        """Run what is missing, `at_a_time` side by side, time the variants, and report; the table, and what failed.

        Ended early, also by a Ctrl-C, it reports on what exists by then.
        """
        if at_a_time is not None and at_a_time < 1:
            raise ConfigError("--jobs", f"={at_a_time} must be at least 1")
        prepare_data(self._experiments().values())
        failed_in_search: list[Job] = []

        def losses(of_round: StudyFolder) -> dict[str, float] | None:
            _, failed = of_round.run_missing(at_a_time)
            losses = of_round.losses()
            failed_in_search[:] = [job for job in failed if job.name.partition("/")[0] not in losses]
            return None if failed_in_search else losses

        if self.study.search is not None:
            self._require_own([])
            self._keep_study()
        if not self._search(losses):
            return "", failed_in_search
        return self.searched(self._to_run)._run_missing(at_a_time)

    def losses(self) -> dict[str, float]:
        """The held-out loss of each variant whose run with the first seed is finished, or `DIVERGED`."""
        runs = plan(self.study, self.path.parent, self.out)
        scores = {run.variant.name: read_score(self.study, run) for run in first_of_variants(runs)}
        found = {name: score["loss"] for name, score in scores.items() if score is not None}
        return found | {run.variant.name: DIVERGED for run in runs if run.has_diverged()}

    def _search(self, losses_of: Callable[[StudyFolder], dict[str, float] | None]) -> bool:
        """Do the study's search for the variants that it is yet to be done for, if it has one; whether it is done now.

        Args:
            losses_of: a round's study → the losses of its variants; None: it is not finished.
        """
        if self.study.search is None:
            return True
        found = read_search(self.study, self.out)
        left = [name for name in searched_for(self.study, self._to_run) if name not in found]
        if not left:
            return True
        start = found[self.study.baseline]["chosen"] if self.study.baseline in found else ()
        search = Search(self.study, self.path.parent, left, start)
        while (study := search.next_study()) is not None:
            tell(f"search: {search.name}, {len(study.variants)} runs")
            losses = losses_of(StudyFolder.of_round(study, self.out / FOLDER / search.name))
            if losses is None:
                return False
            search.take(losses)
        keep_search(self.study, self.out, search.result())
        return True

    def _run_missing(self, at_a_time: int | None) -> tuple[str, list[Job]]:
        """`run_missing` once the search is done."""
        runs = plan(self.study, self.path.parent, self.out)
        self._require_own(runs)
        missing = self._missing(runs)
        for run in first_of_variants(missing):
            check_scoring(self.study, run)
        share = share_machine(len(missing), at_a_time, gpu_names())
        require_writable(self.out)
        with locked(self.out):
            self._keep_study()
            failed: list[Job] = []
            try:
                failed = run_jobs([self._job(run) for run in missing], share)
            finally:  # before the times, which matter least
                table = self._report(runs)
            if self.study.timing_steps and not failed and self._time(runs):
                table = self._report(runs)
        return table, failed

    def _experiments(self) -> dict[str, Any]:
        """By variant, checked as far as the config alone tells."""
        experiments = experiments_of(self.study, self.path.parent)
        for name, experiment in experiments.items():
            with of_variant(name):
                check_config(self.study, experiment)
        return experiments

    def _require_own(self, runs: Sequence[PlannedRun]) -> None:
        """ValueError if files would be written over that are not of a study."""
        study = self.out / STUDY
        begun = study.is_file() and study.read_bytes().startswith(config.OF_A_STUDY.encode())
        begun = begun or "settings" in read_object(self.out / RESULTS) or any(is_begun(run.folder) for run in runs)
        require_own(self.out, WRITTEN, begun)

    def _missing(self, runs: Sequence[PlannedRun]) -> list[PlannedRun]:
        wanted = [run for run in runs if run.variant.name in self._to_run]
        missing = [run for run in wanted if read_score(self.study, run) is None]
        return [run for run in missing if not (self.is_round and run.has_diverged())]

    def _command(self, run: PlannedRun) -> list[str]:
        return ["compare", *self.words, "--only", run.name, *plugins.options()]

    def _job(self, run: PlannedRun) -> Job:
        command = [sys.executable, "-m", "dit_moe.cli", *self._command(run)]
        steps = run.experiment.train.steps
        return Job(run.name, command, run.folder / "output.txt", log=run.folder / "log.jsonl", steps=steps)

    def _time(self, runs: Sequence[PlannedRun]) -> bool:
        """Time the variants, unless this machine did so with the same runs, software and threads; whether it did."""
        first, steps = first_of_variants(runs), self.study.timing_steps
        timing = read_timing(self.out, first, steps)
        if (timing is not None and was_measured_here(timing, first)) or not all(run.is_trained() for run in first):
            return False
        try:
            time_variants(self.out, first, steps)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            problem = str(error).splitlines()[0]
            remedy = "lower train.micro_batch, or set timing_steps=0"
            tell(f"note: no times per step: {problem}; {remedy}")
            return False
        except NotFinite as error:  # of a variant that diverges further: its losses are reported all the same
            tell(f"note: no times per step: {error} in a timed step; set timing_steps=0")
            return False
        return True

    def _report(self, runs: Sequence[PlannedRun]) -> str:
        first, steps = first_of_variants(runs), self.study.timing_steps
        with exclusive(self.out, RESULTS, wait=True):  # --report also writes them, while the runs go on
            timed = steps and all(run.is_trained() for run in first)
            timing = read_timing(self.out, first, steps) if timed else None
            kept = self.path == self.out / STUDY
            name = self.out.name.removeprefix("compare-") if kept else self.path.stem
            results = gather(self.study, name, runs, timing, self.chosen)
            table = to_markdown(results)
            write_atomically(self.out / "table.md", table)
            write_atomically(self.out / "table.csv", to_csv(results))
            save_figures(results, self.out)
            write_atomically(self.out / RESULTS, json.dumps(asdict(results), indent=1, allow_nan=False) + "\n")
        return table


def save_figures(results: StudyResults, folder: Path) -> None:
    """Each as a PNG; one of an earlier state of the study that there are no numbers for is removed."""
    for name, draw in FIGURES.items():
        figure, path = draw(results), folder / f"{name}.png"
        if figure is None:
            path.unlink(missing_ok=True)
        else:
            save_figure(figure, path)
