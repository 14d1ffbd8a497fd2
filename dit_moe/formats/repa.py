"""REPA (Yu et al. 2024): SiT, with networks that project its states onto the features of an image encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from dit_moe.config import Tree
from dit_moe.formats.base import Found, ImageFormat, NotThisFormat, register
from dit_moe.formats.dit import outer_shape
from dit_moe.formats.moe_blocks import shape_of, trunk_rules
from dit_moe.formats.rules import Rule

PATHS = {"linear": "linear", "cosine": "gvp"}


@register("repa")
class REPAFormat(ImageFormat):
    """The checkpoints of sihyun-yu/REPA. Its time is ours: 1 is noise, unlike SiT's."""

    suite: ClassVar[str] = "REPA"
    recipe: ClassVar[str | None] = "repa"
    ignored: ClassVar[Mapping[str, str]] = {
        f"projectors.#.{layer}.{kind}": "the projection onto the encoder's features, which training alone uses"
        for layer in (0, 2, 4)
        for kind in ("weight", "bias")
    }

    def model(self, found: Found) -> Tree:
        if not found.count("projectors.#."):
            raise NotThisFormat("there are no projectors, by which REPA's weights are told from SiT's")
        return {**shape_of(found), **outer_shape(found)}

    def objective(self, found: Found) -> Tree:
        path = str(found.settings.get("path_type", "linear"))
        if path not in PATHS:
            raise NotThisFormat(f"it was trained on the path {path}, and those read here are {' and '.join(PATHS)}")
        return {"name": "flow", "path": PATHS[path], "time_scale": 1.0}

    def rules(self, model: Any) -> Sequence[Rule]:
        return trunk_rules(model)
