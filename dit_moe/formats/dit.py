"""DiT (Peebles & Xie 2023) and SiT (Ma et al. 2024): one network, whose tensors we call as they do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from dit_moe.config import Tree
from dit_moe.formats.base import Found, ImageFormat, NotThisFormat, named_size, register, stable_diffusion_autoencoder
from dit_moe.formats.rules import Rule, same

OUTSIDE = (  # tensors beside those of the blocks
    "pos_embed",
    *(f"x_embedder.proj.{kind}" for kind in ("weight", "bias")),
    *(f"t_embedder.mlp.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")),
    "y_embedder.embedding_table.weight",
    *(f"final_layer.{layer}.{kind}" for layer in ("linear", "adaLN_modulation.1") for kind in ("weight", "bias")),
)
ATTENTION = ("attn.qkv", "attn.proj", "adaLN_modulation.1")
DENSE = ("mlp.fc1", "mlp.fc2")


def block_rules(*layers: str) -> list[Rule]:
    """Weight and bias of these linear layers of every block, called alike."""
    return [same(f"blocks.#.{layer}.{kind}") for layer in layers for kind in ("weight", "bias")]


def outer_shape(found: Found, input_size: int | None = None) -> Tree:
    """Of a DiT, what follows from the tensors outside its blocks: patches, channels, classes, input size.

    The last is `input_size`, unless that is None.
    """
    _, channels, patch, _ = found.matrix("x_embedder.proj.weight", 4)
    if input_size is None:
        input_size = math.isqrt(found.matrix("pos_embed", 3)[1]) * patch
    outputs = found.shape("final_layer.linear.bias")[0] // patch**2
    if outputs not in (channels, 2 * channels):
        raise NotThisFormat(f"final_layer gives {outputs} channels for {channels} of the input")
    return {
        "in_channels": channels,
        "input_size": input_size,
        "num_classes": found.shape("y_embedder.embedding_table.weight")[0] - 1,
        "learn_sigma": outputs == 2 * channels,
    }


def dense_shape(found: Found) -> Tree:
    """Of a DiT without experts, what `named_size` makes of its blocks."""
    width, _, patch, _ = found.matrix("x_embedder.proj.weight", 4)
    depth = found.count("blocks.#.")
    hidden = [found.matrix(f"blocks.{block}.mlp.fc1.weight")[0] for block in range(max(1, depth))]
    return named_size(depth, width, hidden[0], patch)


def ddpm(found: Found) -> Tree:
    """The section `objective` of DiT's own training."""
    return {"name": "ddpm", "variance": "learned_range" if outer_shape(found)["learn_sigma"] else "fixed_large"}


@register("dit")
class DiTFormat(ImageFormat):
    """The checkpoints of facebookresearch/DiT, and of fast-DiT."""

    suite: ClassVar[str] = "DiT"
    published: ClassVar[str | None] = r"DiT-XL-2-(256x256|512x512)\.pt"
    recipe: ClassVar[str | None] = "dit-cfg1.5"

    def model(self, found: Found) -> Tree:
        self.require_own(found)
        found.shape("blocks.0.attn.qkv.weight")
        return {**dense_shape(found), **outer_shape(found)}

    def require_own(self, found: Found) -> None:
        """NotThisFormat if the arguments of the training are those of SiT."""
        if "path_type" in found.settings or str(found.settings.get("model", "")).startswith("SiT"):
            raise NotThisFormat("its arguments are those of SiT")

    def objective(self, found: Found) -> Tree:
        return ddpm(found)

    def first_stage(self, found: Found) -> Tree:
        return stable_diffusion_autoencoder(str(found.settings.get("vae", "ema")))

    def rules(self, model: Any) -> Sequence[Rule]:
        return [*map(same, OUTSIDE), *block_rules(*ATTENTION, *DENSE)]


@register("sit")
class SiTFormat(DiTFormat):
    """The checkpoints of willisma/SiT: DiT's tensors, trained by flow matching whose time ends at the data."""

    suite: ClassVar[str] = "SiT"
    published: ClassVar[str | None] = r"SiT-(S|B|L|XL)-2-256(x256)?\.pt"
    recipe: ClassVar[str | None] = "sit-ode-cfg1.5"

    def require_own(self, found: Found) -> None:
        if str(found.settings.get("model", "")).startswith("DiT"):
            raise NotThisFormat("its arguments are those of DiT")

    def objective(self, found: Found) -> Tree:
        path, prediction = found.settings.get("path_type", "Linear"), found.settings.get("prediction", "velocity")
        if str(path).lower() not in ("linear", "gvp"):
            raise NotThisFormat(f"it was trained on the path {path}, and ours are Linear and GVP")
        if prediction != "velocity":
            raise NotThisFormat(f"it predicts the {prediction}, and our flow objective the velocity")
        return {"name": "flow", "path": str(path).lower(), "direction": "to_data", "time_scale": 1.0}
