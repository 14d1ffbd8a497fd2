"""A language model's run folder, opened to be used: its experiment, network and tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dit_moe import checkpoint, config
from dit_moe.config import ConfigError, Tree, section
from dit_moe.experiments.image import identified, is_text
from dit_moe.experiments.text import TextExperiment, open_tokens, text_experiment
from dit_moe.models import LM, MODELS
from dit_moe.moe.compute_budget import turn
from dit_moe.text.compute_budget import read_some
from dit_moe.text.tokenizer import TextTokenizer, TokenizerConfig, open_tokenizer

TOKENIZER = "tokenizer"  # folder of a run that holds it


@dataclass
class TextRun:
    """What a checkpoint holds, built and loaded."""

    folder: Path
    step: int
    sha256: str  # of the weights' file
    experiment: TextExperiment
    model: LM
    tokenizer: TextTokenizer
    trained: Tree  # `TokenManifest.origin` of the tokens it was trained on


def open_text_run(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    scoring: bool = False,
    experiment: TextExperiment | None = None,
    device: str | torch.device = "cpu",
) -> TextRun:
    """Open the newest checkpoint of a run folder, or a checkpoint folder.

    Args:
        path: the folder.
        overrides: ``key=value`` changes to the section ``sample``, whose name may stand before them.
        scoring: take changes to ``eval`` and ``data.heldout``, too, written in full.
        experiment: what the run was started with last, in place of the checkpoint's own and of changes to that.
        device: where the network goes.

    Raises ValueError if there is no such run, if a file of it is damaged, or for a mistake in the overrides.
    """
    opened = checkpoint.open_checkpoint(path)
    whole = ("sample.", "eval.", "data.heldout=") if scoring else ("sample.",)
    changes = [each if each.startswith(whole) else f"sample.{each}" for each in overrides]
    experiment = experiment or text_experiment(config.override(opened.config(), changes))
    weights = experiment.sample.weights
    model = MODELS.build(experiment.model)
    checkpoint.load_into(model, opened.weights(weights), opened.folder)
    _turn(model.to(device).eval(), experiment)
    return TextRun(
        folder=opened.folder,
        step=opened.step,
        sha256=opened.state["files"][f"{weights}.safetensors"]["sha256"],
        experiment=experiment,
        model=model,
        tokenizer=run_tokenizer(opened),
        trained=opened.state["trained_on"],
    )


def _turn(model: LM, experiment: TextExperiment) -> None:
    """Let the model use as many experts as the section `sample` says, solved on tokens that it was trained on.

    ConfigError if they are needed and not there.
    """
    sample = experiment.sample
    if sample.target is not None:
        try:
            dataset = open_tokens(experiment)
            identified(experiment.data, dataset)
        except ValueError as error:
            problem = f" is solved on the tokens that were trained on: {error}; bring them back, or set sample.p"
            raise ConfigError("sample.target", problem) from None
    dial = turn(sample, model, lambda dial: read_some(model, dataset, dial, sample.precision))
    if dial is not None:
        dial.keep()


def run_tokenizer(opened: checkpoint.Checkpoint) -> TextTokenizer:
    """The tokenizer that lies in the run folder. ValueError if it is gone, or another one."""
    folder = opened.folder.absolute().parent.parent / TOKENIZER
    if not folder.is_dir():
        raise ValueError(f"{folder} is missing; restore it from a copy, or from the folder of tokens trained on")
    with section("tokenizer"):
        return open_tokenizer(TokenizerConfig(**opened.state["tokenizer"]), folder)


def is_text_run(path: str | Path) -> bool:
    """Whether a run folder or checkpoint folder is a language model's."""
    return is_text(checkpoint.open_checkpoint(path).config())
