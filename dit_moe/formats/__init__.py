"""Weights of other suites: which format they are of, the config that they mean, and their tensors under our names."""

from dit_moe.formats.base import FORMATS, Format, ImageFormat, NotThisFormat
from dit_moe.formats.recognition import Weights, home_of, is_weights, open_model, recognise
from dit_moe.formats.writing import in_format
from dit_moe.registry import import_submodules

__all__ = [
    "FORMATS",
    "Format",
    "ImageFormat",
    "NotThisFormat",
    "Weights",
    "home_of",
    "in_format",
    "is_weights",
    "open_model",
    "recognise",
]

import_submodules(__name__, __path__)
