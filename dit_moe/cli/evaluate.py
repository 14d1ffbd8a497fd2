"""Compare images with a reference: FID and its kin, precision and recall, class accuracy, nearest neighbours.

SAMPLES and REFERENCE are each an images.npz, a folder of images, a file of statistics (mu, sigma, mu_s, sigma_s), one
of ADM's reference batches, a folder of latents, a dataset ("digits", "digits/heldout", "{name: image_folder, path: …}")
or a folder of features. SAMPLES may also be a run: then its images are sampled as they are needed and not written.
Several SAMPLES are several sampling seeds. A run alone is compared with the images that it was trained on.

The result is JSON on stdout, and a table on stderr. With --features, or --out, the same command goes on where it
stopped. Started by torchrun or accelerate it uses every process.

    dit-moe eval runs/digits count=450 guidance.scale=1.5 --seeds 3 --out metrics.json
    dit-moe eval seed0.npz seed1.npz digits --metrics fd,kid,precision_recall
    # needs Inception's weights and ADM's reference batch
    dit-moe eval runs/xl VIRTUAL_imagenet256_labeled.npz --recipe adm-50k --sampling dit-cfg1.5 --out fid.json
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dit_moe import checkpoint
from dit_moe.cli.eval_options import add_eval_arguments, extractor_config, metric_configs, read_options
from dit_moe.distributed import join_processes, on_main
from dit_moe.evaluation.comparability import reasons_not_comparable, vouched
from dit_moe.evaluation.comparison import Comparison
from dit_moe.evaluation.features import ExtractedFeatures, FeatureFolder
from dit_moe.evaluation.places import features_folder, locked_places, require_places
from dit_moe.evaluation.recipes import EVALUATION, sampling_recipe
from dit_moe.evaluation.report_table import print_table
from dit_moe.evaluation.runs import (
    how_many,
    reconstructed,
    require_seeds_of_one,
    run_source,
    seeds_of,
    training_images,
)
from dit_moe.evaluation.sources import EvaluationInput, converted, open_input
from dit_moe.evaluation.sources.base import FEATURES_MANIFEST
from dit_moe.evaluation.sources.generated import GeneratedSource
from dit_moe.evaluation.sources.statistics import is_verified_inception, require_extractor, write_statistics
from dit_moe.experiments.run import ImageRun, of_sample, open_image_run
from dit_moe.extractors import EXTRACTORS, FeatureExtractor
from dit_moe.extractors.base import StatisticsOnly
from dit_moe.extractors.digits_cnn import DigitsCNNConfig
from dit_moe.extractors.inception import InceptionConfig
from dit_moe.files import write_atomically
from dit_moe.progress import images_bar

OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")
OF_DIGITS = re.compile(r"digits(/\w+)?|\{\s*name:\s*digits\b.*")  # words that name the digits


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `run` reads."""
    parser.add_argument("words", nargs="+", metavar="WORD", help="SAMPLES, and last the REFERENCE: see above")
    parser.set_defaults(overrides=[])  # `key=value` words, for the section `sample` of runs
    add_eval_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Evaluate, print JSON to stdout and a table to stderr. ValueError for bad input, before anything is written."""
    evaluation = Evaluation(args)
    with locked_places(args):
        evaluation.require_places()  # again, as another command may have written there by now
        evaluation.run()


class Evaluation:
    """What one call of the command does."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.options = args, read_options(args)
        words = [word for word in args.words if not _is_override(word)]
        self.overrides = of_sample([*(word for word in args.words if _is_override(word)), *args.overrides])
        self.recipe = EVALUATION.get(args.recipe)
        if not words:
            raise ValueError("nothing to evaluate; name SAMPLES and a REFERENCE")
        alone = len(words) == 1
        self.sample_words = words if alone else words[:-1]
        self.reference_word = None if alone else words[-1]
        self.runs = {word: self._open_run(word) for word in self.sample_words if checkpoint.is_run(word)}
        if self.overrides and not self.runs:
            raise ValueError(f"{' '.join(self.overrides)}: only for runs, and {', '.join(words)} is none; drop it")
        reads = [*words, *(run.experiment.eval.reference or "" for run in self.runs.values())]
        self.reads = [word for word in reads if word]
        self.require_places()
        for option in ("seeds", "sampling"):
            if getattr(args, option) is not None and not self.runs:
                raise ValueError(f"--{option} is for runs, and {', '.join(self.sample_words)} is none; drop it")
        if alone and not self.runs and args.save_stats is None:
            raise ValueError(f"{words[0]} alone has no REFERENCE; name one behind it, or only --save-stats FILE.npz")

    # --------------------------------------------------------------------------------------------------------- inputs

    def require_places(self) -> None:
        """ValueError if what is to be written cannot be, or would take the place of something else."""
        on_main(lambda: require_places(self.args, self.reads))

    def _open_run(self, word: str) -> ImageRun:
        overrides = list(self.overrides)
        if self.recipe is not None:
            overrides.insert(0, f"count={self.recipe.count}")
        if self.args.sampling is not None:
            trained = checkpoint.open_checkpoint(word).config()["objective"]["name"]
            overrides = [*sampling_recipe(self.args.sampling, trained, "--sampling").overrides, *overrides]
        return open_image_run(word, overrides, device=join_processes().device)

    def _open(self, word: str) -> EvaluationInput:
        folder = Path(word)
        return (
            EvaluationInput(features=folder)
            if (folder / FEATURES_MANIFEST).is_file()
            else open_input(word, self.options)
        )

    def _samples(self, reference: EvaluationInput | None) -> list[EvaluationInput]:
        opened: list[EvaluationInput] = []
        for word in self.sample_words:
            run = self.runs.get(word)
            if run is None:
                opened.append(self._open(word))
                continue
            stated = self.args.sampling or self.recipe or any(each.startswith("count=") for each in self.overrides)
            sample = run.experiment.sample
            count = sample.count if stated else how_many(run.experiment, reference or EvaluationInput())
            seeds = (1 if self.recipe else run.experiment.eval.seeds) if self.args.seeds is None else self.args.seeds
            opened += [EvaluationInput(source=run_source(run, each)) for each in seeds_of(sample, count, seeds)]
        require_seeds_of_one(opened)
        return [converted(one, self.options) if isinstance(one.source, GeneratedSource) else one for one in opened]

    def _extractor(self, sides: list[EvaluationInput]) -> tuple[FeatureExtractor, Any]:
        """The extractor, and its config; None for the space that statistics state, where there is nothing else."""
        asked = self.args.extractor or self.args.weights or self.args.any_weights or self.recipe
        files = [one.statistics for one in sides if one.source is None and one.statistics is not None]
        if len(files) < len(sides) or asked:
            chosen = extractor_config(self.args, self._default_extractor(sides))
            return EXTRACTORS.build(chosen).to(join_processes().device), chosen
        stated = [one.extractor for one in files if one.extractor is not None]
        if any(each != stated[0] for each in stated):
            names = " and ".join(f"{one.source} ({one.extractor['name']})" for one in files if one.extractor)
            raise ValueError(
                f"{names} are of different extractors, or weights; make them again with one by --save-stats"
            )
        first, width = stated[0] if stated else None, len(files[0].moments.mean_D)
        spatial = all(one.spatial_moments is not None for one in files)
        return StatisticsOnly(first, width, is_verified_inception(first, width), spatial), None

    def _default_extractor(self, sides: list[EvaluationInput]) -> Any:
        """That of the run's config, or of features that were kept; the digits' own, or else the Inception."""
        if self.runs:
            return next(iter(self.runs.values())).experiment.eval.extractor
        kept = [
            FeatureFolder.open(one.features).manifest.extractor["name"] for one in sides if one.features is not None
        ]
        if kept and kept[0] in EXTRACTORS.names():
            return EXTRACTORS.config_class(kept[0])()
        words = [*self.sample_words, *([] if self.reference_word is None else [self.reference_word])]
        return DigitsCNNConfig() if any(map(OF_DIGITS.fullmatch, words)) else InceptionConfig()

    def _require_recipe(self, reasons: list[str]) -> None:
        if self.recipe is not None and reasons:
            problem = f"--recipe {self.recipe.name} does not hold: {'; '.join(reasons)}"
            raise ValueError(f"{problem}; mend it, or drop --recipe")

    # ----------------------------------------------------------------------------------------------------------- work

    def run(self) -> None:
        """All of it."""
        run = next(iter(self.runs.values()), None)
        reference: EvaluationInput | None = None
        if self.reference_word is not None:
            reference = self._open(self.reference_word)
        elif run is not None:
            reference = training_images(run.experiment, self.options)
        samples = self._samples(reference)
        self._require_one_set(samples)
        if self.recipe is not None:  # before its weights are looked for
            metrics = metric_configs(self.args, InceptionConfig(), None) or ()
            told: dict[str, Any] = {"options": self.options, "extractor": "inception", "is_fid": True}
            self._require_recipe(reasons_not_comparable(samples, reference or EvaluationInput(), metrics, **told))
        extractor, chosen = self._extractor([*samples, *([] if reference is None else [reference])])
        if self.recipe is not None and not extractor.is_fid:
            self._require_recipe([f"the features are those of {extractor.name}, not of the verified Inception"])
        if self.recipe is not None and reference is not None and reference.statistics is not None:
            require_extractor(reference.statistics, extractor)
        decoded = None
        if self.reference_word is None and run is not None and reference is not None and not self.options.changes:
            decoded = reconstructed(run.experiment, reference)
        comparison = Comparison(
            reference,
            extractor,
            metric_configs(self.args, chosen, None if run is None else run.experiment.eval.metrics, extractor.is_fid),
            folder=features_folder(self.args),
            reconstructed=decoded,
            statistics=self.args.save_stats is not None,
            allow_few=self.args.allow_few,
            progress=images_bar,
        )
        comparison.check(samples)
        comparison.prepare()
        made = comparison.features(samples, self.args.save_npz)
        if join_processes().is_main_process:  # the others need not wait: there is nothing left for them to do
            self._finish(comparison, samples, made)

    def _require_one_set(self, samples: list[EvaluationInput]) -> None:
        for option in ("save_npz", "save_stats"):
            if getattr(self.args, option) is not None and len(samples) > 1:
                problem = f"--{option.replace('_', '-')} takes one set of SAMPLES, and there are {len(samples)}"
                raise ValueError(f"{problem}; name one, for a run with --seeds 1")
        if self.args.save_npz is not None and samples[0].source is None:
            raise ValueError(f"--save-npz needs images, and {self.sample_words[0]} holds none; drop it")

    def _finish(self, comparison: Comparison, samples: list[EvaluationInput], made: list[ExtractedFeatures]) -> None:
        if self.args.save_stats is not None:
            write_statistics(self.args.save_stats, made[0].features, comparison.extractor)
        if comparison.reference is None:
            print(json.dumps({"saved": str(self.args.save_stats), "count": made[0].features.count}, indent=1))
            return
        read = {name: value for name, value in asdict(self.options).items() if name != "workers"}
        how = {"recipe": self.args.recipe, "sampling": self.args.sampling, "read": read}
        reference, metrics = comparison.reference, comparison.metrics
        report = vouched(comparison.report(made), samples, reference, self.options, metrics, **how)
        text = json.dumps(report, indent=1, allow_nan=False)
        if self.args.out is not None:
            write_atomically(self.args.out, text + "\n")
        print(text)
        print_table(report)


def _is_override(word: str) -> bool:
    return OVERRIDE.match(word) is not None and not Path(word).exists()
