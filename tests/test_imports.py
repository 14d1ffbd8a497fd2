"""Who may import whom: the layers of the package, function-local imports included."""

import ast
from pathlib import Path

import pytest

from dit_moe.cli import COMMANDS

PACKAGE = Path(__file__).parent.parent / "dit_moe"
BOTTOM = {"registry", "yaml_text", "schema", "built_in", "extras", "plugins", "config", "randomness"}
BOTTOM |= {"files", "json_files", "locks", "formatting", "weights", "downloads"}
CORE = BOTTOM | {"moe", "models", "diffusion", "data", "autoencoders", "text", "checkpoint", "distributed", "shards"}
CORE |= {"formats"}
ABOVE = CORE | {"training", "sampling", "experiments", "extractors", "metrics", "progress", "plotting", "pictures"}
MAY_IMPORT = {
    "registry": set(),
    "yaml_text": set(),
    "schema": {"registry"},
    "built_in": {"schema", "files"},
    "extras": set(),
    "plugins": {"schema"},
    "config": {"registry", "yaml_text", "schema", "built_in"},
    "randomness": set(),
    "files": {"formatting"},
    "json_files": {"config", "files"},
    "locks": {"files", "formatting"},
    "formatting": set(),
    "weights": {"files"},
    "downloads": {"config", "formatting"},
    "distributed": BOTTOM,
    "checkpoint": BOTTOM,
    "plotting": BOTTOM,
    "pictures": BOTTOM,
    "progress": BOTTOM | {"distributed"},
    "shards": BOTTOM | {"distributed"},
    "moe": BOTTOM,
    "models": BOTTOM | {"moe"},
    "diffusion": BOTTOM,
    "data": BOTTOM | {"distributed", "shards", "progress"},
    "autoencoders": BOTTOM | {"distributed", "shards", "data", "progress", "pictures"},
    "extractors": BOTTOM,
    "metrics": BOTTOM,
    "text": BOTTOM | {"distributed", "shards", "data", "moe", "models", "progress"},
    "formats": BOTTOM
    | {"moe", "models", "diffusion", "autoencoders", "data", "text", "checkpoint", "shards", "sampling"},
    "training": BOTTOM
    | {"distributed", "moe", "models", "diffusion", "autoencoders", "data", "checkpoint", "plotting", "progress"}
    | {"formats"},
    "sampling": BOTTOM
    | {"distributed", "moe", "models", "diffusion", "autoencoders", "data", "checkpoint", "progress", "pictures"},
    "experiments": CORE | {"training", "sampling", "extractors", "metrics"},
    "costs": CORE | {"training", "experiments"},
    "interop": CORE | {"experiments", "sampling", "pictures"},
    "evaluation": ABOVE | {"costs", "interop"},
    "tasks": ABOVE | {"costs", "interop", "evaluation"},
    "analysis": ABOVE | {"costs", "tasks"},
    "studies": ABOVE | {"costs", "interop", "evaluation", "tasks"},
    "api": ABOVE | {"costs", "interop", "evaluation", "tasks"},
    "cli": ABOVE | {"costs", "interop", "evaluation", "tasks", "analysis", "studies"},
}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_names(path: Path) -> list[str]:
    """The modules that a file imports anywhere in it, and whatever it imports from them, by their dotted names."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the layer"
            names += [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


def imported_parts(path: Path) -> set[str]:
    """The parts of dit_moe that a file imports anywhere in it."""
    names = imported_names(path)
    return {name.split(".")[1] for name in names if name.startswith("dit_moe.")}


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_from_the_layers_below_it(path):
    part = part_of(path)
    assert part in MAY_IMPORT, f"give {part} a place in the layers"
    assert imported_parts(path) - {part} <= MAY_IMPORT[part]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_text_is_read_and_written_as_utf_8_whatever_the_locale(path):
    for call in [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]:
        name = getattr(call.func, "attr", "")
        mode = next((each.value for each in call.args if isinstance(each, ast.Constant)), "")
        if name in ("read_text", "write_text") or (name == "open" and set(str(mode)) & set("ax")):
            binary = name == "open" and "b" in str(mode)
            assert binary or any(each.arg == "encoding" for each in call.keywords), f"{path}:{call.lineno}"


def test_no_command_imports_another():
    commands = {f"dit_moe.cli.{module}" for module, *_ in COMMANDS.values()}
    for path in (PACKAGE / "cli").glob("*.py"):
        assert not commands & set(imported_names(path)), path


def test_the_layers_have_no_cycle():
    order: list[str] = []
    waiting = dict(MAY_IMPORT)
    while waiting:
        free = [part for part, below in waiting.items() if below & set(MAY_IMPORT) <= set(order)]
        assert free, f"cycle among {sorted(waiting)}"
        order += free
        for part in free:
            del waiting[part]


def test_scripts_are_thin():
    root = PACKAGE.parent
    for script in [root / "train.py", root / "sample.py", *(root / "eval").glob("*.py")]:
        assert len(script.read_text().splitlines()) <= 60, script
