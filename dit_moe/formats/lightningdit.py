"""LightningDiT (Yao et al. 2025): a DiT with rotary positions, RMS norms and SwiGLU in the latent space of VA-VAE."""

# S tokens, Q width of a head

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from dit_moe.config import Tree
from dit_moe.formats.base import Found, ImageFormat, NotThisFormat, named_size, register
from dit_moe.formats.dit import ATTENTION, DENSE, OUTSIDE, block_rules, outer_shape
from dit_moe.formats.rules import Rule, Tensors, same
from dit_moe.models.positions import rotary_position_embedding
from dit_moe.moe import Activation

ROTARY = ("feat_rope.freqs_cos", "feat_rope.freqs_sin")  # [S, Q] of all angles
NEAR = 1e-5  # angles rounded in another order differ by 1e-6
OWN = {  # what no DiT has, each an option of the original, by a tensor that shows it
    "rotary positions": ROTARY[0],
    "RMS norms": "blocks.0.norm1.weight",
    "SwiGLU": "blocks.0.mlp.w12.weight",
    "norms of queries and keys": "blocks.0.attn.q_norm.weight",
}


@register("lightningdit")
class LightningDiTFormat(ImageFormat):
    """The checkpoints of hustvl/LightningDiT. Models whose modulation has no shift (``wo_shift``) are refused."""

    suite: ClassVar[str] = "LightningDiT"
    recipe: ClassVar[str | None] = "lightningdit-cfg6.7"

    def model(self, found: Found) -> Tree:
        rotary, rms, swiglu, qk_norm = (name in found.tensors for name in OWN.values())
        if not (rotary or rms or swiglu or qk_norm):
            raise NotThisFormat(f"its tensors are those of DiT, without {', '.join(OWN)}")
        width, _, patch, _ = found.matrix("x_embedder.proj.weight", 4)
        _, hidden = found.matrix(f"blocks.0.mlp.{'w3' if swiglu else 'fc2'}.weight")
        modulations, _ = found.matrix("blocks.0.adaLN_modulation.1.weight")
        if modulations == 4 * width:
            raise NotThisFormat("its modulation has no shift (wo_shift), which our DiT cannot do without")
        activation: Activation = "swiglu" if swiglu else "gelu"
        heads = None
        if rotary or qk_norm:
            heads = width // found.shape(OWN["rotary positions" if rotary else "norms of queries and keys"])[-1]
        return {
            **named_size(found.count("blocks.#."), width, hidden, patch, heads, activation),
            **outer_shape(found),
            "position_embedding": "both" if rotary else "absolute",
            "norm": "rms_norm" if rms else "layer_norm",
            "activation": activation,
            **self._qk_norm(found, qk_norm),
        }

    def _qk_norm(self, found: Found, present: bool) -> Tree:
        """The original's RMS norm has the epsilon 1e-6, its LayerNorm PyTorch's own."""
        if not present:
            return {}
        layer_norm = "blocks.0.attn.q_norm.bias" in found.tensors
        return {"qk_norm": "layer_norm", "qk_norm_eps": 1e-5} if layer_norm else {"qk_norm": True, "qk_norm_eps": 1e-6}

    def objective(self, found: Found) -> Tree:
        """As its checkpoints say, or else as its published models were trained."""
        transport = found.settings.get("transport", {})
        path, prediction = transport.get("path_type", "Linear"), transport.get("prediction", "velocity")
        if (path, prediction) != ("Linear", "velocity"):
            raise NotThisFormat(f"it predicts the {prediction} on the path {path}; read here is velocity on Linear")
        return {
            "name": "flow",
            "direction": "to_data",
            "time_scale": 1.0,
            "time": "logit_normal" if transport.get("use_lognorm", True) else "uniform",
            "cosine_weight": 1.0 if transport.get("use_cosine_loss", True) else 0.0,
        }

    def first_stage(self, found: Found) -> Tree:
        """VA-VAE, of which the Hub has a copy in diffusers' layout; the file of its statistics is to be given."""
        channels = found.matrix("x_embedder.proj.weight", 4)[1]
        vae = {"name": "autoencoder", "model": "REPA-E/vavae-hf", "kind": "AutoencoderKL", "channels": channels}
        return {**vae, "normalization": "statistics"}

    def rules(self, model: Any) -> Sequence[Rule]:
        position = same("pos_embed") if not model.has_rotary else _with_tables(model)
        outside = [same(name) for name in OUTSIDE if name != "pos_embed"]
        renamed = {"mlp.fc1": "mlp.w12", "mlp.fc2": "mlp.w3"} if model.activation == "swiglu" else {}
        kinds = ("weight", "bias")
        dense = [
            same(f"blocks.#.{layer}.{kind}", f"blocks.#.{renamed.get(layer, layer)}.{kind}")
            for layer in DENSE
            for kind in kinds
        ]
        norms = [f"blocks.#.{norm}.weight" for norm in ("norm1", "norm2")] + ["final_layer.norm_final.weight"]
        return [position, *outside, *block_rules(*ATTENTION, "attn.q_norm", "attn.k_norm"), *dense, *map(same, norms)]


def _with_tables(model: Any) -> Rule:
    """The position embedding, beside which the original keeps tables of angles that are computed here."""
    head_dim = model.need("width") // model.need("heads")

    def tables() -> Tensors:
        sin, cos = rotary_position_embedding(head_dim, model.side).chunk(2, -1)
        return cos, sin

    def read(found: Tensors) -> Tensors:
        position, *theirs = found
        for name, table, ours in zip(ROTARY, theirs, tables(), strict=True):
            if table.shape != ours.shape:
                raise ValueError(f"{name} is {list(table.shape)}, and {list(ours.shape)} for the tokens and heads")
            if not table.is_meta and (difference := (table - ours).abs().max().item()) > NEAR:
                raise ValueError(f"{name} differs by {difference:.2g} from the table of positions that count tokens")
        return [position]

    return Rule(("pos_embed",), ("pos_embed", *ROTARY), read, lambda position: [*position, *tables()])
