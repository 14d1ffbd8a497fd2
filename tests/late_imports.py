"""What the package imports when it first needs it: scripts that fork import it once before, not in every fork."""

import sklearn.datasets
import timm

__all__ = ["sklearn", "timm"]
