"""What can be evaluated, by the word that names it."""

from dit_moe.evaluation.sources.base import Opened, ReadOptions, Source, Statistics
from dit_moe.evaluation.sources.words import open_word

__all__ = ["Opened", "ReadOptions", "Source", "Statistics", "open_word"]
