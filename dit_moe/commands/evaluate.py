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
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dit_moe import checkpoint
from dit_moe.commands.eval_options import add_eval_arguments, extractor_config, metric_configs, read_options
from dit_moe.commands.judging import (
    how_many,
    reasons_not_comparable,
    reconstructed,
    run_source,
    seeds_of,
    training_images,
)
from dit_moe.commands.progress import images_bar
from dit_moe.commands.report_table import print_table
from dit_moe.evaluation.comparison import Comparison, StatedSpace
from dit_moe.evaluation.extraction import MANIFEST, Extracted
from dit_moe.evaluation.recipes import EVALUATION, sampling_recipe
from dit_moe.evaluation.sources.base import Opened
from dit_moe.evaluation.sources.statistics import write_statistics
from dit_moe.evaluation.sources.words import open_word
from dit_moe.extractors import EXTRACTORS, FeatureExtractor
from dit_moe.extractors.digits_cnn import DigitsCNNConfig
from dit_moe.extractors.inception import InceptionConfig
from dit_moe.files import require_writable, write_atomically
from dit_moe.metrics import METRICS
from dit_moe.processes import join_processes, on_main
from dit_moe.runs import Run, open_run

OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")
FEW = 2048  # images: fewer than features of the Inception network


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `run` reads."""
    parser.add_argument(
        "words", nargs="+", metavar="SAMPLES… REFERENCE", help="see above; the last one is the reference"
    )
    parser.set_defaults(overrides=[])  # `key=value` words, for the section `sample` of runs
    add_eval_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Evaluate, print JSON to stdout and a table to stderr. ValueError for bad input, before anything is written."""
    Evaluation(args).run()


class Evaluation:
    """What one call of the command does."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.options = args, read_options(args)
        words = [word for word in args.words if not _is_override(word)]
        self.overrides = [word for word in args.words if _is_override(word)] + args.overrides
        self.recipe = EVALUATION.get(args.recipe)
        on_main(self._require_places)
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
        if args.save_npz is not None and len(words) - 1 + alone > 1:
            raise ValueError("--save-npz takes one SAMPLES; name one")

    # --------------------------------------------------------------------------------------------------------- inputs

    def _require_places(self) -> None:
        for option in ("out", "save_stats", "save_npz"):
            path = getattr(self.args, option)
            if path is not None:
                _require_place(path, f"--{option.replace('_', '-')}")

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
            seeds = self.args.seeds or (1 if self.recipe else run.experiment.eval.seeds)
            opened += [Opened(source=run_source(run, each)) for each in seeds_of(sample, count, seeds)]
        return opened

    def _extractor(self, samples: list[Opened], reference: Opened | None) -> tuple[FeatureExtractor, Any]:
        default: Any = InceptionConfig()
        if self.runs:
            default = next(iter(self.runs.values())).experiment.eval.extractor
        elif self.reference_word is not None and self.reference_word.partition("/")[0] == "digits":
            default = DigitsCNNConfig()
        chosen = extractor_config(self.args, default)
        sides = [*samples, *([] if reference is None else [reference])]
        stated = [one.statistics for one in sides if one.source is None and one.statistics is not None]
        if len(stated) == len(sides):
            return StatedSpace(stated), chosen
        return EXTRACTORS.build(chosen).to(join_processes().device), chosen

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
        extractor, chosen = self._extractor(samples, reference)
        own = self.reference_word is None and run is not None
        default = run.experiment.eval.metrics if run is not None else None
        metrics = metric_configs(self.args, chosen, default)
        comparison = Comparison(
            reference,
            extractor,
            metrics,
            folder=self.args.features or (self.args.out and self.args.out.with_suffix(".features")),
            reconstructed=reconstructed(run.experiment, reference.heldout) if own and run and reference else None,
            progress=images_bar,
        )
        comparison.check(samples)
        self._require_enough(extractor, [*samples, *([] if reference is None else [reference])])
        reasons = self._comparability(samples, reference, extractor, metrics)
        comparison.prepare()
        made = comparison.features(samples, self.args.save_npz)
        on_main(lambda: self._finish(comparison, made, reasons))

    def _comparability(
        self, samples: list[Opened], reference: Opened | None, extractor: FeatureExtractor, metrics: Any
    ) -> list[str]:
        """Why the result is not comparable to published ones. ValueError if --recipe says that it should be."""
        names = extractor.metrics if metrics is None else [METRICS.name_of(each) for each in metrics]
        reasons = reasons_not_comparable(samples, reference or Opened(), extractor, names, self.options)
        if self.recipe is not None and reasons:
            raise ValueError(
                f"--recipe {self.recipe.name} does not hold: {'; '.join(reasons)}; mend it, or drop --recipe"
            )
        return reasons

    def _require_enough(self, extractor: FeatureExtractor, sides: list[Opened]) -> None:
        counts = [len(one.source) for one in sides if one.source is not None and one.statistics is None]
        if extractor.is_fid and counts and min(counts) < FEW and not self.args.allow_few:
            problem = f"FID of {min(counts)} images is mostly sampling error; published ones are of 50 000"
            raise ValueError(f"{problem}; take at least {FEW}, or say --allow-few")

    def _finish(self, comparison: Comparison, made: list[Extracted], reasons: list[str]) -> None:
        if self.args.save_stats is not None:
            write_statistics(self.args.save_stats, made[0].features, comparison.extractor)
        if self.reference_word is None and not self.runs:
            print(json.dumps({"saved": str(self.args.save_stats), "count": made[0].features.count}, indent=1))
            return
        report = comparison.report(made)
        how = {
            "recipe": self.args.recipe,
            "sampling": self.args.sampling,
            "read": asdict(self.options) | {"workers": None},
        }
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


def _require_place(path: Path, option: str) -> None:
    if not path.parent.is_dir():
        raise ValueError(f"{option} {path}: the folder {path.parent} does not exist; make it first")
    if path.is_dir():
        raise ValueError(f"{option} {path} is a folder; name a file, for instance {path / 'metrics.json'}")
    require_writable(path.parent)
