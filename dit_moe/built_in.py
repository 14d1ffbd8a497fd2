"""The configs and studies that come with the package, by name: `digits` is configs/digits.yaml.

They lie at the top of a checkout, and inside an installed package.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from dit_moe.files import NEAREST, missing
from dit_moe.schema import ConfigError

_HERE = Path(__file__).resolve().parent
FOLDER = next((folder for folder in (_HERE / "configs", _HERE.parent / "configs") if folder.is_dir()), _HERE)
_PARTS_OF_OTHERS = "lm/tasks/"  # task definitions of lm-evaluation-harness, no configs of ours


def names(below: str = "") -> list[str]:
    """Of all built-in configs, ``studies/digits`` for one, or of those in the folder `below`, relative to it."""
    found = (path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.yaml"))
    found = (name for name in found if name.startswith(below) and not name.startswith(_PARTS_OF_OTHERS))
    return sorted(name.removeprefix(below) for name in found)


def by_folder() -> dict[str, list[str]]:
    """The names of all, sorted; those at the top under ""."""
    found: dict[str, list[str]] = {}
    for name in names():
        found.setdefault(name.rpartition("/")[0], []).append(name)
    return found


def find(word: str | Path, *, beside: Path = Path(), below: str = "", kind: str = "config") -> Path:
    """The file that `word` means: one in the folder `beside`, or else a built-in one, of the folder `below`.

    ConfigError, with the nearest names of both, if there is neither; `kind` is what it calls what was looked for.
    """
    path, known = beside / word, names(below)
    if path.exists() and (path.is_file() or str(word) not in known):  # what is no file is refused where it is read
        return path
    if str(word) in known:
        return FOLDER / f"{below}{word}.yaml"
    name = re.sub(r"^(.*/)?configs/|\.ya?ml$", "", str(word)).removeprefix(below)
    near = difflib.get_close_matches(name, known, NEAREST)
    hint = f": did you mean {' or '.join(map(repr, near))}?" if near else ":"
    remedy = f"name a file or a built-in {kind}{hint} `dit-moe configs` lists them"
    raise ConfigError(str(path), f"{missing(path).removeprefix(str(path))}; {remedy}")


def name_of(path: Path) -> str | None:
    """What a built-in config is called; None for any other file."""
    path = path.resolve()
    return path.relative_to(FOLDER).with_suffix("").as_posix() if path.is_relative_to(FOLDER) else None


def summary(name: str) -> str:
    """The first sentence of the comment that a built-in config begins with."""
    comment = re.match(r"(#.*\n)*", (FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    text = " ".join(line.removeprefix("#").strip() for line in (comment[0] if comment else "").splitlines())
    return re.split(r"(?<=\.) (?![a-z0-9])", text)[0]  # not behind "et al."


def to_copy(name: str) -> str:
    """The text of a built-in config, in which the files that it builds on are named so that it works anywhere."""
    path = find(name)
    folder = path.parent

    def anywhere(match: re.Match[str]) -> str:
        other = folder / match[0]
        return (name_of(other) or match[0]) if other.is_file() else match[0]

    return re.sub(r"[\w./-]+\.yaml", anywhere, path.read_text(encoding="utf-8"))
