"""Print a script that makes the shell complete commands, options, the names of configs and studies, and run folders.

The script is made once, for bash or zsh, and answers without starting Python. For zsh the folder is one of $fpath.

    # needs shtab; pip install shtab
    dit-moe completion bash > ~/.local/share/bash-completion/completions/dit-moe
    dit-moe completion zsh > ~/.zfunc/_dit-moe
"""

from __future__ import annotations

import argparse
from typing import Any

from dit_moe import built_in
from dit_moe.cli import COMMANDS, build_parser

SHELLS = ("bash", "zsh")
RUNS = "find runs -maxdepth 3 -name config.yaml 2>/dev/null | sed s,/config.yaml,,"
ARGUMENTS = {  # of the commands: where their words come from
    "config": (" ".join(built_in.names()), "f"),
    "study": (" ".join(built_in.names("studies/")), "f"),
    "what": (" ".join(["show", *filter(None, built_in.by_folder())]), "f"),
    "name": (" ".join(built_in.names()), "f"),
    "run_folder": (RUNS, "d"),
    "runs": (RUNS, "d"),
    "model": (RUNS, "d"),
    "words": (RUNS, "f"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `run` reads."""
    parser.add_argument("shell", choices=SHELLS, help="which shell")


def run(args: argparse.Namespace) -> None:
    """Print to stdout. ModuleNotFoundError if shtab is not installed."""
    import shtab

    parser, commands = build_parser(COMMANDS)
    for command in commands.values():
        command.description = None
        for action in command._actions:
            if action.dest in ARGUMENTS and not action.option_strings:
                action.complete = dict.fromkeys(SHELLS, f"_dit_moe_{action.dest}")  # type: ignore[attr-defined]
            elif action.type is not None and action.choices is None and action.metavar in ("FOLDER", "FILE"):
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    functions: Any = {shell: _functions(shell) for shell in SHELLS}
    print(shtab.complete(parser, args.shell, preamble=functions))


def _functions(shell: str) -> str:
    """That list what the arguments may be."""
    lines = []
    for dest, (words, paths) in ARGUMENTS.items():
        if shell == "bash":  # `compgen -W` would run what a folder's name says in $(…)
            listed = f'{RUNS} | while IFS= read -r run; do [[ $run != "$1"* ]] || printf "%s\\n" "$run"; done'
            among = f'compgen -W "{words}" -- "$1"'
            body = f'{listed if words == RUNS else among}; compgen -{paths} -- "$1"'
        else:
            each = f'${{(f)"$({RUNS})"}}' if words == RUNS else words
            body = f"compadd -- {each}; _files {'-/' if paths == 'd' else ''}"
        lines.append(f"_dit_moe_{dest}() {{ {body}; }}")
    return "\n".join(lines)
