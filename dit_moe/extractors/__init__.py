"""Images → features, by fixed networks. A new extractor is a new file here."""

from dit_moe.extractors.base import EXTRACTORS, FeatureExtractor, Features, key_of
from dit_moe.registry import import_submodules

import_submodules(__name__, __path__)

__all__ = ["EXTRACTORS", "FeatureExtractor", "Features", "key_of"]
