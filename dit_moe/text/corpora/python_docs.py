"""English that every Python has: its language reference (`pydoc_data.topics`) and the standard library's docstrings."""

from __future__ import annotations

import ast
import hashlib
import json
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from dit_moe.text.corpora import CORPORA, Corpus

HELD_OUT = 10  # one document of so many
SHORT = 60  # letters; paragraphs below it may repeat: "Example:"
NO_PROSE = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "pydoc_data", "site-packages"}


@dataclass(frozen=True, kw_only=True)
class PythonDocsConfig:
    """About 2 MB; which text it is depends on the version of Python."""


@CORPORA.register("python_docs", PythonDocsConfig)
class PythonDocs(Corpus):
    """A document is a topic, or the docstrings of a module. Its name decides the split it is in.

    Paragraphs that repeat in the original come once, so that no held-out text is trained on.
    """

    def __init__(self, config: PythonDocsConfig, split: str) -> None:
        super().__init__(split)
        self.texts = {name: text for name, text in _all().items() if is_held_out(name) == (split == "heldout")}
        self.fingerprint = hashlib.sha256(json.dumps(self.texts).encode()).hexdigest()
        self.size = sum(len(text.encode()) for text in self.texts.values())

    def read(self, start: int) -> Iterator[tuple[str, str]]:
        yield from list(self.texts.items())[start:]


def is_held_out(name: str) -> bool:
    """Whether a document is in the split `heldout`."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT == 0


@lru_cache(maxsize=1)  # parsing takes seconds, and both splits need it
def _all() -> dict[str, str]:
    """Every document by its name, in order."""
    from pydoc_data.topics import topics

    seen: set[str] = set()
    found = {f"topic {name}": _unseen(text, seen) for name, text in sorted(topics.items())}
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        names = [part for part in parts if part != "__init__"]
        left_out = any(part in NO_PROSE or part.startswith("_") for part in names)
        if parts[0] in sys.stdlib_module_names and not left_out:
            name = ".".join(names)
            found[f"module {name}"] = _docstrings(ast.parse(path.read_bytes()), name, seen)
    return {name: text for name, text in found.items() if text}


def _docstrings(tree: ast.Module, module: str, seen: set[str]) -> str:
    """The docstrings of a module that were not `seen` yet, each under the name of what it describes."""
    written: list[str] = []

    def visit(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> None:
        text = _unseen(ast.get_docstring(node) or "", seen)
        if text:
            written.append(f"{name}\n\n{text}\n")
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                visit(child, f"{name}.{child.name}")

    visit(tree, module)
    return "\n".join(written)


def _unseen(text: str, seen: set[str]) -> str:
    """`text` without the long paragraphs that were `seen`; nothing if only headings would be left of it."""
    if text in seen:
        return ""
    paragraphs = text.split("\n\n")
    keys = [" ".join(paragraph.split()) for paragraph in paragraphs]
    new = [len(key) < SHORT or key not in seen for key in keys]
    lost_all = not all(new) and not any(fresh and len(key) >= SHORT for fresh, key in zip(new, keys, strict=True))
    seen.update([text, *keys])
    return "" if lost_all else "\n\n".join(each for each, fresh in zip(paragraphs, new, strict=True) if fresh)
