"""Text from a language model's run: what `dit-moe sample` does with one."""

from __future__ import annotations

import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dit_moe import config
from dit_moe.distributed import join_processes
from dit_moe.experiments.text_run import TextRun
from dit_moe.files import write_atomically
from dit_moe.interop.generation import generate_text
from dit_moe.locks import exclusive
from dit_moe.moe import measure_active
from dit_moe.moe.compute_budget import thresholds
from dit_moe.sampling.outputs import FACTS, require_own_samples

RULE = "–" * 72


def write_texts(run: TextRun) -> list[str]:
    """What the run writes behind each prompt of its section ``sample``, by the settings there."""
    sample = run.experiment.sample
    return generate_text(
        run,
        sample.prompts,
        max_new_tokens=sample.max_new_tokens,
        temperature=sample.temperature,
        top_k=sample.top_k,
        top_p=sample.top_p,
        seed=sample.seed,
    )


def page(run: TextRun, texts: list[str]) -> str:
    """Prompts and what follows them, to be read."""
    passages = [prompt + text for prompt, text in zip(run.experiment.sample.prompts, texts, strict=True)]
    return f"\n{RULE}\n".join(passages) + "\n"


def sample_text(run: TextRun, out: Path) -> dict[str, Any] | None:
    """Write texts, print them, and put them with all settings into sample.json in the folder `out`.

    Returns what that holds; None on all processes but the main one, which works alone. Raises ValueError if `out`
    cannot be written, or another command writes there.
    """
    if not join_processes().is_main_process:
        return None
    require_own_samples(out, ())
    with exclusive(out, FACTS):
        return _sample_text(run, out)


def _sample_text(run: TextRun, out: Path) -> dict[str, Any]:
    start = time.perf_counter()
    with measure_active(run.model) as active:
        texts = write_texts(run)
    print(page(run, texts), end="")
    facts = {
        "run": str(run.folder),
        "step": run.step,
        "weights_sha256": run.sha256,
        "experiment": config.dump(run.experiment),
        "texts": texts,
        "active_experts": active.mean,
        "thresholds": thresholds(run.model),
        "device": str(next(run.model.parameters()).device),
        "seconds": time.perf_counter() - start,
        "versions": {name: version(name) for name in ("dit_moe", "torch", "transformers")},
    }
    write_atomically(out / FACTS, json.dumps(facts, indent=1) + "\n")
    return facts
