"""`dit-moe eval` as a library call: samples and a reference by name → a report, and the files that were asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dit_moe.distributed import join_processes, on_main
from dit_moe.evaluation.comparability import conditions_of, reasons_not_comparable
from dit_moe.evaluation.comparison import Comparison
from dit_moe.evaluation.features import ExtractedFeatures, FeatureFolder
from dit_moe.evaluation.options import (
    EvalOptions,
    extractor_config,
    features_folder,
    locked_outputs,
    metric_configs,
    read_changes,
    require_outputs,
)
from dit_moe.evaluation.own_extractor import chosen_config, train_missing
from dit_moe.evaluation.recipes import EVALUATION
from dit_moe.evaluation.report import Report
from dit_moe.evaluation.runs import (
    GeneratedSource,
    how_many,
    noise_for,
    reconstructed,
    require_seeds_of_one,
    run_source,
    seeds_of,
    training_images,
    with_heldout_of,
    without_few_heldout,
)
from dit_moe.evaluation.sources import EvaluationInput, converted, open_input, require_there
from dit_moe.evaluation.sources.base import FEATURES_MANIFEST, Source, label_by_name
from dit_moe.evaluation.sources.npz import is_verified_inception, require_extractor, write_statistics
from dit_moe.experiments.image import Experiment
from dit_moe.experiments.run import ImageRun, open_image_run, sampling_changes, trained_objective
from dit_moe.extractors import EXTRACTORS, FeatureExtractor
from dit_moe.extractors.base import StatisticsOnly
from dit_moe.extractors.digits_cnn import DigitsCNNConfig
from dit_moe.extractors.inception import InceptionConfig
from dit_moe.files import write_atomically
from dit_moe.formats import is_weights
from dit_moe.progress import images_bar
from dit_moe.sampling.recipes import SAMPLING, sampling_recipe

OF_DIGITS = re.compile(r"digits(/\w+)?|\{\s*name:\s*digits\b.*")  # names of the digits


def evaluate(
    names: Sequence[str], overrides: Sequence[str], options: EvalOptions
) -> tuple[Report | None, ExtractedFeatures | None]:
    """Evaluate SAMPLES, and last the REFERENCE, by their `names`; write what the options ask for.

    Args:
        names: a run alone is compared with the images that it was trained on.
        overrides: ``key=value`` for the section ``sample`` of runs, and ``eval.key=value`` in place of options.

    Returns the report, None without a reference, and the features of the samples, on the main process; None on the
    others. ValueError for bad input, before anything is written.
    """
    names, overrides, options = read_changes(names, overrides, options)
    evaluation = Evaluation(names, overrides, options)
    with locked_outputs(options):
        evaluation.require_outputs()  # again, as another command may have written there by now
        return evaluation.run()


class Evaluation:
    """What one call of `evaluate` does."""

    def __init__(self, names: Sequence[str], overrides: Sequence[str], options: EvalOptions) -> None:
        self.options, self.read, self.overrides = options, options.read(), sampling_changes(overrides)
        self.recipe = None if options.recipe is None else EVALUATION[options.recipe]
        if not names:
            raise ValueError("nothing to evaluate; name SAMPLES and a REFERENCE")
        for name in names:
            require_there(name)
        alone = len(names) == 1
        self.sample_names = names if alone else names[:-1]
        self.reference_name = None if alone else names[-1]
        self.runs = {name: self._open_run(name) for name in self.sample_names if is_weights(name)}
        self.run_config = next((run.experiment for run in self.runs.values()), None)
        if self.overrides and not self.runs:
            raise ValueError(f"{' '.join(self.overrides)}: only for runs, and {', '.join(names)} is none; drop it")
        reads = [*names, *(run.experiment.eval.reference or "" for run in self.runs.values())]
        self.reads = [name for name in reads if name]
        self.require_outputs()
        for option in ("seeds", "sampling"):
            if getattr(options, option) is not None and not self.runs:
                raise ValueError(f"--{option} is for runs, and {', '.join(self.sample_names)} is none; drop it")
        if alone and not self.runs and options.save_stats is None:
            raise ValueError(f"{names[0]} alone has no REFERENCE; name one behind it, or only --save-stats FILE.npz")

    def require_outputs(self) -> None:
        """ValueError if what is to be written cannot be, or would take the place of something else."""
        on_main(lambda: require_outputs(self.options, self.reads))

    def run(self) -> tuple[Report | None, ExtractedFeatures | None]:
        """All of it."""
        reference = decoded = None
        if self.reference_name is not None:
            reference = self._open(self.reference_name)
        elif self.run_config is not None:
            reference = self._own_reference(self.run_config)
        if reference is not None and self.run_config is not None and self.recipe is None:
            reference = with_heldout_of(self.run_config, reference, self.read)
        samples = self._samples(reference)
        reference = reference and without_few_heldout(reference, samples)
        for one in samples:
            label_by_name(one, reference)
        self._require_one_set(samples)
        self._require_recipe(samples, reference)
        extractor, chosen = self._extractor(samples, reference)
        if self.recipe is not None and not extractor.is_fid:
            self._refuse_recipe([f"the features are those of {extractor.name}, not of the verified Inception"])
        if self.recipe is not None and reference is not None and reference.statistics is not None:
            require_extractor(reference.statistics, extractor)
        if self.reference_name is None and self.run_config and reference is not None and not self.read.changes:
            decoded = reconstructed(self.run_config, reference)
        noise = self._noise(extractor, samples)
        metrics = None if self.run_config is None else self.run_config.eval.metrics
        read = {name: value for name, value in asdict(self.read).items() if name != "workers"}
        sampling = self.options.sampling and SAMPLING[self.options.sampling].label(self.overrides)
        comparison = Comparison(
            reference,
            extractor,
            metric_configs(self.options, chosen, metrics, extractor.is_fid),
            folder=features_folder(self.options),
            reconstructed=decoded,
            noise=noise,
            options=self.read,
            asked={"recipe": self.options.recipe, "sampling": sampling, "read": read},
            statistics=self.options.save_stats is not None,
            allow_few=self.options.allow_few,
            progress=images_bar,
        )
        comparison.check(samples)
        comparison.prepare()
        made = comparison.features(samples, self.options.save_npz)
        if not join_processes().is_main_process:  # they need not wait: there is nothing left for them to do
            return None, None
        if self.options.save_stats is not None:
            write_statistics(self.options.save_stats, made[0].features, extractor)
        if reference is None:
            return None, made[0]
        report = comparison.report(made)
        if self.options.out is not None:
            write_atomically(self.options.out, json.dumps(report.to_json(), indent=1, allow_nan=False) + "\n")
        return report, made[0]

    # --------------------------------------------------------------------------------------------------------- inputs

    def _open_run(self, name: str) -> ImageRun:
        overrides = list(self.overrides)
        if self.recipe is not None:
            overrides.insert(0, f"count={self.recipe.count}")
        if self.options.sampling is not None:
            trained = trained_objective(name)
            overrides = [*sampling_recipe(self.options.sampling, trained, "--sampling").overrides, *overrides]
        return open_image_run(name, overrides, device=join_processes().device)

    def _open(self, name: str) -> EvaluationInput:
        if (Path(name) / FEATURES_MANIFEST).is_file():
            return EvaluationInput(features=self._as_asked(FeatureFolder.open(Path(name))))
        return open_input(name, self.read)

    def _as_asked(self, features: FeatureFolder) -> FeatureFolder:
        """ValueError unless their images were of the size and the channels that options ask for."""
        channels, height, width = features.image_shape
        sides, asked = {height, width}, self.read
        if asked.size is not None and sides != {asked.size}:
            raise ValueError(_refusal(f"--size {asked.size}", features.name, f"{width}×{height} pixels"))
        if asked.channels not in (None, channels):
            found = f"{channels} channel{'s' * (channels != 1)}"
            raise ValueError(_refusal(f"--channels {asked.channels}", features.name, found))
        return features

    def _own_reference(self, experiment: Experiment) -> EvaluationInput:
        try:
            return training_images(experiment, self.read)
        except ValueError as error:
            option = "data.path" if experiment.images is experiment.data else "encode.images.path"
            moved = "" if experiment.eval.reference else f"say where the images are by {option}=FOLDER, or "
            raise ValueError(f"{error}; {moved}name a REFERENCE behind the run") from None

    def _samples(self, reference: EvaluationInput | None) -> list[EvaluationInput]:
        opened: list[EvaluationInput] = []
        for name in self.sample_names:
            run = self.runs.get(name)
            if run is None:
                opened.append(self._open(name))
                continue
            counted = self.options.sampling or self.recipe or any(each.startswith("count=") for each in self.overrides)
            sample, seeds = run.experiment.sample, self.options.seeds
            count = sample.count if counted else how_many(run.experiment, reference or EvaluationInput())
            if seeds is None:
                seeds = 1 if self.recipe else run.experiment.eval.seeds
            opened += [EvaluationInput(source=run_source(run, each)) for each in seeds_of(sample, count, seeds)]
        require_seeds_of_one(opened)
        return [converted(one, self.read) if isinstance(one.source, GeneratedSource) else one for one in opened]

    def _noise(self, extractor: FeatureExtractor, samples: Sequence[EvaluationInput]) -> Source | None:
        """As many images of the noise that a run samples from as it makes; None where there is no need of them."""
        counts = [len(one.source) for one in samples if one.source is not None]
        if self.run_config is None or not counts:
            return None
        return converted(EvaluationInput(source=noise_for(self.run_config, extractor, min(counts))), self.read).source

    def _require_one_set(self, samples: list[EvaluationInput]) -> None:
        for option in ("save_npz", "save_stats"):
            if getattr(self.options, option) is not None and len(samples) > 1:
                problem = f"--{option.replace('_', '-')} takes one set of SAMPLES, and there are {len(samples)}"
                raise ValueError(f"{problem}; name one, for a run with --seeds 1")
        if self.options.save_npz is not None and samples[0].source is None:
            raise ValueError(f"--save-npz needs images, and {self.sample_names[0]} holds none; drop it")

    def _require_recipe(self, samples: list[EvaluationInput], reference: EvaluationInput | None) -> None:
        """ValueError if --recipe cannot hold: before the extractor's weights are looked for."""
        if self.recipe is not None:
            metrics = metric_configs(self.options, InceptionConfig(), None) or ()
            found = conditions_of(samples, reference or EvaluationInput(), metrics, options=self.read)
            self._refuse_recipe([reason.text for reason in reasons_not_comparable(found, self.recipe)])

    def _refuse_recipe(self, reasons: Sequence[str]) -> None:
        if reasons:
            problem = f"--recipe {self.options.recipe} does not hold: {'; '.join(reasons)}"
            raise ValueError(f"{problem}; correct it, or drop --recipe")

    def _extractor(
        self, samples: list[EvaluationInput], reference: EvaluationInput | None
    ) -> tuple[FeatureExtractor, Any]:
        """The extractor, and its config; None for the space that statistics name, where there is nothing else.

        A run's own network that is missing is trained, once nothing that is known by then speaks against it.
        """
        options, sides = self.options, [*samples, *([] if reference is None else [reference])]
        asked = options.extractor or options.weights or options.any_weights or self.recipe
        files = [one.statistics for one in sides if one.source is None and one.statistics is not None]
        if len(files) < len(sides) or asked:
            default = self.run_config and self.run_config.eval.extractor
            chosen = extractor_config(options, default, lambda: self._default_extractor(sides))
            if (run := next(iter(self.runs.values()), None)) is not None:
                chosen = chosen_config(chosen, run.home)
                metrics = metric_configs(options, chosen, run.experiment.eval.metrics)
                train_missing(
                    chosen,
                    run.experiment,
                    run.home,
                    check=lambda space: Comparison(reference, space, metrics).check(samples),
                )
            return EXTRACTORS.build(chosen).to(join_processes().device), chosen
        named = [one.extractor for one in files if one.extractor is not None]
        if any(each != named[0] for each in named):
            names = " and ".join(f"{one.source} ({one.extractor['name']})" for one in files if one.extractor)
            raise ValueError(
                f"{names} are of different extractors, or weights; make them again with one by --save-stats"
            )
        first, width = named[0] if named else None, len(files[0].moments.mean_D)
        spatial = all(one.spatial_moments is not None for one in files)
        return StatisticsOnly(first, width, is_verified_inception(first, width), spatial), None

    def _default_extractor(self, sides: list[EvaluationInput]) -> Any:
        """What suits a run, or made features that were kept; the digits' own, or else the Inception."""
        if self.options.weights or self.options.any_weights:
            return InceptionConfig()
        if (run := next(iter(self.runs.values()), None)) is not None:
            return chosen_config(None, run.home)
        kept = [one.features.manifest for one in sides if one.features is not None]
        if kept and kept[0].extractor["name"] in EXTRACTORS.names():
            return EXTRACTORS.config_class(kept[0].extractor["name"])()
        names = [*self.sample_names, *([] if self.reference_name is None else [self.reference_name])]
        return DigitsCNNConfig() if any(map(OF_DIGITS.fullmatch, names)) else InceptionConfig()


def _refusal(option: str, name: str, found: str) -> str:
    problem = f"{name} holds features that were made of images of {found}, which {option} cannot change any more"
    return f"{problem}; name the images, or drop {option}"
