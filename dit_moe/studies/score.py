"""What a trained run of a study is scored by: the held-out loss, experts and FLOPs, and a metric."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch

from dit_moe.config import ConfigError
from dit_moe.costs import forward_flops_at
from dit_moe.distributed import join_processes
from dit_moe.evaluation.features import ExtractedFeatures
from dit_moe.evaluation.heldout_loss import heldout_loss
from dit_moe.evaluation.report import evaluate
from dit_moe.evaluation.runs import compare, how_many, reconstructed, run_source, seeds_of, training_images
from dit_moe.evaluation.sources.base import EvaluationInput
from dit_moe.experiments.evaluation import EvalConfig
from dit_moe.experiments.image import open_data
from dit_moe.experiments.run import open_image_run, open_text_run
from dit_moe.experiments.text import TextExperiment, open_tokens
from dit_moe.extractors import EXTRACTORS, FeatureExtractor
from dit_moe.metrics import FeatureSet, configs_of
from dit_moe.studies.plan import PlannedRun, loss_identity, metric_identity
from dit_moe.studies.provenance import provenance
from dit_moe.studies.study import Study
from dit_moe.tasks import AnyExperiment

TEXT_METRICS = {"bits_per_byte": "bits per byte", "perplexity": "perplexity"}  # what `dit-moe perplexity` reports
LABELS = {  # how people call numbers of a report
    "fd_digits_cnn64.ratio": "Fréchet distance ÷ held-out digits'",
    "fd_digits_cnn64.generated": "Fréchet distance, digits CNN",
    "fid.generated": "FID",
}

# ---------------------------------------------------------------------------------------------- before the training


def check_config(study: Study, experiment: AnyExperiment) -> None:
    """ConfigError for what a config alone tells cannot be scored: its data may yet have to be made."""
    if experiment.sample.asked is not None:
        field, value = experiment.sample.asked
        remedy = "a study compares runs as they were trained; drop it, or see dit-moe dial"
        raise ConfigError(f"sample.{field}", f"={value}: {remedy}")
    if isinstance(experiment, TextExperiment):
        if study.metric not in (None, *TEXT_METRICS):
            raise ConfigError("metric", f"={study.metric} is none of a language model's: {', '.join(TEXT_METRICS)}")
        if experiment.data.heldout is None:
            raise ConfigError("data.heldout", " is missing; name a folder for the tokens of held-out text")
    elif study.metric is not None:
        _require_number(study.metric, experiment.eval, heldout=True, decoded=True)


def check_scoring(study: Study, run: PlannedRun) -> None:
    """ValueError, before the training, for what could not be scored after it."""
    experiment = run.experiment
    check_config(study, experiment)
    if isinstance(experiment, TextExperiment):
        from dit_moe.experiments.text import open_heldout

        tokens = open_tokens(experiment)
        open_heldout(experiment, tokens.tokenizer(), tokens.manifest.origin)
        return
    try:
        open_data(experiment.data, "heldout")
    except ValueError as error:
        raise ValueError(f"a study needs held-out images, and variant {run.variant.name} has none: {error}") from None
    if study.metric is not None:
        reference = training_images(experiment)
        how_many(experiment, reference)
        compare(experiment, reference).check()
        decoded = reconstructed(experiment, reference) is not None
        _require_number(study.metric, experiment.eval, heldout=reference.heldout is not None, decoded=decoded)


def _require_number(name: str, config: EvalConfig, *, heldout: bool, decoded: bool) -> None:
    """ConfigError unless the evaluation by `config` will report a number of that name."""
    known = _numbers_to_come(config, heldout, decoded)
    if known and name not in known:
        raise ConfigError("metric", f"={name} is no number of the evaluation's report; it has {', '.join(known)}")


@lru_cache
def _numbers_to_come(config: EvalConfig, heldout: bool, decoded: bool) -> list[str]:
    """The names in a report, read off one of noise; none where options do not suit so few rows.

    Args:
        heldout, decoded: whether there will be held-out images, and these once an autoencoder has had them.
    """
    extractor: FeatureExtractor = EXTRACTORS.build(config.extractor)
    metrics = configs_of(extractor.metrics) if config.metrics is None else config.metrics
    sides = [_noise(seed, extractor) for seed in range(4)]
    try:
        report = evaluate(
            sides[:1],
            sides[1],
            extractor,
            metrics,
            heldout=sides[2] if heldout else None,
            reconstructed=sides[3] if decoded else None,
        )
    except ValueError:
        return []
    return numbers_of(report)


def _noise(seed: int, extractor: FeatureExtractor) -> ExtractedFeatures:
    """Features of 64 images that there are not."""
    random = torch.Generator().manual_seed(seed)
    rows, classes = torch.randn(64, 8, generator=random), torch.randint(8, (64,), generator=random)
    features = FeatureSet(
        "noise",
        len(rows),
        features_ND=rows,
        spatial_NS=rows if extractor.has_spatial else None,
        logits_NK=rows if extractor.has_logits else None,
        predictions_N=None if extractor.classes is None else classes,
        labels_N=classes,
        thumbnails_NP=(rows * 10 + 128).to(torch.uint8),
    )
    return ExtractedFeatures(features, {}, {})


def numbers_of(report: dict[str, Any], above: Sequence[str] = ()) -> list[str]:
    """The dotted names of a report's numbers, its provenance left out."""
    names = []
    for key, value in report.items():
        if isinstance(value, dict) and key != "provenance":
            names += numbers_of(value, (*above, key))
        elif isinstance(value, int | float):
            names.append(".".join((*above, key)))
    return names


