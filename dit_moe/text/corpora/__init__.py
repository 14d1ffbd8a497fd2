"""Corpora. A new one is a new file here: it registers itself and every contract test runs on it unasked."""

from dit_moe.registry import import_submodules
from dit_moe.text.corpora.base import CORPORA, Corpus

import_submodules(__name__, __path__)

__all__ = ["CORPORA", "Corpus"]
