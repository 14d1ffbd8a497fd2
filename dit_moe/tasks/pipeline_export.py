"""A run of images as a folder that diffusers opens as a pipeline."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dit_moe.experiments.run import open_image_run
from dit_moe.files import atomic_folder, disk_used, require_replaceable
from dit_moe.formats import open_model
from dit_moe.formats.pipeline import PROVENANCE
from dit_moe.interop.native_pipeline import native_pipeline
from dit_moe.interop.pipeline import CARD, wrap
from dit_moe.locks import exclusive
from dit_moe.tasks.model_card import model_card


def export_pipeline(
    path: Path, overrides: Sequence[str], folder: Path, licence: str | None = None, *, native: bool = False
) -> dict[str, Any]:
    """Write a run as the folder of a `DiTMoEPipeline`, with a model card.

    Args:
        path: a run folder, or one of its checkpoint folders.
        overrides: ``key=value`` changes to the section ``sample``, which become the pipeline's defaults.
        folder: to be made.
        licence: of the weights, as the Hugging Face hub calls it; None: the card says that there is none yet.
        native: as diffusers' own `DiTPipeline`, for dense models that it computes alike.

    Returns what the folder is of, JSON-ready. ValueError for bad input, before anything is written, if `folder` is not
    empty among it.
    """
    require_replaceable(folder)
    run = open_image_run(path, overrides)
    pipeline: Any = native_pipeline(run, open_model(path)) if native else wrap(run)
    facts = run.facts() | {
        "weights": run.experiment.sample.weights,
        "versions": {name: version(name) for name in ("dit_moe", "torch", "diffusers")},
    }
    with exclusive(folder.parent, folder.name), atomic_folder(folder) as unfinished:
        pipeline.save_pretrained(unfinished)
        (unfinished / CARD).write_text(model_card(run, folder.name, licence, native), encoding="utf-8")
        (unfinished / PROVENANCE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    shown = {key: facts[key] for key in ("run", "step", "weights", "weights_sha256")}
    return {"folder": str(folder), **shown, "bytes": disk_used(folder)}
