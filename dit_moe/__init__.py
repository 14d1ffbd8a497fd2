"""Diffusion Transformers with DTop-p Mixture-of-Experts: training, sampling and evaluation."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dit_moe.api import ImageModel, TextModel, load, train

__all__ = ["ImageModel", "TextModel", "load", "train"]


def __getattr__(name: str) -> Any:
    """What `__all__` names, which takes seconds to import, when it is first asked for."""
    if name in __all__:
        from dit_moe import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
