"""dit_moe in Python: train a config or open a run, then sample from it and evaluate it, as the commands do.

    import dit_moe

    model = dit_moe.train("digits", {"train.steps": 300}, run="runs/digits")  # or dit_moe.load("runs/digits")
    images = model.sample("7", n=16, seed=0, guidance=2.0)
    report = model.evaluate(n=450, seeds=1)

Errors are ValueErrors with the messages of the commands, and progress is shown on stderr.
"""

# N images, C channels, H height, W width

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dit_moe import config
from dit_moe.config import Tree, section
from dit_moe.distributed import join_processes
from dit_moe.downloads import fetch_repository, may_be_repository
from dit_moe.evaluation.evaluate import evaluate
from dit_moe.evaluation.options import EvalOptions
from dit_moe.evaluation.report import Report
from dit_moe.evaluation.text import heldout_text, perplexity
from dit_moe.experiments import own_images
from dit_moe.experiments.image import Experiment, resolve_sampling
from dit_moe.experiments.run import WRITTEN_IN_FULL, ImageRun, TextRun, open_image_run, open_text_run
from dit_moe.experiments.text import TextExperiment, TextSampleConfig
from dit_moe.models import LM, DiT
from dit_moe.pictures import picture
from dit_moe.sampling.generator import SampleConfig
from dit_moe.sampling.labels import plain_labels
from dit_moe.tasks import task_of
from dit_moe.tasks.images import sampling_bar
from dit_moe.tasks.train import prepare, run_folder
from dit_moe.tasks.train import train as train_into
from dit_moe.training.log import read_log

Labels = str | int | Iterable[str | int]


def load(path: str | Path, changes: Mapping[str, Any] | None = None) -> ImageModel | TextModel:
    """Open a run to sample from it and evaluate it, on the GPU if there is one.

        model = dit_moe.load("DiT-XL-2-256x256.pt", {"first_stage.model": "my/vae", "first_stage.tiling": True})

    Args:
        path: a run folder, of which the newest checkpoint is taken, or a checkpoint folder; a file or folder of weights
            of another suite, whose format can be told (docs/checkpoints.md), or a pipeline's folder; or the name of a
            repository of the Hugging Face Hub that holds one of these, "someone/model".
        changes: as `dit-moe sample` takes them: how it samples unless `sample` is told otherwise, and, with the names
            of their sections, where its autoencoder and its data are.

    Raises ValueError if there is none of these, if a file of it is damaged, or for a mistake in the changes.
    """
    here = Path(path).exists() or Path(path).parent.exists()  # a name beside others was meant to be one of them
    if not here and may_be_repository(str(path)):
        path = fetch_repository(str(path))
    words = tuple(_words(changes or {}))
    run: Any = task_of(path).open_run(path, words)
    return ImageModel(run, words) if isinstance(run, ImageRun) else TextModel(run, words)


def train(
    config: str | Path | Mapping[str, Any],
    changes: Mapping[str, Any] | None = None,
    *,
    run: str | Path | None = None,
    **sections: Any,
) -> ImageModel | TextModel:
    """Train into a run folder, or go on where it stopped, and open what came out.

    Args:
        config: the name of a built-in config ("digits"), a YAML file, or what such a file would hold; or a folder of
            images, one folder per class.
        changes: to the config, by dotted keys: {"train.steps": 300, "model.moe.router": "topk"}.
        run: the run folder; None: runs/<name of the config, or of the folder of images>.
        sections: more changes, ``train={"steps": 300}``; what they do not name stays as it is.

    Raises ValueError for a mistake in the config, before anything is written.
    """
    if run is None and isinstance(config, Mapping):
        raise ValueError("run is missing; name a folder, for instance run='runs/mine', as the config has no name")
    tree = _tree_of(config, {**(changes or {}), **sections})
    named = own_images.run_name(tree)
    tree = own_images.expand(tree)
    experiment, dataset = prepare(task_of(tree).build_experiment(tree))
    if run is None:
        run = run_folder(Path(config)) if named is None else Path("runs", named)  # type: ignore[arg-type]
    folder = Path(run)
    train_into(experiment, dataset, folder)
    return load(folder)


