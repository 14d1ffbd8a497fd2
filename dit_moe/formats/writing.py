"""Our weights under the names of another suite, of those models that its network computes alike."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any

from torch import Tensor

from dit_moe import config
from dit_moe.checkpoint import Checkpoint
from dit_moe.config import ConfigError, Tree
from dit_moe.data.listing import note
from dit_moe.diffusion import OBJECTIVES
from dit_moe.formats.base import FORMATS, Found
from dit_moe.formats.recognition import typed_model
from dit_moe.formats.rules import to_theirs
from dit_moe.formats.sources import Which

# No output depends on these, among them coefficients of losses and the times of training.
OF_TRAINING = re.compile(
    r"model\.(recompute|moe\.(implementation|recompute|capacity_factor|router\.(init_std|\w+_loss)))"
    r"|objective\.(label_dropout|time|time_mean|time_std|time_shift|base_dims|stratified|cosine_weight|min_snr_gamma)"
)
REMEDY = "export it as a run"


@dataclass(frozen=True, kw_only=True)
class _Objective:
    objective: Annotated[Any, OBJECTIVES]


def _complete(section: Tree) -> Tree:
    """The section `objective` with what it leaves to the defaults."""
    complete: Tree = config.dump(config.build(_Objective, {"objective": section}))["objective"]
    return complete


def in_format(name: str, saved: Checkpoint, which: Which, settings: Tree | None = None) -> dict[str, Tensor]:
    """The weights of a run as the format `name` has them, beside which it has `settings`, if it has any.

    What weights do not tell, and is not as in the suite's published models, is said on stderr. ConfigError for what the
    suite's network does otherwise: the weights would mean another model there.
    """
    format_: Any = FORMATS.config_class(name)()
    tree = saved.config()
    model = typed_model(tree["model"])
    try:
        theirs = to_theirs(format_.rules(model), saved.weights(which))
        read = format_.experiment(Found(theirs, settings or {}))
    except ValueError as error:
        raise ConfigError("--to", f" {name}: {saved.folder} does not fit that format: {error}; {REMEDY}") from None
    ours = config.flatten({"model": config.dump(model), "objective": _complete(tree["objective"])})
    told = config.flatten(read)
    unusual = [f"{key}={ours[key]}" for key in format_.assumed if key in ours and told.get(key) != ours[key]]
    read = config.override(read, unusual)
    network = config.dump(typed_model({"heads": model.heads, **read["model"]}))
    for key, value in config.flatten({"model": network, "objective": _complete(read["objective"])}).items():
        if ours.get(key) != value and not OF_TRAINING.fullmatch(key):
            raise ConfigError(key, f"={ours.get(key)}: weights of the format {name} mean {value}; {REMEDY}")
    if unusual:
        note(f"weights of the format {name} do not tell {' '.join(unusual)}; give that where they are read")
    return theirs
