"""The arguments of every command that reads a config file."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_config_arguments(parser: argparse.ArgumentParser, example: str) -> None:
    """`config`, for instance the file `example`, and `overrides`."""
    parser.add_argument("config", type=Path, help=f"a YAML file, for instance {example}")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the config")
