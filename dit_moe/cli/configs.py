"""List the configs and studies that come with dit-moe, or print one to copy and change.

Every command that takes a config takes the name of one of these, too, unless there is a file of that name. So does
`base:` in a config of yours. What is printed names its own bases like that: it works in any folder.

    dit-moe configs
    dit-moe configs show digits
    dit-moe configs show imagenet256/DiT-S-2-8E2A
"""

from __future__ import annotations

import argparse

from dit_moe import built_in


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `run` reads."""
    parser.add_argument("show", nargs="?", choices=["show"], help="print one instead of listing all")
    parser.add_argument("name", nargs="?", metavar="NAME", help="which one")


def run(args: argparse.Namespace) -> None:
    """Print to stdout. ValueError for a name that is unknown or missing."""
    if args.show is None:
        width = max(map(len, built_in.names()))
        print("".join(f"{name:{width}}  {built_in.summary(name)}\n" for name in built_in.names()), end="")
    elif args.name is None:
        raise ValueError("show needs the name of a config, for instance digits; `dit-moe configs` lists them")
    else:
        print(built_in.to_copy(args.name), end="")
