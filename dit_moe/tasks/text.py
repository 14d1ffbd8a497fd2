"""Training a language model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dit_moe import checkpoint
from dit_moe.cli.sample_text import page, write_texts
from dit_moe.config import ConfigError
from dit_moe.distributed import join_processes, on_main
from dit_moe.evaluation.text import HeldoutTextHook, open_heldout, scoring_options
from dit_moe.experiments.text import TextExperiment
from dit_moe.experiments.text_run import TOKENIZER, TextRun
from dit_moe.files import require_writable, write_atomically
from dit_moe.models import LM
from dit_moe.moe.compute_budget import turn
from dit_moe.randomness import BatchRandom
from dit_moe.tasks.parts import TrainingParts
from dit_moe.text.compute_budget import read_some
from dit_moe.text.objective import NextToken
from dit_moe.text.sequences import TokenSequences
from dit_moe.text.tokenizer import TextTokenizer
from dit_moe.training import Hook, Unit
from dit_moe.training.run_folder import is_begun


def text_parts(
    experiment: TextExperiment, dataset: TokenSequences, folder: Path, earlier: checkpoint.Checkpoint | None
) -> TrainingParts:
    """For a run in `folder` that goes on, or starts, from `earlier`. ValueError if that had another tokenizer."""
    tokenizer = dataset.tokenizer()
    if earlier is not None:
        before = earlier.state.get("tokenizer", {})
        if before.get("sha256") != tokenizer.config.sha256:
            problem = f"={experiment.data.path} was made with the tokenizer {tokenizer.config.name}"
            remedy = f"the run in {earlier.folder} had {before.get('name', 'none')}; tokenise with that one"
            raise ConfigError("data.path", f"{problem}, {remedy}")
    on_main(lambda: _keep(tokenizer, folder / TOKENIZER))

    def prepare_batch(rows: dict[str, Tensor], random: BatchRandom) -> dict[str, Tensor]:
        return rows

    @contextmanager
    def dialled(network: nn.Module) -> Iterator[None]:
        """While entered, it uses as many experts as the section `sample` says."""
        assert isinstance(network, LM)
        sample = experiment.sample
        dial = turn(sample, network, lambda dial: read_some(network, dataset, dial, sample.precision))
        with nullcontext() if dial is None else dial.at():
            yield

    def save_samples(step: int, network: nn.Module) -> None:
        if not join_processes().is_main_process:
            return
        assert isinstance(network, LM)
        run = TextRun(folder, step, "", experiment, network, tokenizer, trained=dataset.manifest.origin)
        try:
            with dialled(network):
                written = page(run, write_texts(run))
            (folder / "samples").mkdir(exist_ok=True)
            write_atomically(folder / "samples" / f"step_{step:08d}.txt", written)
        except ValueError as error:  # a preview is not worth a run
            print(f"warning: no samples at step {step}: {error}", file=sys.stderr)

    hooks = []
    if every := experiment.train.sample_every:
        hooks.append(Hook(every=every, call=save_samples))
    if every := experiment.eval.light_every:
        heldout = _heldout_loss(experiment, dataset, tokenizer)

        def score(step: int, network: nn.Module) -> dict[str, Any] | None:
            with dialled(network):
                return heldout(step, network)

        hooks.append(Hook(every=every, call=score, measures=True))
    return TrainingParts(
        objective=NextToken(experiment.objective),
        prepare_batch=prepare_batch,
        facts={
            "tokenizer": {"name": tokenizer.config.name, "sha256": tokenizer.config.sha256},
            "trained_on": dataset.manifest.origin,
        },
        hooks=hooks,
        unit=Unit("tokens", experiment.data.length),
    )


def _heldout_loss(experiment: TextExperiment, dataset: TokenSequences, tokenizer: TextTokenizer) -> HeldoutTextHook:
    """On documents from all over the held-out split."""
    heldout = open_heldout(experiment, tokenizer, dataset.manifest.origin)
    documents, count = heldout.manifest.documents, experiment.eval.light_documents
    chosen = islice(heldout.documents(step=max(1, documents // count)), count)
    return HeldoutTextHook(chosen, eos=tokenizer.eos, **scoring_options(experiment))


def _keep(tokenizer: TextTokenizer, folder: Path) -> None:
    """ValueError if `folder` cannot be made, or holds what no run has kept there."""
    require_writable(folder.parent)
    tokenizer.keep(folder, replace=is_begun(folder.parent))
