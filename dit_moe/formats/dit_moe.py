"""DiT-MoE (Fei et al. 2024): SwiGLU experts in every block, chosen by top-k with the softmax scores as gates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from dit_moe.config import Tree
from dit_moe.formats.base import Found, ImageFormat, register, stable_diffusion_autoencoder
from dit_moe.formats.dit import ddpm, outer_shape
from dit_moe.formats.moe_blocks import KINDS, expert_blocks, gated_experts, shape_of, trunk_rules
from dit_moe.formats.rules import Rule, same


@register("dit_moe")
class DiTMoEFormat(ImageFormat):
    """The checkpoints of feizc/DiT-MoE. XL and G call attention's layers Wqkv and out_proj, and normalise q and k."""

    suite: ClassVar[str] = "DiT-MoE"

    def by_flow(self, settings: Tree) -> bool:
        """Whether it was trained by rectified flow. Arguments say so if they are there; weights alone do not."""
        return bool(settings.get("rf", not settings))

    def recipe_of(self, found: Found) -> str | None:
        return "dit-moe-cfg1.5" if self.by_flow(found.settings) else "dit-cfg1.5"  # its DDPM is sampled as DiT's

    def model(self, found: Found) -> Tree:
        blocks = expert_blocks(found, "moe.gate.weight")
        block = f"blocks.{blocks['offset']}.moe"
        moe = {
            "experts": found.matrix(f"{block}.gate.weight")[0],
            "target": found.settings.get("num_experts_per_tok", 2),  # of all published models
            "expert_hidden": found.matrix(f"{block}.experts.0.gate_proj.weight")[0],
            "shared_experts": 1,
            "shared_hidden": found.matrix(f"{block}.shared_experts.gate_proj.weight")[0],
            "activation": "swiglu",
            "router": {"name": "topk", "renormalize": False, "balance_loss": 0.01},
            **blocks,
        }
        return {**shape_of(found, qk_norm_eps=1e-6), **outer_shape(found), "moe": moe}

    def objective(self, found: Found) -> Tree:
        if self.by_flow(found.settings):
            return {"name": "flow", "time": "logit_normal", "time_scale": 1.0}
        return ddpm(found)

    def first_stage(self, found: Found) -> Tree:
        return stable_diffusion_autoencoder("mse")

    def rules(self, model: Any) -> Sequence[Rule]:
        names = (("attn.qkv", "attn.Wqkv"), ("attn.proj", "attn.out_proj")) if model.qk_norm else ()
        attention = [same(f"blocks.#.{a}.{kind}", f"blocks.#.{b}.{kind}") for a, b in names for kind in KINDS]
        router = same("blocks.#.moe.router.weight", "blocks.#.moe.gate.weight")
        return [*trunk_rules(model, attention), router, *gated_experts("moe.experts.*", "moe.shared_experts")]

    def note(self, settings: Tree, model: Any) -> str | None:
        if settings or not self.by_flow(settings):
            return None
        assumed = "the file has no arguments of a training, so it is read as trained by rectified flow"
        return f"{assumed}; --format dit_moe_ddpm reads it as trained by DDPM"


@register("dit_moe_ddpm")
class DiTMoEDDPMFormat(DiTMoEFormat):
    """The same weights trained by DDPM, for files that do not say so."""

    by_name_only: ClassVar[bool] = True

    def by_flow(self, settings: Tree) -> bool:
        return False
