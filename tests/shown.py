"""The commands that the guides, the configs and the commands' own help show, as the shell would read them."""

from __future__ import annotations

import re
import shlex
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from string import Template

import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser as torchrun_parser

from dit_moe.registry import Registry

ROOT = Path(__file__).parents[1]
GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
HELPS = sorted((ROOT / "dit_moe" / "cli").glob("*.py"))
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
SCRIPTS = sorted([*ROOT.glob("*.py"), *ROOT.glob("eval/*.py")])

# What a command can need that is not everywhere. One that needs something is not run by the tests, and says so in a
# comment `# needs …`: for its own line or, if the comment is a line by itself, for all up to the next blank one.
NEEDS = {"ADM's reference batch", "CIFAR-10", "ImageNet", "Inception's weights", "shtab", "the Hugging Face Hub"}
FOR_READERS = {"RANK": "0", "HOST": "localhost"}  # variables whose values a guide leaves to its reader

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PROGRAM = r"(?:dit-moe|python|torchrun|accelerate launch|make|pip) "


@dataclass(frozen=True)
class Shown:
    """A command as it stands in a file: its words as the shell reads them, and what it needs."""

    place: str
    words: tuple[str, ...]
    needs: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return f"{self.place}: {shlex.join(self.words)}"

    def ours(self) -> list[str] | None:
        """What follows `dit-moe`, if this is one of our commands, started by itself or by a launcher; else None.

        SystemExit if the launcher would not take its words.
        """
        program, *rest = self.words
        if program == "dit-moe":
            return rest
        if program == "python" and rest[0] not in ("-c", "-m"):
            return _of_script(rest[0], rest[1:])
        if program == "torchrun":
            return _of_launched(torchrun_parser().parse_args(rest))
        if self.words[:2] == ("accelerate", "launch"):
            return _of_launched(launch_command_parser().parse_args(rest[1:]))
        return None


def _of_launched(args) -> list[str] | None:
    if args.module:
        assert args.training_script == "dit_moe.cli", args.training_script
        return args.training_script_args
    return _of_script(args.training_script, args.training_script_args)


def _of_script(script: str, words: list[str]) -> list[str] | None:
    """A script at the top of the repository, or in eval/, passes its words on to one command."""
    command = re.search(r'main\(\["([\w-]+)", \*sys\.argv', (ROOT / script).read_text())
    return [command[1], *words] if command else None


def blocks(path: Path, language: str) -> list[str]:
    """The fenced blocks of a guide in one language."""
    return [text for name, text in BLOCK.findall(path.read_text()) if name == language]


@contextmanager
def entry(code: str, registry: Registry, name: str) -> Iterator[None]:
    """While entered, `registry` has the entry `name` that a guide's block of Python registers."""
    module = types.ModuleType(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, name, module)  # dataclasses look their module up
        try:
            exec(compile(code, f"{name}.py", "exec"), vars(module))
            yield
        finally:
            registry._entries.pop(name, None)


def in_blocks(path: Path) -> list[Shown]:
    """The commands in the shell blocks of a guide. A variable keeps its value to the end of the guide."""
    variables = dict(FOR_READERS)
    return [shown for text in blocks(path, "bash") for shown in _lines(text, path.name, variables)]


def in_help(path: Path) -> list[Shown]:
    """The commands that a docstring shows: its indented paragraphs that begin with one, or with what it needs."""
    doc = re.match(r'""".*?"""', path.read_text(), re.DOTALL)
    paragraphs = re.findall(rf"(?:^    (?:{PROGRAM}|# needs ).*\n(?:^    .*\n)*)", doc[0] if doc else "", re.MULTILINE)
    lines = [line[4:] for paragraph in paragraphs for line in paragraph.splitlines()]
    return list(_lines("\n".join(lines), path.name, {}))


def in_passing(path: Path) -> list[Shown]:
    """The commands that the sentences of a file name in backticks, whole or in part."""
    text = BLOCK.sub("", path.read_text())
    named = [shlex.split(each) for each in re.findall(rf"`({PROGRAM}[^`]+)`", text)]
    for words in named:
        if words[0] in ("torchrun", "accelerate") and not any(word.endswith(".py") for word in words):
            words += ["train.py", "CONFIG"]  # an option of a launcher by itself
    return [Shown(path.name, tuple(word for word in words if word != "…")) for words in named]


def _lines(text: str, place: str, variables: dict[str, str]) -> Iterator[Shown]:
    needs = frozenset[str]()
    for line in re.sub(r"\\\n *", "", text).splitlines():
        comment = re.search(r"(?:^|\s)# needs ([^;]*)", line)
        own = needs | _needs(comment[1], place) if comment else needs
        words = shlex.split(Template(line).safe_substitute(variables), comments=True)
        words = words[: words.index(">")] if ">" in words else words  # the shell's own
        if not line.strip():
            needs = frozenset()
        elif not words:
            needs = own
        elif all(re.match(r"[A-Z]+=", word) for word in words):
            variables |= dict(word.split("=", 1) for word in words)
        else:
            yield Shown(place, tuple(words), own)


def _needs(text: str, place: str) -> frozenset[str]:
    named = frozenset(re.split(r", | and ", text.strip()))
    assert named <= NEEDS, f"{place}: {sorted(named - NEEDS)} is none of {sorted(NEEDS)}"
    return named