@dataclass(frozen=True, eq=False, repr=False)
class _Model:
    """What models of images and of text have in common."""

    run: Any  # with all that it was opened from
    changes: tuple[str, ...] = ()  # by which it was opened, ``key=value``

    @property
    def step(self) -> int:
        """Optimizer steps it was trained for."""
        return self.run.step

    @property
    def log(self) -> list[dict[str, Any]]:
        """The lines of the run's log, one for each logged step: "step", "loss", "active", "layers", …"""
        return read_log(self.run.home / "log.jsonl")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.run.folder}, step {self.step})"


class ImageModel(_Model):
    """A trained model of images, as `load` opens it."""

    run: ImageRun

    @property
    def model(self) -> DiT:
        """The network: ``model(x_NCHW, t_N, labels_N)`` on its device, in evaluation mode."""
        return self.run.model  # type: ignore[return-value]

    @property
    def config(self) -> Experiment:
        """The whole config that it was trained with, typed: ``model.config.train.lr``."""
        return self.run.experiment

    @property
    def class_names(self) -> list[str] | None:
        """By label; None if the run did not record them."""
        return self.run.class_names

    def sample(
        self,
        labels: Labels | None = None,
        n: int | None = None,
        *,
        seed: int | None = None,
        guidance: float | None = None,
        steps: int | None = None,
        **options: Any,
    ) -> list[Image.Image]:
        """Images, the same as `dit-moe sample` makes with these settings; None takes that of the run's config.

        Args:
            labels: a class by name or number, several to take in turn, or "balanced", "random" or "data".
            n: how many images, at least 1.
            seed: from 0 on; image i depends on the seed, i and its label alone.
            guidance: scale of classifier-free guidance; 1 is none.
            steps: of the sampler, at least 1.
            options: others of the section `sample`: ``sampler="euler"``, ``target=3.0``, ``weights="model"``.

        Returns pictures in mode L or RGB; none on all processes but the main one. Raises ValueError for a setting that
        cannot work, or a class that there is not.
        """
        images_NCHW = self.sample_tensor(labels, n, seed=seed, guidance=guidance, steps=steps, **options)
        return [picture(image) for image in images_NCHW.permute(0, 2, 3, 1).numpy()]

    def sample_tensor(
        self,
        labels: Labels | None = None,
        n: int | None = None,
        *,
        seed: int | None = None,
        guidance: float | None = None,
        steps: int | None = None,
        **options: Any,
    ) -> Tensor:
        """The images of `sample` as a tensor, uint8 [N, C, H, W] on the CPU."""
        run = self._with(_sampling(labels, n, seed, guidance, steps, options))
        labels_N, generator = run.labels(), run.generator()
        with sampling_bar(generator, len(labels_N)) as on_step:
            made = generator.generate(labels_N, on_step)
        return torch.empty((0, *generator.latent_shape), dtype=torch.uint8) if made is None else made.images

    def evaluate(
        self,
        reference: str | Path | None = None,
        n: int | None = None,
        *,
        seeds: int | None = None,
        metrics: Iterable[str] | None = None,
        extractor: str | None = None,
        labels: Labels | None = None,
        guidance: float | None = None,
        steps: int | None = None,
        **options: Any,
    ) -> Report | None:
        """Compare images of the model with real ones, as `dit-moe eval` does.

        Args:
            reference: images, features or statistics, as the command takes them; None: the images it was trained on.
            n: images of each sampling seed, at least 2; None: as many as there are held-out ones.
            seeds: how many sampling seeds; None: as the run's config says.
            metrics: "fd", "kid", "precision_recall", …; None: those that suit the extractor.
            extractor: the feature space; None: that of the run's config.
            labels, guidance, steps, options: how to sample, as in `sample`.

        Returns the report, whose numbers are in ``report.flat()``; None on all processes but the main one. Raises
        ValueError for bad input.
        """
        overrides = [*self.changes, *_words(_sampling(labels, n, None, guidance, steps, options))]
        names = [str(self.run.folder), *([] if reference is None else [str(reference)])]
        asked = ",".join(metrics) if metrics is not None else None
        report, _ = evaluate(names, overrides, EvalOptions(seeds=seeds, metrics=asked, extractor=extractor))
        return report

    def _with(self, changes: Tree) -> ImageRun:
        """The run with these changes to its section `sample`."""
        tree = _tree_of(config.dump(self.config.sample), changes)
        with section("sample"):
            sample = config.build(SampleConfig, tree)
        if sample.weights != self.config.sample.weights:
            places = [each for each in self.changes if each.startswith(WRITTEN_IN_FULL)]
            return open_image_run(self.run.folder, places, sample=sample, device=join_processes().device)
        experiment = replace(self.config, sample=sample)
        sample = resolve_sampling(experiment, self.run.objective, self.class_names)
        return replace(self.run, experiment=replace(experiment, sample=sample))


