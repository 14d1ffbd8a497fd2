"""What is known of a suite's weights: how its config follows from their names and shapes, and what its tensors are.

A new format is one file in this folder: a class with the decorator `register`.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from dit_moe.config import Tree
from dit_moe.data.class_names import or_imagenet
from dit_moe.formats.rules import Rule
from dit_moe.models.dit import SIZES, hidden_width
from dit_moe.moe import Activation
from dit_moe.registry import Registry
from dit_moe.sampling.recipes import SAMPLING

FORMATS = Registry("format")
F = TypeVar("F", bound="type[Format]")


class NotThisFormat(ValueError):
    """Why weights are not of a format, in words that follow its name."""


def register(name: str) -> Callable[[F], F]:
    """Class decorator: file a format, which is its own config, under `name`."""
    return lambda cls: FORMATS.register(name, cls)(cls)


@dataclass(frozen=True)
class Found:
    """What a source says of itself before any number of it is read."""

    tensors: Mapping[str, Tensor]  # of which only names, shapes and dtypes are looked at
    settings: Tree = field(default_factory=dict)  # the training's arguments, or a config.json beside the weights
    folder: Path | None = None  # that holds them, if the source is a folder

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor that the format must have; NotThisFormat if it is not there, or holds nothing in any row."""
        if name not in self.tensors:
            raise NotThisFormat(f"there is no tensor {name}")
        shape = tuple(self.tensors[name].shape)
        if not shape or 0 in shape:
            raise NotThisFormat(f"{name} has the shape {list(shape)}, which no layer has")
        return shape

    def matrix(self, name: str, dims: int = 2) -> tuple[int, ...]:
        """The same of a tensor of so many dimensions."""
        shape = self.shape(name)
        if len(shape) != dims:
            raise NotThisFormat(f"{name} has the shape {list(shape)}, not {dims} dimensions")
        return shape

    def count(self, pattern: str) -> int:
        """How many numbers, from 0 on, stand for the ``#`` of `pattern` at the beginning of names: "blocks.#."."""
        numbered = re.compile(re.escape(pattern).replace(r"\#", r"(\d+)"))
        return 1 + max((int(match[1]) for name in self.tensors if (match := numbered.match(name))), default=-1)


class Format(ABC):
    """The weights of one suite. No method reads a number of a tensor."""

    suite: ClassVar[str]  # what it is called, and where its code is
    by_name_only: ClassVar[bool] = False  # whether it is tried only where the user names it
    assumed: ClassVar[tuple[str, ...]] = ()  # keys that weights do not tell: read as in published models
    ignored: ClassVar[Mapping[str, str]] = {}  # tensors that we have no use for, `#` for any number: why
    published: ClassVar[str | None] = None  # names of its files, a pattern, if others have such tensors

    @abstractmethod
    def experiment(self, found: Found) -> Tree:
        """The config of a run with these weights. Fields that cannot be told are left out; NotThisFormat says why not.

        It need not look at every tensor: `rules` say which there must be.
        """

    def class_names(self, found: Found, num_classes: int) -> list[str] | None:
        """In the order of the label table: ImageNet's synsets in its order where there are 1000, else numbers.

        None: not known.
        """
        return list(or_imagenet(None, num_classes) or map(str, range(num_classes)))

    def state(self, found: Found) -> Tree:
        """What a run keeps in state.json beside the classes: of text, its tokenizer. ValueError if it is not there."""
        return {}

    @abstractmethod
    def rules(self, model: Any) -> Sequence[Rule]:
        """Which of its tensors make up which of ours, for a typed section `model`; all of ours are in one of them."""

    def note(self, settings: Tree, model: Any) -> str | None:
        """What a user should know of weights with these settings and the typed section `model`; None: nothing."""
        return None


class ImageFormat(Format):
    """The weights of a diffusion model of images."""

    recipe: ClassVar[str | None] = None  # the name of its published sampling recipe, see `SAMPLING`

    def recipe_of(self, found: Found) -> str | None:
        """The recipe of these weights, where not all of the suite's have one."""
        return self.recipe

    @abstractmethod
    def model(self, found: Found) -> Tree:
        """The section `model`, see `experiment`."""

    @abstractmethod
    def objective(self, found: Found) -> Tree:
        """The section `objective`: what was trained, and in which direction the network's time runs."""

    def first_stage(self, found: Found) -> Tree:
        """The section `first_stage`, the latent space."""
        return stable_diffusion_autoencoder()

    def sample(self, found: Found) -> Tree:
        """The section `sample`, as far as the suite's recipe says."""
        name = self.recipe_of(found)
        recipe = {} if name is None else SAMPLING[name].sample
        return {key: recipe[key] for key in ("sampler", "guidance") if key in recipe}

    def experiment(self, found: Found) -> Tree:
        model = self.model(found)
        return {
            "model": model,
            "objective": self.objective(found),
            "data": {"name": "latents", "path": f"data/imagenet{8 * model.get('input_size', 32)}"},
            "first_stage": self.first_stage(found),
            "sample": {"count": 64, "batch_size": 16, **self.sample(found)},
        }


def stable_diffusion_autoencoder(variant: str = "ema") -> Tree:
    """The section `first_stage` for latents of Stable Diffusion's autoencoder, ft-ema or ft-mse, scaled by 0.18215."""
    return {
        "name": "autoencoder",
        "model": f"stabilityai/sd-vae-ft-{variant}",
        "kind": "AutoencoderKL",
        "channels": 4,
        "shift": [0.0],
        "scale": [0.18215],
    }


def named_size(
    depth: int, width: int, mlp_hidden: int, patch: int, heads: int | None = None, activation: Activation = "gelu"
) -> Tree:
    """The name of a DiT and, unless that says it, its shape; heads, which weights do not tell, as far as known."""
    for size, shape in SIZES.items():
        named = shape.depth, shape.width, hidden_width(shape.mlp_hidden, activation)
        if (depth, width, mlp_hidden) == named and heads in (None, shape.heads):
            return {"name": f"DiT-{size}/{patch}"}
    told = {} if heads is None else {"heads": heads}
    return {"name": f"DiT-custom/{patch}", "depth": depth, "width": width, "mlp_hidden": mlp_hidden, **told}
