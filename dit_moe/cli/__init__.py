"""The console command ``dit-moe``; the scripts at the top of the repository call the same functions.

Exit codes: 0 done; 2 bad input, found before the work starts; 1 a run that failed in the middle; 128 + n stopped by
signal n after saving.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path

COMMANDS = {  # name: module of dit_moe.cli, what it does
    "encode": ("encode", "turn images into latents to train on"),
    "tokenize": ("tokenize_text", "turn text into tokens to train a language model on"),
    "train": ("train", "train a model, or go on with a run that was interrupted"),
    "sample": ("sample", "sample images, or text, from a run"),
    "eval": ("evaluate", "compare images with a reference"),
    "table": ("table", "put results into one table, beside published ones"),
    "compare": ("compare", "train and compare several routers"),
    "routing": ("routing", "show where the experts of a run go"),
    "dial": ("dial", "show what a run gives for more or less compute"),
    "perplexity": ("perplexity", "score text with a language model"),
    "export": ("export", "write a language model for transformers"),
    "lm-eval": ("lm_eval", "run lm-evaluation-harness on a language model"),
    "quickstart": ("quickstart", "encode or tokenise, train, sample and evaluate in one go"),
    "train-autoencoder": ("train_autoencoder", "train a small autoencoder to make latents with"),
}


EXTRAS = {"transformers": "lm", "tokenizers": "lm", "lm_eval": "lm", "datasets": "datasets"}  # package: what brings it
OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")
NEGATIVE = re.compile(r"-[\d.]")  # how a negative number begins


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command and return its exit code."""
    return _guarded(parse(sys.argv[1:] if argv is None else argv))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """What the words of a sub-command mean; SystemExit for --help, and for words that mean nothing.

    Each sub-command is a module of `dit_moe.cli` with `add_arguments` and `run`, imported only when it is called.
    """
    parser = argparse.ArgumentParser(
        prog="dit-moe", description="Diffusion Transformers, and language models, with DTop-p experts"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module_name, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if list(argv[:1]) == [name]:
            module = importlib.import_module(f"dit_moe.cli.{module_name}")
            command.description = module.__doc__
            command.formatter_class = argparse.RawDescriptionHelpFormatter
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    args, rest = parser.parse_known_args(_joined(argv))
    if rest:  # argparse takes positionals in one go only; words and overrides may also come after an option
        words = not any(word.startswith("-") for word in rest)
        if words and hasattr(args, "words"):
            args.words = [*args.words, *rest]
        elif words and hasattr(args, "overrides") and all("=" in word for word in rest):
            args.overrides = [*args.overrides, *rest]
        else:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def add_config_arguments(parser: argparse.ArgumentParser, example: str) -> None:
    """The arguments of a command that reads a config file: `config`, for instance `example`, and `overrides`."""
    parser.add_argument("config", type=Path, help=f"a YAML file, for instance {example}")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the config")


def add_run_argument(parser: argparse.ArgumentParser) -> None:
    """`--run`, of a command that trains; see `tasks.train.run_folder` for its default."""
    parser.add_argument(
        "--run", dest="folder", type=Path, metavar="FOLDER", help="run folder; default runs/<name of the config>"
    )


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The names among the words of a command, and the changes, ``key=value``, unless there is a file of that name."""
    changes = [word for word in words if OVERRIDE.match(word) and not Path(word).exists()]
    return [word for word in words if word not in changes], changes


def _joined(argv: Sequence[str]) -> list[str]:
    """With ``--range=-1,1`` for ``--range -1,1``, whose second word argparse would take for an option."""
    joined: list[str] = []
    for word in argv:
        if joined and joined[-1] == "--range" and NEGATIVE.match(word):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def _guarded(args: argparse.Namespace) -> int:
    from dit_moe.autoencoders.encoder import EncodingError
    from dit_moe.diffusion import SamplingError
    from dit_moe.distributed import ProcessLost, ending_together
    from dit_moe.text.perplexity import ScoringError
    from dit_moe.training import Interrupted, TrainingError

    try:
        with ending_together():
            args.run(args)
    except Interrupted as stop:
        print(f"stopped: {stop}", file=sys.stderr)
        return 128 + stop.signum
    except (
        TrainingError,
        SamplingError,
        EncodingError,
        ScoringError,
        ProcessLost,
        MemoryError,
        OSError,
    ) as error:  # a full disk, too
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        remedy = f"pip install 'dit_moe[{EXTRAS[error.name]}]'"
        print(f"error: this needs the package {error.name}, which is not installed; {remedy}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
