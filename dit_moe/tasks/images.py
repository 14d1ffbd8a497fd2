"""Training a model of images."""

from __future__ import annotations

import sys
from pathlib import Path

from torch import Tensor, nn

from dit_moe import checkpoint, config
from dit_moe.autoencoders import FIRST_STAGES, FirstStage
from dit_moe.autoencoders.resolve import require_same_space
from dit_moe.data import Dataset
from dit_moe.diffusion import OBJECTIVES, SamplingError
from dit_moe.distributed import join_processes
from dit_moe.evaluation.during_training import LightEvaluation
from dit_moe.experiments.image import Experiment
from dit_moe.pictures import save_grid
from dit_moe.randomness import BatchRandom
from dit_moe.sampling.generator import Generator, choose_labels
from dit_moe.sampling.sharing import generate_together
from dit_moe.tasks.parts import TrainingParts
from dit_moe.training import Hook, Unit


def image_parts(
    experiment: Experiment, dataset: Dataset, folder: Path, earlier: checkpoint.Checkpoint | None
) -> TrainingParts:
    """For a run in `folder` that goes on, or starts, from `earlier`. ValueError if that was of other latents."""
    if earlier is not None:
        before: Experiment = config.build(Experiment, earlier.config())
        require_same_space(before.first_stage, experiment.first_stage, "first_stage", f"the run in {earlier.folder}")
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
        unit=Unit("images"),
    )
