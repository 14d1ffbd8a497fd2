"""ProMoE's suite (ICLR 2026): dense, token choice, expert choice, DiffMoE and ProMoE, all trained by one flow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from dit_moe.config import Tree
from dit_moe.formats.base import Found, NotThisFormat, register
from dit_moe.formats.diffmoe import KINDS, DiffMoEFormat, FeedForwardKind, moe_section
from dit_moe.formats.dit import dense_shape, outer_shape
from dit_moe.formats.moe_blocks import shape_of

NULL_CLASS = 1000  # the label that its router takes for no class, however many classes there are
PROMOE = FeedForwardKind(
    "cluster_centers", {"name": "promoe"}, "cluster_centers", ("up_proj", "down_proj"), "shared_expert"
)


@register("promoe")
class ProMoEFormat(DiffMoEFormat):
    """Checkpoints of the suite. Prototypes are read as in the published models: one expert a token, gated by cosine."""

    suite: ClassVar[str] = "ProMoE"
    recipe: ClassVar[str | None] = "promoe"
    kinds: ClassVar[Sequence[FeedForwardKind]] = (PROMOE, *KINDS)

    def model(self, found: Found) -> Tree:
        if found.settings:
            raise NotThisFormat("the file holds the arguments of a training, and the suite writes none")
        kind, shape = self.kind(found), {**shape_of(found), **outer_shape(found)}
        if kind is None:
            return {**dense_shape(found), **shape}
        moe = moe_section(found, kind)
        if kind is PROMOE:
            classes, prototypes = shape["num_classes"], found.shape(f"blocks.{moe['offset']}.mlp.cluster_centers")[0]
            if classes != NULL_CLASS:
                raise NotThisFormat(f"it has {classes} classes, and ProMoE's router knows no class as {NULL_CLASS}")
            if prototypes != moe["experts"] - 1:
                problem = f"it has {prototypes} prototypes for {moe['experts']} experts"
                raise NotThisFormat(f"{problem}; the last expert must be that of the tokens without a class")
        return {**shape, "moe": moe}

    def objective(self, found: Found) -> Tree:
        return {"name": "flow", "time": "logit_normal"}
