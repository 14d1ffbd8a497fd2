"""Write one lock file for each supported Python: `make lock`.

A lock names the version of every package that the project or one of its extras needs, directly or through another.
pip takes it as a file of constraints. torch and torchvision have a range, and what only torch needs is left out: a
machine with GPUs brings the build that fits its driver. uv resolves for every Python from package metadata alone,
whichever Python runs it.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PYTHONS = ("3.11", "3.12", "3.13")
RANGES = ["torch>=2.11,<2.16", "torchvision<0.30"]  # up to the newest that the tests were run on
LEFT_OUT = re.compile(r"(torch|torchvision|triton|setuptools|nvidia-.*|cuda-.*)==")
HEADER = """\
# Versions of all packages for Python {python} on Linux, ranges of torch's; written by `make lock`, used by `make`.
"""


def resolve(root: Path, python: str) -> list[str]:
    """The lines name==version for one Python, in order of name."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "pyproject.toml", "--all-extras"]
    command += ["--python-version", python, "--no-header", "--no-annotate", "--system-certs", "--constraint", "-"]
    done = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, input="\n".join(RANGES), text=True, check=True)
    return RANGES + [line for line in done.stdout.splitlines() if not LEFT_OUT.match(line)]


def main() -> None:
    here = Path(__file__).parent
    for python in PYTHONS:
        lines = resolve(here.parent, python)
        (here / f"python{python}.txt").write_text(HEADER.format(python=python) + "\n".join(lines) + "\n")
        print(f"requirements/python{python}.txt: {len(lines)} packages")


if __name__ == "__main__":
    main()
