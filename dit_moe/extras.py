"""The packages that not everybody needs, which the extras of pyproject.toml list, and how to install one."""

from __future__ import annotations

import re
import shlex

DISTRIBUTIONS = {  # what brings a package that a command may need: its name in a registry
    "datasets": "datasets",
    "lm_eval": "lm-eval",
    "shtab": "shtab",
    "tokenizers": "transformers",
    "transformers": "transformers",
}


def how_to_install(distribution: str) -> str:
    """The command for it, in the versions that the project works with; it works in any folder."""
    from importlib.metadata import PackageNotFoundError, requires

    try:
        needs = [need.partition(";")[0].strip() for need in requires("dit_moe") or ()]
    except PackageNotFoundError:  # a checkout whose scripts are called by another environment
        needs = []
    bounded = (need for need in needs if re.match(r"[\w.-]+", need)[0] == distribution)  # type: ignore[index]
    return f"pip install {shlex.quote(next(bounded, distribution))}"
