"""First stages. A new one is a new file here: it registers itself and every contract test runs on it unasked."""

from dit_moe.autoencoders.base import FIRST_STAGES, FirstStage, Moments
from dit_moe.registry import import_submodules

import_submodules(__name__, __path__)

__all__ = ["FIRST_STAGES", "FirstStage", "Moments"]
