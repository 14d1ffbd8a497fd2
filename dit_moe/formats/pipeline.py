"""Our own pipelines, as `dit-moe export --to diffusers` writes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from dit_moe.autoencoders.own_copy import OWN_STATISTICS
from dit_moe.checkpoint import state_of
from dit_moe.config import Tree
from dit_moe.formats.base import Format, Found, NotThisFormat, register
from dit_moe.formats.rules import Rule, same
from dit_moe.formats.sources import read_settings
from dit_moe.models import MODELS

INDEX, PROVENANCE = "model_index.json", "dit_moe.json"
NETWORK = "DiTMoETransformer2DModel"


@register("pipeline")
class PipelineFormat(Format):
    """The folder of a `DiTMoEPipeline`; beside its parts, what it says of its run is kept."""

    suite: ClassVar[str] = "dit_moe"

    def experiment(self, found: Found) -> Tree:
        if found.settings.get("_class_name") != NETWORK:
            raise NotThisFormat(f"no config.json says that it is a {NETWORK}")
        folder, index = self._index(found)
        recorded = {name: found.settings[name] for name in ("model", "objective")}
        # A pipeline that was put together of its parts may say neither how to sample nor how to decode.
        recorded["sample"] = (index["sample"] or {}) | {"weights": "ema"}
        in_pixels = index["vae"][0] is None
        recorded["first_stage"] = dict(index["first_stage"] or {"name": "identity" if in_pixels else "autoencoder"})
        if not in_pixels:
            recorded["first_stage"] |= {"model": str(folder), "subfolder": "vae"}
        if recorded["first_stage"].get("statistics") is not None and (folder / OWN_STATISTICS).is_file():
            recorded["first_stage"]["statistics"] = str(folder / OWN_STATISTICS)
        run = read_settings(folder / PROVENANCE)["experiment"] if (folder / PROVENANCE).is_file() else {}
        return {"data": {"name": "latents", "path": "latents"}, **run, **recorded}

    def class_names(self, found: Found, num_classes: int) -> list[str] | None:
        _, index = self._index(found)
        names: list[str] | None = index["class_names"]
        return names

    def rules(self, model: Any) -> Sequence[Rule]:
        with torch.device("meta"):
            own = state_of(MODELS.build(model))
        return [same(name, f"network.{name}") for name in own]

    def _index(self, found: Found) -> tuple[Path, Tree]:
        """The folder of the pipeline, and what it says of itself."""
        if found.folder is None or not (found.folder / INDEX).is_file():
            raise NotThisFormat(f"there is no {INDEX}; name the folder of the pipeline")
        return found.folder, read_settings(found.folder / INDEX)
