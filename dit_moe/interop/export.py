"""A run as a folder in the format of the Hugging Face hub: config.json, model.safetensors, tokenizer, provenance."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dit_moe.experiments.run import TextRun
from dit_moe.files import atomic_folder, require_replaceable
from dit_moe.interop.olmoe import to_olmoe
from dit_moe.interop.transformers_lm import DitMoeForCausalLM, DitMoeLMConfig, set_tokens, wrap
from dit_moe.locks import exclusive

PROVENANCE = "dit_moe.json"
CODE = "modeling_dit_moe_lm"  # for programs that have only the folder: they load it with trust_remote_code=True
AUTO_MAP = {"AutoConfig": DitMoeLMConfig.__name__, "AutoModelForCausalLM": DitMoeForCausalLM.__name__}


def export_run(run: TextRun, folder: str | Path, *, olmoe: bool = False) -> dict[str, Any]:
    """Write the run's weights, EMA or raw as its section `sample` says, and its tokenizer into a new folder.

    Args:
        olmoe: as an OlmoeForCausalLM, which needs none of our code; for top-k routers only.

    Returns what the folder's dit_moe.json holds. ValueError if the folder is not empty or cannot be written, if another
    process writes it, or if the model cannot be an OLMoE.
    """
    folder, tokenizer = Path(folder), run.tokenizer
    require_replaceable(folder)
    model: Any
    if olmoe:
        model = to_olmoe(run.model)
        set_tokens(model, tokenizer)
    else:
        model = wrap(run.model, tokenizer)
        model.config.auto_map = {auto: f"{CODE}.{name}" for auto, name in AUTO_MAP.items()}
    tokenizer.hf.model_max_length = run.model.config.max_length
    facts = run.facts() | {
        "weights": run.experiment.sample.weights,
        "versions": {name: version(name) for name in ("dit_moe", "torch", "transformers")},
    }
    with exclusive(folder.parent, folder.name), atomic_folder(folder) as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save(unfinished)
        if not olmoe:
            names = ", ".join(sorted(AUTO_MAP.values()))
            line = f"from dit_moe.interop.transformers_lm import {names}  # noqa: F401\n"
            (unfinished / f"{CODE}.py").write_text(line, encoding="utf-8")
        (unfinished / PROVENANCE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return facts
