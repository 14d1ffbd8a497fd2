"""The task "text": language models. `Task` says what each of its functions is for."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import Tensor, nn

from dit_moe import checkpoint
from dit_moe.config import ConfigError, WorkFailed, section
from dit_moe.costs import forward_flops_at
from dit_moe.distributed import join_processes
from dit_moe.evaluation.heldout_loss import HeldoutConfig
from dit_moe.evaluation.text import HeldoutTextHook, heldout_text, perplexity
from dit_moe.experiments.image import NOTHING_HELD_OUT
from dit_moe.experiments.run import TOKENIZER, TextRun, note_unfinished, open_text_run, solve_text_budget
from dit_moe.experiments.text import (
    TextExperiment,
    open_heldout,
    open_tokens,
    resolve_text,
    resolve_text_without_data,
    scoring_options,
    text_experiment,
)
from dit_moe.files import write_atomically
from dit_moe.formatting import PlainConsole, rounded, tell
from dit_moe.locks import exclusive
from dit_moe.models import LM
from dit_moe.moe import measure_active
from dit_moe.moe.compute_budget import thresholds
from dit_moe.randomness import BatchRandom
from dit_moe.sampling.outputs import SAMPLE_JSON, require_own_samples
from dit_moe.tasks import HeldoutResult, Report, SampleOptions, TrainingParts
from dit_moe.text.ngram import TrigramModel
from dit_moe.text.objective import NextToken
from dit_moe.text.sequences import TokenSequences, open_shards
from dit_moe.text.splits import tokenize_splits
from dit_moe.text.token_shards import NoTokens, TokenShards
from dit_moe.text.tokenizer import TextTokenizer
from dit_moe.training import Hook, Unit
from dit_moe.training.run_start import is_begun

TERMS = ("loss", "bits_per_byte", "perplexity")  # of the report of `perplexity`
TRIGRAM_BYTES = 2**25  # of training text that the trigram model counts: 32 MiB take it some 2 GiB of memory
RULE = "–" * 72


kind, unit = "text", "tokens"
scored_by = "perplexity"
sample_files: tuple[str, ...] = (SAMPLE_JSON,)

build_experiment = text_experiment
open_data = open_tokens
resolve = resolve_text
resolve_without_data = resolve_text_without_data


def make_data(experiment: TextExperiment, *, skip_broken: bool = False) -> None:
    tokenize_splits(experiment.tokenize, experiment.data)


def make_missing_data(experiment: TextExperiment) -> None:
    if experiment.tokenize is not None:
        make_data(experiment)


def heldout_fingerprint(experiment: TextExperiment) -> str | None:
    return open_shards(experiment.data, "heldout").manifest.fingerprint


def training_parts(
    experiment: TextExperiment, dataset: TokenSequences, folder: Path, earlier: checkpoint.Checkpoint | None
) -> TrainingParts:
    tokenizer = dataset.tokenizer()
    if earlier is not None:
        _require_same_tokenizer(experiment, tokenizer, earlier)

    def prepare_batch(rows: dict[str, Tensor], random: BatchRandom) -> dict[str, Tensor]:
        return rows

    def save_samples(step: int, network: nn.Module) -> None:
        if not join_processes().is_main_process:
            return
        assert isinstance(network, LM)
        trained_on = dataset.manifest.origin
        run = TextRun(folder, step, "", experiment, network, tokenizer, trained_on, home=folder)
        try:
            with _sampled_experts(experiment, network, dataset):
                _, page = _write_texts(run)
            (folder / "samples").mkdir(exist_ok=True)
            write_atomically(folder / "samples" / f"step_{step:08d}.txt", page)
        except (ValueError, WorkFailed) as error:  # a preview is not worth a run
            tell(f"warning: no samples at step {step}: {error}")

    hooks = []
    if every := experiment.train.sample_every:
        hooks.append(Hook(every=every, call=save_samples))
    if every := experiment.eval.light_every:
        heldout = _heldout_loss(experiment, dataset, tokenizer)

        def score(step: int, network: nn.Module) -> dict[str, Any] | None:
            with _sampled_experts(experiment, network, dataset):
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
        unit=Unit(unit, experiment.data.length),
        keep_inputs=lambda: tokenizer.keep(folder / TOKENIZER, replace=is_begun(folder)),
    )


def check_parts(
    experiment: TextExperiment, dataset: TokenSequences | None, start: checkpoint.Checkpoint | None
) -> None:
    if start is not None and dataset is not None:
        _require_same_tokenizer(experiment, dataset.tokenizer(), start)
    if experiment.data.heldout is not None:
        with suppress(NoTokens):  # which may be made after the training
            open_data(experiment, "heldout")


def objective_name(experiment: TextExperiment) -> str:
    return "next token"


def open_run(path: str | Path, overrides: Sequence[str] = (), *, experiment: TextExperiment | None = None) -> TextRun:
    return open_text_run(path, overrides, experiment=experiment, device=join_processes().device)


def sample(path: Path, overrides: Sequence[str], options: SampleOptions) -> Report | None:
    for name in ("save", "recipe"):
        if getattr(options, name) is not None:
            raise ConfigError(f"--{name}", f": {path} is a language model's run; leave it out")
    run = open_run(path, overrides)
    note_unfinished(run, path)
    if options.prompts is not None:
        sample = replace(run.experiment.sample, prompts=tuple(options.prompts))
        run = replace(run, experiment=replace(run.experiment, sample=sample))
    return sample_text(run, options.out or run.home)


def require_heldout(experiment: TextExperiment) -> None:
    tokens = open_data(experiment)
    open_heldout(experiment, tokens.tokenizer(), tokens.manifest.origin)


def open_split(run: TextRun, split: str | None) -> tuple[TokenShards, str]:
    data = run.experiment.data
    if split == "heldout" or (split is None and data.heldout is not None):
        return open_heldout(run.experiment, run.tokenizer, run.trained_on), "heldout"
    with section("data"):
        return open_shards(data, split or "train"), split or NOTHING_HELD_OUT


def heldout_loss(run: TextRun, config: HeldoutConfig) -> HeldoutResult:
    report, model = perplexity(run, heldout_text(run)), run.experiment.model
    return HeldoutResult(
        loss=report["loss"],
        terms={name: report[name] for name in TERMS},
        active=report["active_experts"],
        active_by_layer=report["active_experts_by_layer"] or None,
        flops=forward_flops_at(model, report["active_experts"]) / model.tokens,
    )


def check_quickstart(experiment: TextExperiment, *, skip_broken: bool = False) -> None:
    if skip_broken:
        raise ConfigError("--skip-broken", " is of images, and the config of a language model; leave it out")
    if experiment.tokenize is None:
        raise ConfigError("tokenize", " is missing; say there which text the tokens of `data` are made of")
    if experiment.data.heldout is None:
        raise ConfigError("data.heldout", " is missing; name a folder for the tokens of held-out text")


def without_broken(experiment: TextExperiment) -> TextExperiment:
    return experiment


def describe_evaluation(experiment: TextExperiment) -> str | None:
    return None


def evaluation(experiment: TextExperiment, folder: Path) -> Callable[[], Report | None]:
    require_heldout(experiment)

    def evaluate() -> Report | None:
        run = open_run(folder, experiment=experiment)
        report = perplexity(run, heldout_text(run))
        passage = sample_text(run, folder)
        if passage is None:  # not the main process
            return None
        trigram = TrigramModel(_texts(experiment, run.tokenizer, "train", most=TRIGRAM_BYTES))
        heldout = islice(_texts(experiment, run.tokenizer, "heldout"), experiment.eval.max_documents)
        bits = {
            "model": report["bits_per_byte"],
            "model_std_error": report["bits_per_byte_std_error"],
            "trigram": trigram.score(heldout).bits_per_byte,
        }
        return report | {"bits_per_byte": bits, "heldout_active_experts": report["active_experts"]}

    return evaluate


def print_report(report: Report) -> None:
    bits = report["bits_per_byte"]
    error = bits["model_std_error"]  # None of a single document
    spread = "" if error is None else f" ± {rounded(error, 3)}"
    table = Table(show_header=False)
    table.add_row("held-out bits per byte", f"{bits['model']:.3f}{spread}")
    table.add_row("… of a trigram model of the same text", f"{bits['trigram']:.3f}")
    if reasons := report.get("not_comparable_because"):
        table.caption = f"neither is comparable: {'; '.join(reasons)}"
    PlainConsole(stderr=True).print(table)


def _require_same_tokenizer(
    experiment: TextExperiment, tokenizer: TextTokenizer, earlier: checkpoint.Checkpoint
) -> None:
    before = earlier.state.get("tokenizer", {})
    if before.get("sha256") != tokenizer.config.sha256:
        problem = f"={experiment.data.path} was made with the tokenizer {tokenizer.config.name}"
        remedy = f"the run in {earlier.folder} had {before.get('name', 'none')}; tokenise with that one"
        raise ConfigError("data.path", f"{problem}, {remedy}")


@contextmanager
def _sampled_experts(experiment: TextExperiment, network: nn.Module, dataset: TokenSequences) -> Iterator[None]:
    """While entered, the network uses as many experts as the section `sample` says."""
    assert isinstance(network, LM)
    budget = solve_text_budget(experiment.sample, network, dataset)
    with nullcontext() if budget is None else budget.at():
        yield


def _heldout_loss(experiment: TextExperiment, dataset: TokenSequences, tokenizer: TextTokenizer) -> HeldoutTextHook:
    """On documents from all over the held-out split."""
    heldout = open_heldout(experiment, tokenizer, dataset.manifest.origin)
    documents, count = heldout.manifest.documents, experiment.eval.light_documents
    chosen = islice(heldout.documents(step=max(1, documents // count)), count)
    return HeldoutTextHook(chosen, eos=tokenizer.eos, **scoring_options(experiment))


def _texts(experiment: TextExperiment, tokenizer: TextTokenizer, split: str, most: float = math.inf) -> Iterator[bytes]:
    """The documents of a split, from its tokens: what the model saw. They end when there are `most` bytes."""
    for ids, size in open_shards(experiment.data, split).documents():
        yield tokenizer.decode(ids).encode()
        most -= size
        if most <= 0:
            return


def _write_texts(run: TextRun) -> tuple[list[str], str]:
    """What the run writes behind each prompt of its section ``sample``; and all of it, to be read."""
    from dit_moe.interop.generation import generate_text  # imports transformers, which takes seconds

    texts = generate_text(run)
    passages = [prompt + text for prompt, text in zip(run.experiment.sample.prompts, texts, strict=True)]
    return texts, f"\n{RULE}\n".join(passages) + "\n"


def sample_text(run: TextRun, out: Path) -> Report | None:
    """Write texts, print them, and put them with all settings into sample.json in the folder `out`.

    Returns what that holds; None on all processes but the main one, which works alone. Raises ValueError if `out`
    cannot be written, or another command writes there.
    """
    if not join_processes().is_main_process:
        return None
    require_own_samples(out, ())
    with exclusive(out, SAMPLE_JSON):
        start = time.perf_counter()
        with measure_active(run.model) as active:
            texts, page = _write_texts(run)
        print(page, end="")
        facts = run.facts() | {
            "texts": texts,
            "active_experts": active.mean,
            "thresholds": thresholds(run.model),
            "device": str(next(run.model.parameters()).device),
            "seconds": time.perf_counter() - start,
            "versions": {name: version(name) for name in ("dit_moe", "torch", "transformers")},
        }
        write_atomically(out / SAMPLE_JSON, json.dumps(facts, indent=1) + "\n")
    return facts
