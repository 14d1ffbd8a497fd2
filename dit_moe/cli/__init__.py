"""The console command ``dit-moe``; the scripts at the top of the repository call the same functions.

Exit codes: 0 done; 2 bad input, found before the work starts; 1 a run that failed in the middle, or a fault of the
program; 128 + n stopped by signal n, a training after saving; 141 done, but nobody read what was printed. Whatever
happens is said in one line on stderr.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import re
import secrets
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, suppress
from pathlib import Path
from typing import Any

from dit_moe import plugins
from dit_moe.cli.process import prepare_process
from dit_moe.cli.streams import open_standard_streams, unread
from dit_moe.config import STORED, WorkFailed
from dit_moe.extras import DISTRIBUTIONS, how_to_install
from dit_moe.formatting import tell

COMMANDS = {  # name: module of dit_moe.cli, what it does
    "encode": ("encode", "turn images into latents to train on"),
    "tokenize": ("tokenize_text", "turn text into tokens to train a language model on"),
    "train": ("train", "train a model, or go on with a run that was interrupted"),
    "sample": ("sample", "sample images, or text, from a run"),
    "eval": ("evaluate", "compare images with a reference"),
    "table": ("table", "put results into one table, beside published ones"),
    "compare": ("compare", "train and compare several routers"),
    "routing": ("routing", "show where the experts of a run go"),
    "curves": ("curves", "draw loss, experts and speed of runs over training"),
    "dial": ("dial", "show what a run gives for more or less compute"),
    "perplexity": ("perplexity", "score text with a language model"),
    "import": ("import_weights", "make a run of weights that another suite trained"),
    "export": ("export", "write a run without its training state, or for transformers"),
    "upcycle": ("upcycle", "start a model with experts from a trained one"),
    "lm-eval": ("lm_eval", "run lm-evaluation-harness on a language model"),
    "quickstart": ("quickstart", "encode or tokenise, train, sample and evaluate in one go"),
    "train-autoencoder": ("train_autoencoder", "train a small autoencoder to make latents with"),
    "configs": ("configs", "list the configs and studies that come along, or print one"),
    "completion": ("completion", "print what makes a shell complete commands, options, configs and runs"),
}


# The same command goes on where it stopped.
RESUMED = ("encode", "tokenize", "train", "train-autoencoder", "quickstart", "compare", "dial")
SMALLER = {  # what takes less memory, by command
    "train": "lower train.micro_batch",
    "upcycle": "lower train.micro_batch",
    "quickstart": "lower train.micro_batch and sample.batch_size",
    "sample": "lower sample.batch_size",
    "eval": "lower sample.batch_size of a run, or --size",
    "encode": "lower encode.batch_size",
    "perplexity": "lower eval.batch_size",
    "lm-eval": "lower --batch-size",
}
ERRNO = re.compile(r"^\[Errno -?\d+\] ")
OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")
NEGATIVE = re.compile(r"-[\d.]")  # how a negative number begins


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command and return its exit code; SystemExit for --help, and for words that mean nothing."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = argparse.Namespace()
    prepare_process()
    open_standard_streams()
    try:
        try:
            with _said_by_one():
                args = parse(words)
            from dit_moe.distributed import ending_together

            with ending_together():
                plugins.load(args.plugin)
                args.run(args)
        finally:
            sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        if "--traceback" in words:
            traceback.print_exception(error)
        return _end(error, words, args)
    return 141 if unread() else 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """What the words of a sub-command mean; SystemExit for --help, and for words that mean nothing."""
    parser, commands = build_parser(argv[:1])
    for name, command in commands.items():
        _refuse_keys_as_options(command, name, argv[1:])
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


def _refuse_keys_as_options(command: argparse.ArgumentParser, name: str, words: Sequence[str]) -> None:
    """SystemExit for ``--count 4`` where ``count=4`` is meant, and not a longer option that begins so."""
    known = list(command._option_string_actions)
    if any(word.startswith("-") and word.partition("=")[0] not in known for word in words):
        from dit_moe.cli.config_keys import written_as_keys

        for told in written_as_keys(name, words, known):
            command.error(f"unrecognized arguments: {told}")


def build_parser(called: Collection[str]) -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser, and those of the sub-commands that are called; of the others it knows only what they do.

    Each is a module of `dit_moe.cli` with `add_arguments` and `run`, which takes long to import.
    """
    parser = argparse.ArgumentParser(
        prog="dit-moe", description="Diffusion Transformers, and language models, with DTop-p experts"
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the versions and the device, and stop")
    parsers: dict[str, argparse.ArgumentParser] = {}
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module_name, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if name in called:
            module = importlib.import_module(f"dit_moe.cli.{module_name}")
            parsers[name] = command
            command.description = module.__doc__
            command.formatter_class = argparse.RawDescriptionHelpFormatter
            module.add_arguments(command)
            command.set_defaults(run=module.run)
            command.add_argument(
                "--plugin", action="append", default=[], metavar="MODULE", help="import this module of yours first"
            )
            command.add_argument("--traceback", action="store_true", help="print the stack trace of an error, too")
    return parser, parsers


class _Version(argparse.Action):
    """What a report of a fault should say."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        import platform
        from importlib.metadata import version

        import torch

        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        device = ", ".join(gpus) or f"CPU with {os.cpu_count()} cores"
        print(f"dit_moe {version('dit_moe')}, torch {torch.__version__}, Python {platform.python_version()}, {device}")
        parser.exit()


def add_config_arguments(parser: argparse.ArgumentParser, example: str) -> None:
    """The arguments of a command that reads a config file: `config`, for instance `example`, and `overrides`."""
    parser.add_argument("config", type=Path, help=f"a YAML file, or a built-in one: {example}")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the config")


def add_run_argument(parser: argparse.ArgumentParser) -> None:
    """`--run`, of a command that trains; see `tasks.train.run_folder` for its default."""
    parser.add_argument(
        "--run", dest="folder", type=Path, metavar="FOLDER", help="run folder; default runs/<name of the config>"
    )


def add_opened_run(parser: argparse.ArgumentParser) -> None:
    """RUN, of a command that works with a trained model."""
    told = "a run folder, one of its checkpoint folders, or weights of another suite"
    parser.add_argument("run_folder", type=Path, metavar="RUN", help=told)


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


# ------------------------------------------------------------------------------------------------ the end of a command


@contextmanager
def _said_by_one() -> Iterator[None]:
    """While entered, of the processes that torchrun or accelerate started only the first says anything on stderr."""
    another = "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("RANK") != "0"
    with redirect_stderr(io.StringIO()) if another else nullcontext():
        yield


def _end(error: BaseException, words: Sequence[str], args: argparse.Namespace) -> int:
    """Say in one line why a command ended, and return its exit code. Imports nothing: that may be what failed."""
    if isinstance(error, KeyboardInterrupt):
        _say_same_again(words, args)
        return 130
    text = _message(error)
    if hasattr(error, "signum"):  # training.Interrupted
        code = _say(f"stopped: {text}", 128 + error.signum)
        _say_same_again(words, args)
        return code
    if isinstance(error, WorkFailed | OSError):  # a full disk, too
        return _say(f"failed: {text}", 1)
    if type(error) is ValueError or (isinstance(error, ValueError) and _is_ours(error)):
        return _say(f"error: {text}", 2)
    package = str(getattr(error, "name", None)).partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and package in DISTRIBUTIONS:
        remedy = how_to_install(DISTRIBUTIONS[package])
        return _say(f"error: this needs the package {package}, which is not installed; {remedy}", 2)
    distributed: Any = sys.modules.get("dit_moe.distributed")
    if isinstance(error, MemoryError) or (distributed is not None and distributed.is_out_of_memory(error)):
        problem = f"out of memory ({text}); {SMALLER.get(args.command, 'use less data at a time, or a larger machine')}"
    else:
        problem = f"{type(error).__name__}: {text}; this looks like a fault of dit-moe or of the machine"
    return _say(f"failed: {problem}", 1, lambda: _keep_trace(error, words, args))


def _say_same_again(words: Sequence[str], args: argparse.Namespace) -> None:
    """The command that goes on; of one that a launcher started, only the launcher's own words would."""
    if getattr(args, "command", None) in RESUMED and "RANK" not in os.environ:
        from dit_moe.cli.ending import say_next

        say_next(words)


def _say(text: str, code: int, more: Callable[[], str] = str) -> int:
    """Unless another of the processes that work together has said the same; what `more` returns may differ."""
    distributed: Any = sys.modules.get("dit_moe.distributed")
    if distributed is None or distributed.first_to_say(text):
        tell(f"{text}{more()}")
    return code


def _message(error: BaseException) -> str:
    """The first line of what an error says, with the next if that has the cause.

    Of an error that a worker process passed on it is the last line, after the trace.
    """
    lines = [line for line in str(error).splitlines() if line.strip()] or ["it says nothing"]
    if "Original Traceback" in str(error):
        return lines[-1].removeprefix(f"{type(error).__name__}: ")
    first = " ".join(line.strip() for line in lines[: 2 if lines[0].rstrip().endswith(":") else 1])
    return ERRNO.sub("", str(error) if isinstance(error, WorkFailed | OSError | ValueError) else first)


def _is_ours(error: BaseException) -> bool:
    return any(base.__module__.partition(".")[0] == "dit_moe" for base in type(error).__mro__)


def _keep_trace(error: BaseException, words: Sequence[str], args: argparse.Namespace) -> str:
    """Write the trace to a new file, in the run folder if there is one, and return where it is said to be."""
    folders = [getattr(args, name, None) for name in ("run_folder", "folder")]
    runs = [folder for folder in folders if folder is not None and (folder / STORED).is_file()]
    name = f"trace-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}.txt"
    for folder in (*runs, Path(tempfile.gettempdir())):
        with suppress(Exception):
            with (folder / name).open("x", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"dit-moe {shlex.join(words)}\n")
                traceback.print_exception(error, file=file)
            return f"; its stack trace is in {folder / name}"
    return "; the same command with --traceback prints its stack trace"
