"""DiffMoE's suite (Shi et al., arXiv 2503.14487): token choice, expert choice and DiffMoE, trained by flow or DDPM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from dit_moe.config import Tree
from dit_moe.formats.base import Found, ImageFormat, NotThisFormat, register, stable_diffusion_autoencoder
from dit_moe.formats.dit import ddpm, outer_shape
from dit_moe.formats.moe_blocks import expert_blocks, plain_experts, shape_of, trunk_rules
from dit_moe.formats.rules import Rule, beside_constant, constant, same
from dit_moe.moe import ROUTERS

DECAY = 0.95  # of the moving averages that are thresholds, in every published model
SETTLED = 20  # steps of training after which it no longer matters where they began: 1 / (1 − DECAY)


@dataclass(frozen=True)
class FeedForwardKind:
    """How a feed-forward with experts is built, and what its tensors are called below ``blocks.#.mlp``."""

    told_by: str  # a tensor that only this kind has, or those further down the list
    router: Tree
    weight: str  # of the router
    layers: tuple[str, str] = ("fc1", "fc2")  # of an expert
    shared: str = "shared_experts"


KINDS = (
    FeedForwardKind("capacity_predictor.0.weight", {"name": "diffmoe", "predictor_bias": True}, "gate_weight"),
    FeedForwardKind("gate_weight", {"name": "expert_choice"}, "gate_weight"),
    FeedForwardKind("gate.weight", {"name": "topk", "renormalize": False, "balance_loss": 0.01}, "gate.weight"),
)


@register("diffmoe")
class DiffMoEFormat(ImageFormat):
    """Checkpoints that the suite trained by its rectified flow, whose time ends at the data."""

    suite: ClassVar[str] = "DiffMoE"
    recipe: ClassVar[str | None] = "diffmoe-flow"
    kinds: ClassVar[Sequence[FeedForwardKind]] = KINDS

    def model(self, found: Found) -> Tree:
        kind = self.kind(found)
        if kind is None:
            raise NotThisFormat("no block has experts")
        return {**self.shape(found), **outer_shape(found), "moe": moe_section(found, kind)}

    def kind(self, found: Found) -> FeedForwardKind | None:
        """None without experts."""
        mlps = {name.split(".mlp.")[1] for name in found.tensors if ".mlp." in name}
        return next((kind for kind in self.kinds if kind.told_by in mlps), None)

    def shape(self, found: Found) -> Tree:
        """Name, or depth, width and hidden width; the suites' configs give size S 6 heads or 16, so they are asked."""
        shape = shape_of(found)
        if shape["name"].startswith("DiT-S/"):
            return {"name": shape["name"].replace("-S/", "-custom/"), "depth": 12, "width": 384, "mlp_hidden": 1536}
        return shape

    def objective(self, found: Found) -> Tree:
        return {"name": "flow", "direction": "to_data", "time_scale": 1.0}

    def first_stage(self, found: Found) -> Tree:
        return stable_diffusion_autoencoder("mse")

    def rules(self, model: Any) -> Sequence[Rule]:
        if model.moe is None:
            return trunk_rules(model)
        name = ROUTERS.name_of(model.moe.router)
        kind = next((kind for kind in self.kinds if kind.router["name"] == name), self.kinds[0])
        experts = plain_experts(*kind.layers, routed="mlp.experts.*", shared=f"mlp.{kind.shared}")
        router = same("blocks.#.moe.router.weight", f"blocks.#.mlp.{kind.weight}")
        return [*trunk_rules(model), *experts, router, *(predictor_rules() if name == "diffmoe" else ())]

    def note(self, settings: Tree, model: Any) -> str | None:
        if model.moe is None or ROUTERS.name_of(model.moe.router) != "diffmoe":
            return None
        own = "DiffMoE's own evaluation lets each image depend on the others of its batch"
        return f"{own}; here every token is compared with the thresholds by itself (docs/checkpoints.md)"


@register("diffmoe_ddpm")
class DiffMoEDDPMFormat(DiffMoEFormat):
    """Checkpoints that the suite trained by DDPM."""

    recipe: ClassVar[str | None] = "diffmoe-ddpm"

    def objective(self, found: Found) -> Tree:
        return ddpm(found)


def moe_section(found: Found, kind: FeedForwardKind) -> Tree:
    """The section `moe`. One expert a token is active in every published model."""
    blocks = expert_blocks(found, f"mlp.{kind.told_by}")
    place, layer = f"blocks.{blocks['offset']}.mlp", f"{kind.layers[0]}.weight"
    shared = found.tensors.get(f"{place}.{kind.shared}.{layer}")
    return {
        "experts": found.count(f"{place}.experts.#."),
        "target": 1,
        "expert_hidden": found.matrix(f"{place}.experts.0.{layer}")[0],
        **({} if shared is None else {"shared_experts": 1, "shared_hidden": len(shared)}),
        "bias": True,
        "router": kind.router,
        **blocks,
    }


def predictor_rules() -> list[Rule]:
    """Of DiffMoE's predictor and its thresholds."""
    router, mlp = "blocks.#.moe.router", "blocks.#.mlp"
    rules = [beside_constant(f"{router}.threshold_K", f"{mlp}.expert_threshold", f"{mlp}.ema_decay", DECAY, 1)]
    rules.append(constant(f"{router}.steps", lambda: torch.tensor(SETTLED)))
    for ours, layer in (("in", 0), ("out", 2)):
        rules.append(same(f"{router}.predictor_{ours}", f"{mlp}.capacity_predictor.{layer}.weight"))
        rules.append(same(f"{router}.predictor_bias_{ours}", f"{mlp}.capacity_predictor.{layer}.bias"))
    return rules