class TextModel(_Model):
    """A trained language model, as `load` opens it."""

    run: TextRun

    @property
    def model(self) -> LM:
        """The network, on its device, in evaluation mode."""
        return self.run.model

    @property
    def config(self) -> TextExperiment:
        """The whole config that it was trained with, typed."""
        return self.run.experiment

    def sample(
        self, prompts: str | Sequence[str] | None = None, *, seed: int | None = None, **options: Any
    ) -> list[str]:
        """What the model writes after each prompt, the same as `dit-moe sample` does with these settings.

        Args:
            prompts: one or several; "" begins a document, and None takes those of the run's config.
            seed: from 0 on; a text depends on the seed, its place and its prompt.
            options: others of the section `sample`: ``temperature=0.5``, ``max_new_tokens=100``, ``target=3.0``.

        Returns the texts without their prompts. Raises ValueError for a setting that cannot work.
        """
        from dit_moe.interop.generation import generate_text  # imports transformers, which takes seconds

        given = {"prompts": [prompts] if isinstance(prompts, str) else prompts and list(prompts), "seed": seed}
        changes = {key: value for key, value in given.items() if value is not None} | options
        tree = _tree_of(config.dump(self.config.sample), changes)
        with section("sample"):
            sample = config.build(TextSampleConfig, tree)
        experiment = replace(self.config, sample=sample)
        if {"weights", "target", "p"} & changes.keys():  # another network
            return generate_text(open_text_run(self.run.folder, experiment=experiment, device=join_processes().device))
        return generate_text(replace(self.run, experiment=experiment))

    def evaluate(self) -> dict[str, Any]:
        """Loss, bits per byte and perplexity on held-out text, by name, as `dit-moe perplexity` reports them.

        Raises ValueError if there is no held-out text.
        """
        return perplexity(self.run, heldout_text(self.run))


def _tree_of(base: str | Path | Mapping[str, Any], changes: Mapping[str, Any]) -> Tree:
    """A config, of a file or not, with values under dotted keys changed."""
    tree = own_images.read(base) if isinstance(base, str | Path) else _plain(base)
    for key, value in changes.items():
        tree = config.change(tree, key, _plain(value))
    return tree


def _words(changes: Mapping[str, Any]) -> list[str]:
    """Changes as the commands take them: ``key=value``."""
    return [f"{key}={json.dumps(_plain(value), ensure_ascii=False)}" for key, value in changes.items()]


def _plain(value: Any) -> Any:
    """As a YAML file would hold it."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, np.generic):
        return value.item()
    return str(value) if isinstance(value, Path) else value


def _sampling(
    labels: Labels | None,
    n: int | None,
    seed: int | None,
    guidance: float | None,
    steps: int | None,
    options: Mapping[str, Any],
) -> Tree:
    """Changes to the section `sample`, by dotted keys."""
    given = {
        "labels": plain_labels(labels),
        "count": n,
        "seed": seed,
        "guidance.scale": guidance,
        "sampler.steps": steps,
    }
    return {**options, **{key: value for key, value in given.items() if value is not None}}
