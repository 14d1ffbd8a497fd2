"""How published numbers are computed, by name: recipes.yaml, checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dit_moe import config, yaml_text


@dataclass(frozen=True, kw_only=True)
class EvaluationRecipe:
    """How published numbers are computed."""

    name: str
    summary: str
    extractor: str
    metrics: tuple[str, ...]
    count: int  # generated images
    reference_count: int  # images, at least, of the reference's statistics
    reference_images: int  # beside the reference's statistics
    sides: tuple[int, ...]  # of the images, in pixels


_RECIPES = yaml_text.read(Path(__file__).with_name("recipes.yaml").read_text(encoding="utf-8"))
EVALUATION = {
    name: config.build(EvaluationRecipe, {"name": name, **recipe}) for name, recipe in _RECIPES["evaluation"].items()
}
ADM_50K = EVALUATION["adm-50k"]
