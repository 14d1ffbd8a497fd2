import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))  # for tiny_run

from every_family import build, data, family  # noqa: F401