# ----------------------------------------------------------------------------------------------- after the training


def score_loss(study: Study, run: PlannedRun) -> dict[str, Any]:
    """Of a trained run: held-out loss, experts, FLOPs, and what measured them; its metric is yet to come."""
    text = isinstance(run.experiment, TextExperiment)
    found = _loss_of_text(run) if text else _loss_of_images(study, run)
    return {"identity": loss_identity(study, run), "made": provenance(run.precision())} | found | {"metric": None}


def _loss_of_images(study: Study, run: PlannedRun) -> dict[str, Any]:
    experiment: Any = run.experiment
    opened = open_image_run(run.folder, sample=experiment.sample, device=join_processes().device)
    dataset = open_data(experiment.data, "heldout")
    found = heldout_loss(opened.model, opened.objective, opened.stage, dataset, study.heldout)
    return {
        "step": opened.step,
        "loss": found.loss,
        "terms": found.terms,
        "active": found.active,
        "active_layers": [layer.mean for layer in found.layers] or None,
        "flops": forward_flops_at(opened.experiment.model, found.active),
    }


def _loss_of_text(run: PlannedRun) -> dict[str, Any]:
    from dit_moe.evaluation.text import heldout_text, perplexity  # and with it transformers

    experiment: Any = run.experiment
    opened = open_text_run(run.folder, experiment=experiment, device=join_processes().device)
    report = perplexity(opened, heldout_text(opened))
    return {
        "step": opened.step,
        "loss": report["loss"],
        "terms": {name: report[name] for name in ("loss", *TEXT_METRICS)},
        "active": report["active_experts"],
        "active_layers": report["active_experts_by_layer"] or None,
        "flops": forward_flops_at(experiment.model, report["active_experts"]) / experiment.model.tokens,
    }


def score_metric(study: Study, run: PlannedRun, score: dict[str, Any]) -> dict[str, Any]:
    """`score` with the study's metric. Complete on the main process."""
    name = study.metric
    assert name is not None
    if isinstance(run.experiment, TextExperiment):
        found = {"label": TEXT_METRICS[name], "better": "lower", "value": score["terms"][name]}
    else:
        found = _metric_of_images(name, run)
    return score | {"metric": {"identity": metric_identity(study, run), "name": name} | found}


def _metric_of_images(name: str, run: PlannedRun) -> dict[str, Any]:
    experiment: Any = run.experiment
    opened = open_image_run(run.folder, sample=experiment.sample, device=join_processes().device)
    opened = replace(opened, experiment=replace(opened.experiment, eval=experiment.eval))
    reference = training_images(experiment)
    settings = seeds_of(experiment.sample, how_many(experiment, reference), experiment.eval.seeds)
    samples = [EvaluationInput(source=run_source(opened, each)) for each in settings]
    report = compare(experiment, reference).judge(samples)
    if report is None:
        return {}  # not the main process
    found: Any = report
    for key in name.split("."):
        found = found.get(key) if isinstance(found, dict) else None
    if not isinstance(found, int | float):
        known = ", ".join(numbers_of(report))
        raise ConfigError("metric", f"={name} is no number of the evaluation's report; it has {known}")
    better = report["provenance"]["better"].get(name.partition(".")[0])
    return {"label": LABELS.get(name, name), "better": better, "value": found}
