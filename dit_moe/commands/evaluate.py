"""Compare images with a reference: FID and its kin, precision and recall, class accuracy, nearest neighbours.

SAMPLES and REFERENCE are each an images.npz, a folder of images, a file of statistics (mu, sigma, mu_s, sigma_s), one
of ADM's reference batches, a folder of latents, a dataset ("digits", "digits/heldout", "{name: image_folder, path: …}")
or a folder of features. SAMPLES may also be a run: then its images are sampled as they are needed and not written.
Several SAMPLES are several sampling seeds. A run alone is compared with the images that it was trained on.

The result is JSON on stdout, and a table on stderr. With --features, or --out, the same command goes on where it
stopped. Started by torchrun or accelerate it uses every process.

    dit-moe eval runs/digits count=450 guidance.scale=1.5 --seeds 3 --out metrics.json
    dit-moe eval seed0.npz seed1.npz digits --metrics fd,kid,precision_recall
    dit-moe eval runs/xl VIRTUAL_imagenet256_labeled.npz --recipe adm-50k --sampling dit-cfg1.5 --out fid.json
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dit_moe import checkpoint
from dit_moe.commands.eval_options import add_eval_arguments, extractor_config, metric_configs, read_options
from dit_moe.commands.judging import (
    how_many,
    named_space,
    reasons_not_comparable,
    reconstructed,
    require_seeds_of_one,
    run_source,
    seeds_of,
    training_images,
)
from dit_moe.commands.progress import images_bar
from dit_moe.commands.report_table import print_table
from dit_moe.evaluation.comparison import Comparison
from dit_moe.evaluation.recipes import EVALUATION, sampling_recipe
from dit_moe.evaluation.sources.base import Opened
from dit_moe.evaluation.sources.statistics import states_fid, write_statistics
from dit_moe.evaluation.sources.words import open_word
from dit_moe.evaluation.stored import MANIFEST, Extracted
from dit_moe.extractors import EXTRACTORS, FeatureExtractor
from dit_moe.extractors.digits_cnn import DigitsCNNConfig
from dit_moe.extractors.inception import InceptionConfig
from dit_moe.extractors.stated import StatedSpace
from dit_moe.files import require_writable, write_atomically
from dit_moe.metrics import METRICS
from dit_moe.processes import join_processes, on_main
from dit_moe.runs import Run, of_sample, open_run

OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")
OUTPUTS = {"out": ".json", "save_stats": ".npz", "save_npz": ".npz"}  # options and how their files end
OF_FEATURES = re.compile(r"reference|heldout|reconstruction|samples_\d+")  # folders in that of --features


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `run` reads."""
    parser.add_argument(
        "words", nargs="+", metavar="SAMPLES… REFERENCE", help="see above; the last one is the reference"
    )
    parser.set_defaults(overrides=[])  # `key=value` words, for the section `sample` of runs
    add_eval_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Evaluate, print JSON to stdout and a table to stderr. ValueError for bad input, before anything is written."""
    with _ending_cleanly():
        Evaluation(args).run()


@contextmanager
def _ending_cleanly() -> Iterator[None]:
    """SIGTERM ends the command as Ctrl-C does: temporary folders go."""
    before = signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Evaluation:
    """What one call of the command does."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.options = args, read_options(args)
        words = [word for word in args.words if not _is_override(word)]
        self.overrides = of_sample([*(word for word in args.words if _is_override(word)), *args.overrides])
        self.recipe = EVALUATION.get(args.recipe)
        on_main(lambda: self._require_places(words))
        if not words:
            raise ValueError("nothing to evaluate; name SAMPLES and a REFERENCE")
        alone = len(words) == 1
        self.sample_words = words if alone else words[:-1]
        self.reference_word = None if alone else words[-1]
        self.runs = {word: self._open_run(word) for word in self.sample_words if _is_run(word)}
        if self.overrides and not self.runs:
            raise ValueError(f"{' '.join(self.overrides)}: only for runs, and {', '.join(words)} is none; drop it")
        for option in ("seeds", "sampling"):
            if getattr(args, option) is not None and not self.runs:
                raise ValueError(f"--{option} is for runs, and {', '.join(self.sample_words)} is none; drop it")
        if alone and not self.runs and args.save_stats is None:
            raise ValueError(f"{words[0]} alone has no REFERENCE; name one behind it, or only --save-stats FILE.npz")

    # --------------------------------------------------------------------------------------------------------- inputs

    def _require_places(self, words: list[str]) -> None:
        paths = {option: getattr(self.args, option) for option in OUTPUTS if getattr(self.args, option) is not None}
        taken = {Path(word).resolve() for word in words}
        for option, path in paths.items():
            _require_place(path, f"--{option.replace('_', '-')}", OUTPUTS[option])
            if path.resolve() in taken:
                raise ValueError(
                    f"--{option.replace('_', '-')} {path} would overwrite what is read or written; name another"
                )
            taken.add(path.resolve())
        folder = self._features_folder()
        if folder is not None and folder.is_dir():
            strangers = [each.name for each in folder.iterdir() if not OF_FEATURES.fullmatch(each.name)]
            if strangers:
                raise ValueError(f"--features {folder} holds {strangers[0]}, which is no features; name another folder")

    def _features_folder(self) -> Path | None:
        """Where features are kept: as --features says, or beside what is written."""
        beside = next(
            (path for path in (self.args.out, self.args.save_stats, self.args.save_npz) if path is not None), None
        )
        if self.args.features is not None or beside is None:
            return Path(self.args.features) if self.args.features is not None else None
        return beside.with_name(f"{beside.name.removesuffix('.json').removesuffix('.npz')}.features")

    def _open_run(self, word: str) -> Run:
        overrides = list(self.overrides)
        if self.recipe is not None:
            overrides.insert(0, f"count={self.recipe.count}")
        if self.args.sampling is not None:
            trained = checkpoint.open_checkpoint(word).config()["objective"]["name"]
            overrides = [*sampling_recipe(self.args.sampling, trained, "--sampling").overrides, *overrides]
        return open_run(word, overrides, device=join_processes().device)

    def _open(self, word: str) -> Opened:
        folder = Path(word)
        return Opened(features=folder) if (folder / MANIFEST).is_file() else open_word(word, self.options)

    def _samples(self, reference: Opened | None) -> list[Opened]:
        opened: list[Opened] = []
        for word in self.sample_words:
            run = self.runs.get(word)
            if run is None:
                opened.append(self._open(word))
                continue
            stated = self.args.sampling or self.recipe or any(each.startswith("count=") for each in self.overrides)
            sample = run.experiment.sample
            count = sample.count if stated else how_many(run.experiment, reference or Opened())
            seeds = (1 if self.recipe else run.experiment.eval.seeds) if self.args.seeds is None else self.args.seeds
            opened += [Opened(source=run_source(run, each)) for each in seeds_of(sample, count, seeds)]
        return opened

    def _extractor(self, samples: list[Opened], reference: Opened | None) -> tuple[FeatureExtractor, Any]:
        default: Any = InceptionConfig()
        if self.runs:
            default = next(iter(self.runs.values())).experiment.eval.extractor
        elif self.reference_word is not None and self.reference_word.partition("/")[0] == "digits":
            default = DigitsCNNConfig()
        chosen = extractor_config(self.args, default)
        if self.recipe is not None:  # before the weights are looked for
            metrics = metric_configs(self.args, chosen, None) or ()
            presumed: dict[str, Any] = {"extractor": "inception", "is_fid": True}
            self._require_recipe(
                reasons_not_comparable(samples, reference or Opened(), metrics, self.options, **presumed)
            )
        sides = [*samples, *([] if reference is None else [reference])]
        files = [one.statistics for one in sides if one.source is None and one.statistics is not None]
        if len(files) < len(sides):
            return EXTRACTORS.build(chosen).to(join_processes().device), chosen
        first, width = files[0].extractor, len(files[0].moments.mean_D)
        agreed = first if all(one.extractor == first for one in files) else None
        return StatedSpace(agreed, width, agreed is not None and states_fid(agreed, width)), chosen

    # ----------------------------------------------------------------------------------------------------------- work

    def run(self) -> None:
        """All of it."""
        run = next(iter(self.runs.values()), None)
        reference: Opened | None = None
        if self.reference_word is not None:
            reference = self._open(self.reference_word)
        elif run is not None:
            reference = training_images(run.experiment)
        samples = self._samples(reference)
        self._require_one_set(samples)
        require_seeds_of_one(samples)
        extractor, chosen = self._extractor(samples, reference)
        own = self.reference_word is None and run is not None and reference is not None
        metrics = metric_configs(self.args, chosen, None if run is None else run.experiment.eval.metrics)
        comparison = Comparison(
            reference,
            extractor,
            metrics,
            folder=self._features_folder(),
            reconstructed=reconstructed(run.experiment, reference.heldout) if own and run and reference else None,
            allow_few=self.args.allow_few,
            progress=images_bar,
        )
        comparison.check(samples)
        if self.recipe is not None and not extractor.is_fid:
            self._require_recipe([f"the features are those of {extractor.name}, not of the verified Inception"])
        comparison.prepare()
        made = comparison.features(samples, self.args.save_npz)
        if join_processes().is_main_process:  # the others need not wait: there is nothing left for them to do
            self._finish(comparison, samples, made)

    def _require_one_set(self, samples: list[Opened]) -> None:
        for option in ("save_npz", "save_stats"):
            if getattr(self.args, option) is not None and len(samples) > 1:
                problem = f"--{option.replace('_', '-')} takes one set of SAMPLES, and there are {len(samples)}"
                raise ValueError(f"{problem}; name one, for a run with --seeds 1")
        if self.args.save_npz is not None and samples[0].source is None:
            raise ValueError(f"--save-npz needs images, and {self.sample_words[0]} holds none; drop it")

    def _require_recipe(self, reasons: list[str]) -> None:
        if self.recipe is not None and reasons:
            problem = f"--recipe {self.recipe.name} does not hold: {'; '.join(reasons)}"
            raise ValueError(f"{problem}; mend it, or drop --recipe")

    def _finish(self, comparison: Comparison, samples: list[Opened], made: list[Extracted]) -> None:
        if self.args.save_stats is not None:
            write_statistics(self.args.save_stats, made[0].features, comparison.extractor)
        if comparison.reference is None:
            print(json.dumps({"saved": str(self.args.save_stats), "count": made[0].features.count}, indent=1))
            return
        report = comparison.report(samples, made)
        read = {name: value for name, value in asdict(self.options).items() if name != "workers"}
        how = {"recipe": self.args.recipe, "sampling": self.args.sampling, "read": read}
        computed = report["provenance"]["metrics"]
        configs = comparison.metrics or [METRICS.config_class(name)() for name in computed]
        metrics = [each for each in configs if METRICS.name_of(each) in computed]
        reasons = reasons_not_comparable(samples, comparison.reference, metrics, self.options, **named_space(report))
        reasons += [note for note in report["warnings"] if note.endswith("the same images")]
        report["provenance"] |= how | {"comparable_to_published": not reasons, "not_comparable_because": reasons}
        text = json.dumps(report, indent=1, allow_nan=False)
        if self.args.out is not None:
            write_atomically(self.args.out, text + "\n")
        print(text)
        print_table(report)


def _is_override(word: str) -> bool:
    return OVERRIDE.match(word) is not None and not Path(word).exists()


def _is_run(word: str) -> bool:
    folder = Path(word)
    return folder.is_dir() and ((folder / "state.json").is_file() or bool(checkpoint.checkpoints(folder)))


def _require_place(path: Path, option: str, ending: str) -> None:
    if not path.parent.is_dir():
        raise ValueError(f"{option} {path}: the folder {path.parent} does not exist; make it first")
    if path.is_dir():
        raise ValueError(f"{option} {path} is a folder; name a file, for instance {path / f'metrics{ending}'}")
    if path.suffix != ending:
        raise ValueError(f"{option} {path} should end in {ending}")
    require_writable(path.parent)
