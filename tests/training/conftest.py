import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for tiny_run, which is a script too

from every_family import build, data, family  # noqa: F401
from fake_tracker import tracked  # noqa: F401
