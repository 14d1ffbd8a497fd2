"""Models of images: diffusion in pixels or latents."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from dit_moe import checkpoint, config
from dit_moe.autoencoders import FIRST_STAGES, FirstStage
from dit_moe.autoencoders.encode import encode
from dit_moe.autoencoders.resolve import require_same_latents
from dit_moe.config import ConfigError, Tree
from dit_moe.costs import forward_flops_at
from dit_moe.data import Dataset
from dit_moe.data.latents import LatentsConfig
from dit_moe.data.manifest import read_manifest
from dit_moe.diffusion import OBJECTIVES, SamplingError
from dit_moe.distributed import join_processes, locked, on_main
from dit_moe.evaluation.comparability import vouched
from dit_moe.evaluation.during_training import LightEvaluation
from dit_moe.evaluation.heldout_loss import HeldoutConfig, heldout_loss
from dit_moe.evaluation.recipes import sampling_recipe
from dit_moe.evaluation.report_table import print_table
from dit_moe.evaluation.runs import compare, how_many, seeds_of, training_images
from dit_moe.evaluation.sources import IMAGES_FILE, open_input
from dit_moe.evaluation.sources.base import ReadOptions
from dit_moe.experiments.image import Experiment, image_experiment, open_data, open_split, resolve, resolve_model
from dit_moe.experiments.run import ImageRun, open_image_run
from dit_moe.files import write_atomically
from dit_moe.pictures import save_grid
from dit_moe.randomness import BatchRandom
from dit_moe.sampling.generator import Generator, choose_labels
from dit_moe.sampling.outputs import DEFAULT, FACTS, OUTPUTS, Take, open_outputs, parse_names, require_possible
from dit_moe.sampling.sharing import generate_together, stream_together
from dit_moe.tasks import HeldoutResult, Report, Task, TrainingParts
from dit_moe.training import Hook, Unit


class ImageTask:
    """See `Task`."""

    kind = unit = "images"
    sample_files: tuple[str, ...] = ("grid.png", IMAGES_FILE, FACTS)

    # ------------------------------------------------------------------------------------------- the config, the data

    def experiment(self, tree: Tree) -> Experiment:
        return image_experiment(tree)

    def make_data(self, experiment: Experiment, *, skip_broken: bool = False) -> None:
        if isinstance(experiment.data, LatentsConfig):
            encode(experiment, skip_broken=skip_broken)

    def make_missing_data(self, experiment: Experiment) -> None:
        if isinstance(experiment.data, LatentsConfig) and experiment.encode is not None:
            for split, folder in (("train", experiment.data.path), ("heldout", experiment.data.heldout)):
                if folder is not None and not _is_encoded(folder):
                    encode(experiment, split)

    def open_data(self, experiment: Experiment, split: str = "train") -> Dataset:
        return open_data(experiment.data, split)

    def heldout_fingerprint(self, experiment: Experiment) -> str | None:
        return self.open_data(experiment, "heldout").fingerprint

    def resolve(self, experiment: Experiment, dataset: Dataset) -> Experiment:
        return resolve(experiment, dataset)

    def resolve_without_data(self, experiment: Experiment) -> Experiment:
        return resolve_model(experiment)

    # ----------------------------------------------------------------------------------------------------- the training

    def training_parts(
        self, experiment: Experiment, dataset: Dataset, folder: Path, earlier: checkpoint.Checkpoint | None
    ) -> TrainingParts:
        if earlier is not None:
            before: Experiment = config.build(Experiment, earlier.config())
            require_same_latents(
                before.first_stage, experiment.first_stage, "first_stage", f"the run in {earlier.folder}"
            )
        class_counts = dataset.class_counts()
        objective = OBJECTIVES.build(experiment.objective, num_classes=experiment.model.num_classes)
        stage: FirstStage = FIRST_STAGES.build(experiment.first_stage).to(join_processes().device)

        def prepare_batch(rows: dict[str, Tensor], random: BatchRandom) -> dict[str, Tensor]:
            moments = stage.moments_of(rows)
            return {"latents": moments.sample(lambda like: random.normal(*like.shape[1:])), "labels": rows["labels"]}

        def save_samples(step: int, network: nn.Module) -> None:
            shape = (experiment.model.in_channels, experiment.model.input_size, experiment.model.input_size)
            labels = choose_labels(experiment.sample, experiment.model.num_classes, class_counts)
            try:
                made = generate_together(Generator(network, objective, stage, experiment.sample, shape), labels)
                if made is not None:
                    (folder / "samples").mkdir(exist_ok=True)
                    save_grid(made.images, made.labels, folder / "samples" / f"step_{step:08d}.png")
            except (ValueError, SamplingError) as error:  # a preview is not worth a run
                if join_processes().is_main_process:
                    print(f"warning: no samples at step {step}: {error}", file=sys.stderr)

        hooks = []
        if experiment.train.sample_every or experiment.eval.light_every:
            stage.load()  # rather than after the first so many steps
        if every := experiment.train.sample_every:
            hooks.append(Hook(every=every, call=save_samples))
        if every := experiment.eval.light_every:
            judge = LightEvaluation(experiment, objective, stage, class_counts)
            hooks.append(Hook(every=every, call=judge, measures=True))
        return TrainingParts(
            objective=objective,
            prepare_batch=prepare_batch,
            facts={"class_names": dataset.class_names, "class_counts": class_counts},
            hooks=hooks,
            unit=Unit(self.unit),
        )

    def objective_name(self, experiment: Experiment) -> str:
        return OBJECTIVES.name_of(experiment.objective)

    # --------------------------------------------------------------------------------------------------- a trained run

    def open_run(
        self, path: str | Path, overrides: Sequence[str] = (), *, experiment: Experiment | None = None
    ) -> ImageRun:
        device = join_processes().device
        if experiment is None:
            return open_image_run(path, overrides, device=device)
        run = open_image_run(path, overrides, sample=experiment.sample, device=device)
        own = replace(run.experiment, data=experiment.data, eval=experiment.eval)
        return replace(run, experiment=own)

    def sample(
        self,
        path: Path,
        overrides: Sequence[str] = (),
        *,
        out: Path | None = None,
        save: str | None = None,
        recipe: str | None = None,
        prompts: Sequence[str] | None = None,
    ) -> Report | None:
        if prompts is not None:
            raise ConfigError("--prompt", f": {path} makes images; leave it out")
        kinds = DEFAULT if save is None else parse_names(save)
        label = None
        if recipe is not None:
            trained = checkpoint.open_checkpoint(path).config()["objective"]["name"]
            chosen = sampling_recipe(recipe, trained)
            overrides, label = [*chosen.overrides, *overrides], chosen.label(overrides)
        run = self.open_run(path, overrides)
        return sample_images(run, out or run.folder.parent.parent, kinds, label)

    def require_heldout(self, experiment: Experiment) -> None:
        self.open_data(experiment, "heldout")

    def open_split(self, run: ImageRun, split: str | None) -> tuple[Dataset, str]:
        return open_split(run.experiment.data, split)

    def heldout_loss(self, run: ImageRun, config: HeldoutConfig) -> HeldoutResult:
        dataset = self.open_data(run.experiment, "heldout")
        found = heldout_loss(run.model, run.objective, run.stage, dataset, config)
        return HeldoutResult(
            loss=found.loss,
            terms=found.terms,
            active=found.active,
            active_by_layer=[layer.mean for layer in found.layers] or None,
            flops=forward_flops_at(run.experiment.model, found.active),
        )

    # ------------------------------------------------------------------------------------------------- the quick start

    def check_quickstart(self, experiment: Experiment, *, skip_broken: bool = False) -> None:
        if isinstance(experiment.images, LatentsConfig):
            wanted = "results are compared with the images that were encoded; say which, in encode.images"
            raise ConfigError("encode", f" is missing; {wanted}")

    def evaluation(self, experiment: Experiment, dataset: Dataset) -> Callable[[Path], Report | None]:
        reference = training_images(experiment)
        count = how_many(experiment, reference)
        comparison = compare(experiment, reference)
        comparison.check()
        comparison.prepare()

        def evaluate(folder: Path) -> Report | None:
            samples = []
            for seed, settings in enumerate(seeds_of(experiment.sample, count, experiment.eval.seeds)):
                out = folder if seed == 0 else folder / "samples" / f"seed_{settings.seed}"
                run = open_image_run(folder, sample=settings, device=join_processes().device)
                sample_images(run, out)
                samples.append(out / IMAGES_FILE)
            opened = [open_input(str(path), ReadOptions()) for path in samples]
            report = comparison.judge(opened)
            return report and vouched(report, opened, reference, ReadOptions(), comparison.metrics)

        return evaluate

    def print_report(self, report: Report) -> None:
        print_table(report)


def sample_images(run: ImageRun, out: Path, save: Sequence[str] = DEFAULT, recipe: str | None = None) -> Report | None:
    """Sample by the run's section `sample` into the folder `out`, in the ways `save` names (see `outputs`).

    `recipe` is what the result calls its settings. Returns what sample.json holds, which is written last; None on all
    but the main process. Raises ValueError if `out` cannot be written, or another command writes there.
    """
    on_main(lambda: require_possible(out, save))
    with locked(out, FACTS, *(OUTPUTS[name][0] for name in save)):
        return _sample_images(run, out, save, recipe)


def _sample_images(run: ImageRun, out: Path, save: Sequence[str], recipe: str | None) -> Report | None:
    labels_N = run.labels()
    start = time.perf_counter()
    generator = run.generator()
    takers: list[Take] = []  # one, on the main process
    with ExitStack() as stack, _progress(generator, len(labels_N)) as on_step:
        on_main(lambda: takers.append(stack.enter_context(open_outputs(out, save, labels_N))))
        active_experts = stream_together(generator, labels_N, lambda images: takers[0](images), on_step)
    if not join_processes().is_main_process:
        return None
    footprint = run.experiment.model.footprint()
    facts = {
        "run": str(run.folder),
        "step": run.step,
        "weights_sha256": run.sha256,
        "experiment": config.dump(run.experiment),
        "recipe": recipe,
        "parameters": footprint.total_params,
        "active_parameters": footprint.active_params,
        "files": [OUTPUTS[name][0] for name in save],
        "evaluations": generator.evaluations(),
        "active_experts": active_experts,
        "thresholds": generator.thresholds,
        "device": str(generator.device),
        "processes": join_processes().num_processes,
        "seconds": time.perf_counter() - start,
        "versions": {name: version(name) for name in ("dit_moe", "torch", "diffusers")},
    }
    write_atomically(out / FACTS, json.dumps(facts, indent=1) + "\n")
    return facts


@contextmanager
def _progress(generator: Generator, count: int) -> Iterator[Callable[..., None]]:
    """A bar on the main process's terminal, for its own share; yields what to call after every step."""
    state, console = join_processes(), Console(stderr=True)
    columns = (TextColumn("sampling"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    shown = state.is_main_process and console.is_terminal
    with Progress(*columns, console=console, disable=not shown, transient=True) as progress:
        batches = math.ceil(count / state.num_processes / generator.config.batch_size)
        bar = progress.add_task("", total=batches * generator.sampler.steps)
        yield lambda step, steps: progress.advance(bar)


def _is_encoded(folder: str) -> bool:
    """To the end: images and autoencoder are then not needed any more."""
    try:
        read_manifest(folder)
    except ValueError:
        return False  # `encode` mends it, or says what is wrong
    return True


TASK: Task = ImageTask()
