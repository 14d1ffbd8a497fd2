"""The task "images": diffusion in pixels or latents. `Task` says what each of its functions is for."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from torch import Tensor, nn

from dit_moe import checkpoint, config
from dit_moe.autoencoders import FIRST_STAGES, FirstStage
from dit_moe.autoencoders.latent_space import require_same_latents
from dit_moe.autoencoders.own_copy import keep_autoencoder, with_own_copy
from dit_moe.config import ConfigError
from dit_moe.costs import forward_flops_at
from dit_moe.data import DATASETS, BrokenImages, Dataset, NoSuchSplit
from dit_moe.data.broken_images import broken_images
from dit_moe.data.class_names import readable_names
from dit_moe.data.held_out import names_heldout
from dit_moe.data.image_source import ImageSource
from dit_moe.data.latents import LatentsConfig, NoLatents
from dit_moe.data.listing import are_numbers, facts_of_listing
from dit_moe.data.shares import facts_of_shares
from dit_moe.diffusion import OBJECTIVES, SamplingError
from dit_moe.distributed import join_processes, locked, on_main
from dit_moe.downloads import missing_downloads_told
from dit_moe.evaluation import heldout_loss as heldout
from dit_moe.evaluation import report as evaluation_report
from dit_moe.evaluation.during_training import EvaluationDuringTraining
from dit_moe.evaluation.heldout_loss import HeldoutConfig
from dit_moe.evaluation.own_extractor import describe_choice, is_open
from dit_moe.evaluation.runs import comparison_of, how_many, seeds_of, training_images
from dit_moe.evaluation.sources import IMAGES_FILE, open_input
from dit_moe.evaluation.sources.base import ReadOptions
from dit_moe.experiments import image
from dit_moe.experiments.image import Experiment
from dit_moe.experiments.run import ImageRun, note_unfinished, open_image_run, trained_objective
from dit_moe.extractors import EXTRACTORS
from dit_moe.files import write_atomically
from dit_moe.formatting import tell
from dit_moe.pictures import grid_layout, save_grid
from dit_moe.progress import images_bar
from dit_moe.randomness import BatchRandom
from dit_moe.sampling.generator import Generator, require_means, stream_together
from dit_moe.sampling.labels import choose_labels
from dit_moe.sampling.outputs import (
    DEFAULT,
    OUTPUTS,
    SAMPLE_JSON,
    ImageWriter,
    open_outputs,
    parse_outputs,
    require_writable_outputs,
)
from dit_moe.sampling.recipes import sampling_recipe
from dit_moe.tasks import HeldoutResult, Report, SampleOptions, TrainingParts, latents
from dit_moe.training import Hook, Unit

kind = unit = "images"
scored_by = "eval"
LOOKED_AT = 100_000  # images at most that quickstart decodes before it trains anything
sample_files: tuple[str, ...] = ("grid.png", IMAGES_FILE, SAMPLE_JSON)

build_experiment = image.image_experiment
resolve = image.resolve
resolve_without_data = image.resolve_without_data
make_data = latents.make_data
make_missing_data = latents.make_missing_data


def open_data(experiment: Experiment, split: str = "train") -> Dataset:
    return image.open_data(experiment.data, split)


def heldout_fingerprint(experiment: Experiment) -> str | None:
    return open_data(experiment, "heldout").fingerprint


def training_parts(
    experiment: Experiment, dataset: Dataset, folder: Path, earlier: checkpoint.Checkpoint | None
) -> TrainingParts:
    if earlier is not None:
        _require_same_latents(experiment, earlier)
    class_counts = dataset.class_counts()
    objective = OBJECTIVES.build(experiment.objective, num_classes=experiment.model.num_classes)
    first_stage = with_own_copy(experiment.first_stage, folder)
    stage: FirstStage = FIRST_STAGES.build(first_stage).to(join_processes().device)

    def prepare_batch(rows: dict[str, Tensor], random: BatchRandom) -> dict[str, Tensor]:
        moments = stage.moments_of(rows)
        return {"latents": moments.sample(lambda like: random.normal(*like.shape[1:])), "labels": rows["labels"]}

    def save_samples(step: int, network: nn.Module) -> dict[str, Path] | None:
        shape = (experiment.model.in_channels, experiment.model.input_size, experiment.model.input_size)
        labels = choose_labels(experiment.sample, experiment.model.num_classes, class_counts, dataset.class_names)
        try:
            made = Generator(network, objective, stage, experiment.sample, shape).generate(labels)
            if made is not None:
                (folder / "samples").mkdir(exist_ok=True)
                shown, _ = grid_layout(made.labels)
                names = readable_names(dataset.class_names, experiment.model.num_classes)
                path = folder / "samples" / f"step_{step:08d}.png"
                save_grid(made.images[shown], made.labels, path, names)
                return {"samples": path}
        except (ValueError, SamplingError) as error:  # a preview is not worth a run
            if join_processes().is_main_process:
                tell(f"warning: no samples at step {step}: {error}")
        return None

    hooks = []
    if experiment.train.sample_every or experiment.eval.light_every:
        require_means(experiment.sample, join_processes().device)
        stage.load()  # rather than after the first so many steps
    if every := experiment.train.sample_every:
        hooks.append(Hook(every=every, call=save_samples))
    if every := experiment.eval.light_every:
        evaluate = EvaluationDuringTraining(experiment, objective, stage, class_counts, dataset.class_names, folder)
        hooks.append(Hook(every=every, call=evaluate, measures=True))
    return TrainingParts(
        objective=objective,
        prepare_batch=prepare_batch,
        facts={
            "class_names": dataset.class_names,
            "class_counts": class_counts,
            **facts_of_listing(dataset),
            **facts_of_shares(dataset),
        },
        hooks=hooks,
        unit=Unit(unit),
        keep_inputs=lambda: keep_autoencoder(experiment.first_stage, folder),
    )


def check_parts(experiment: Experiment, dataset: Dataset | None, start: checkpoint.Checkpoint | None) -> None:
    settings = experiment.eval
    if start is not None:
        _require_same_latents(experiment, start)
    if names_heldout(experiment.data) and isinstance(experiment.data.heldout, str):
        with missing_downloads_told(), suppress(NoLatents):  # which may be made after the training
            open_data(experiment, "heldout")
    if settings.reference is not None:
        with missing_downloads_told(), config.section("eval.reference"):
            open_input(settings.reference)
    if dataset is not None and (experiment.train.sample_every or settings.light_every):
        require_means(experiment.sample, join_processes().device)
        with missing_downloads_told():
            FIRST_STAGES.build(experiment.first_stage).load()
    if (
        not is_open(settings.extractor)
        and dataset is not None
        and (settings.light_every or EXTRACTORS.factory(settings.extractor).included)
    ):
        with missing_downloads_told(), config.section("eval.extractor"):
            EXTRACTORS.build(settings.extractor).check(dataset.image_shape)


def _require_same_latents(experiment: Experiment, earlier: checkpoint.Checkpoint) -> None:
    before: Experiment = config.build(Experiment, earlier.config())
    require_same_latents(before.first_stage, experiment.first_stage, "first_stage", f"the run in {earlier.folder}")


def objective_name(experiment: Experiment) -> str:
    return OBJECTIVES.name_of(experiment.objective)


def open_run(path: str | Path, overrides: Sequence[str] = (), *, experiment: Experiment | None = None) -> ImageRun:
    device = join_processes().device
    if experiment is None:
        return open_image_run(path, overrides, device=device)
    run = open_image_run(path, overrides, sample=experiment.sample, device=device)
    own = replace(run.experiment, data=experiment.data, eval=experiment.eval)
    return replace(run, experiment=own)


def sample(path: Path, overrides: Sequence[str], options: SampleOptions) -> Report | None:
    if options.prompts is not None:
        raise ConfigError("--prompt", f": {path} makes images; leave it out")
    kinds = DEFAULT if options.save is None else parse_outputs(options.save)
    label = None
    if options.recipe is not None:
        trained = trained_objective(path)
        chosen = sampling_recipe(options.recipe, trained)
        overrides, label = [*chosen.overrides, *overrides], chosen.label(overrides)
    run = open_run(path, overrides)
    note_unfinished(run, path)
    return sample_images(run, options.out or run.home, kinds, label)


def require_heldout(experiment: Experiment) -> None:
    open_data(experiment, "heldout")


def open_split(run: ImageRun, split: str | None) -> tuple[Dataset, str]:
    dataset, name = image.open_split(run.experiment.data, split)
    _require_same_classes(run, dataset.class_names)
    return dataset, name


def _require_same_classes(run: ImageRun, found: Sequence[str]) -> None:
    """ConfigError unless labels of these classes mean to the network what they meant in training.

    Where one side knows but their numbers, so many are the same.
    """
    count, trained = run.experiment.model.num_classes, run.class_names
    if trained is None or are_numbers(trained) or are_numbers(found):
        trained = list(found)
    other = next((label for label, names in enumerate(zip(found, trained, strict=False)) if len({*names}) > 1), None)
    if other is None and len(found) == count:
        return
    number = f"{len(found)} classes, where the run was trained on {count}"
    problem = number if other is None else f"{found[other]} for class {other}, which was {trained[other]} in training"
    raise ConfigError("data", f" has {problem}; name data with the same class folders")


def heldout_loss(run: ImageRun, config: HeldoutConfig) -> HeldoutResult:
    dataset = open_data(run.experiment, "heldout")
    found = heldout.heldout_loss(run.model, run.objective, run.stage, dataset, config)
    return HeldoutResult(
        loss=found.loss,
        terms=found.terms,
        active=found.active,
        active_by_layer=[layer.mean for layer in found.layers] or None,
        flops=forward_flops_at(run.experiment.model, found.active),
    )


def check_quickstart(experiment: Experiment, *, skip_broken: bool = False) -> None:
    if isinstance(experiment.images, LatentsConfig):
        wanted = "results are compared with the images that were encoded; say which, in encode.images"
        raise ConfigError("encode", f" is missing; {wanted}")
    if skip_broken and not hasattr(experiment.images, "skip_broken"):
        name = DATASETS.name_of(experiment.images)
        raise ConfigError("--skip-broken", f" is of image files, and {name} reads none; leave it out")


def without_broken(experiment: Experiment) -> Experiment:
    images, encode = replace(experiment.images, skip_broken=True), experiment.encode
    if encode is None or experiment.images is experiment.data:
        return replace(experiment, data=images)
    return replace(experiment, encode=replace(encode, images=images))


def _require_unbroken(experiment: Experiment) -> None:
    """BrokenImages, before any network is trained; many images are looked at as they are needed."""
    if experiment.images is not experiment.data:  # encoding looked at all of them
        return
    problems: list[str] = []
    for split in ("train", "heldout", "extractor"):
        with suppress(ConfigError, NoSuchSplit):  # is told where the split is needed
            source = open_data(experiment, split)
            if isinstance(source, ImageSource) and len(source.labels_N) <= LOOKED_AT:
                problems += broken_images(source).values()
    if problems:
        raise BrokenImages(dict(enumerate(problems)))


def describe_evaluation(experiment: Experiment) -> str | None:
    if not is_open(experiment.eval.extractor) or isinstance(experiment.images, LatentsConfig):
        return None
    return f"its images will be compared with real ones in the features of {describe_choice(experiment)}"


def evaluation(experiment: Experiment, folder: Path) -> Callable[[], Report | None]:
    require_means(experiment.sample, join_processes().device)
    on_main(lambda: _require_unbroken(experiment))
    reference = training_images(experiment)
    count = how_many(experiment, reference)
    comparison = comparison_of(experiment, reference, folder, count)
    comparison.check()
    comparison.prepare()

    def evaluate() -> Report | None:
        samples = []
        for seed, settings in enumerate(seeds_of(experiment.sample, count, experiment.eval.seeds)):
            out = folder if seed == 0 else folder / "samples" / f"seed_{settings.seed}"
            run = open_image_run(folder, sample=settings, device=join_processes().device)
            sample_images(run, out, DEFAULT if seed == 0 else ("npz",))
            samples.append(out / IMAGES_FILE)
        opened = [open_input(str(path), ReadOptions()) for path in samples]
        report = comparison.evaluate(opened)
        return None if report is None else report.to_json()

    return evaluate


def print_report(report: Report) -> None:
    evaluation_report.print_report(evaluation_report.Report.from_json(report))


def sample_images(run: ImageRun, out: Path, save: Sequence[str] = DEFAULT, recipe: str | None = None) -> Report | None:
    """Sample by the run's section `sample` into the folder `out`, in the ways `save` names (see `outputs`).

    `recipe` is what the result calls its settings. Returns what sample.json holds, which is written last; None on all
    but the main process. Raises ValueError if `out` cannot be written, or another command writes there.
    """
    require_means(run.experiment.sample, join_processes().device)
    on_main(lambda: require_writable_outputs(out, save))
    with locked(out, SAMPLE_JSON, *(OUTPUTS[name][0] for name in save)):
        return _sample_images(run, out, save, recipe)


def _sample_images(run: ImageRun, out: Path, save: Sequence[str], recipe: str | None) -> Report | None:
    labels_N = run.labels()
    start = time.perf_counter()
    generator = run.generator()
    writers: list[ImageWriter] = []  # one, on the main process
    with ExitStack() as stack, sampling_bar(generator, len(labels_N)) as on_step:
        on_main(lambda: writers.append(stack.enter_context(open_outputs(out, save, labels_N, run.class_names))))
        write: ImageWriter = lambda images: writers[0](images)  # noqa: E731
        active_experts = stream_together(generator, labels_N, write, on_step)
    if not join_processes().is_main_process:
        return None
    shown, _ = grid_layout(labels_N)
    if "grid" in save and len(shown) < len(labels_N):
        tell(f"note: {out / OUTPUTS['grid'][0]} shows {len(shown)} of the {len(labels_N)} images")
    footprint = run.experiment.model.footprint()
    facts = run.facts() | {
        "recipe": recipe,
        "parameters": footprint.total_params,
        "active_parameters": footprint.active_params,
        "files": [OUTPUTS[name][0] for name in save],
        "class_names": run.class_names and {label: run.class_names[label] for label in labels_N.unique().tolist()},
        "evaluations": generator.evaluations(),
        "active_experts": active_experts,
        "thresholds": generator.thresholds,
        "device": str(generator.device),
        "processes": join_processes().num_processes,
        "seconds": time.perf_counter() - start,
        "versions": {name: version(name) for name in ("dit_moe", "torch", "diffusers")},
    }
    write_atomically(out / SAMPLE_JSON, json.dumps(facts, indent=1) + "\n")
    return facts


@contextmanager
def sampling_bar(generator: Generator, count: int) -> Iterator[Callable[..., None]]:
    """Shows how far the sampling of so many images is; yields what to call after each step of a batch."""
    batches = math.ceil(count / join_processes().num_processes / generator.config.batch_size)
    a_step = count / (batches * generator.sampler.config.steps)  # the others are taken to be as quick
    with images_bar("sampling", count) as advance:
        yield lambda *_: advance(a_step)
