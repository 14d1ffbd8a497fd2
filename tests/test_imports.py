"""Who may import whom: the layers of the package, function-local imports included."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dit_moe"
BOTTOM = {"registry", "yaml_text", "config", "randomness", "files", "locks", "precision", "rounding"}
MAY_IMPORT = {
    "registry": set(),
    "yaml_text": set(),
    "config": {"registry", "yaml_text"},
    "randomness": set(),
    "files": set(),
    "locks": {"files"},
    "precision": set(),
    "rounding": set(),
    "moe": BOTTOM,
    "models": BOTTOM | {"moe"},
    "diffusion": BOTTOM,
    "data": BOTTOM,
    "latents": BOTTOM | {"processes", "data"},
    "extractors": BOTTOM,
    "metrics": BOTTOM,
    "processes": BOTTOM,
    "checkpoint": BOTTOM,
    "pictures": BOTTOM,
    "figures": BOTTOM,
    "text": BOTTOM | {"processes", "data", "moe", "models"},
    "interop": BOTTOM | {"moe", "models", "text", "checkpoint", "text_runs"},
    "text_experiment": BOTTOM | {"moe", "models", "text", "training", "experiment"},
    "text_runs": BOTTOM | {"moe", "models", "text", "checkpoint", "experiment", "text_experiment"},
    "training": BOTTOM | {"processes", "moe", "models", "diffusion", "latents", "data", "checkpoint"},
    "generate": BOTTOM | {"moe", "models", "diffusion", "latents", "checkpoint"},
    "evaluation": BOTTOM
    | {"processes", "moe", "data", "diffusion", "latents", "checkpoint", "generate", "extractors", "metrics"},
    "experiment": BOTTOM | {"moe", "models", "diffusion", "latents", "data", "training", "generate", "evaluation"},
    "costs": BOTTOM
    | {"moe", "models", "diffusion", "data", "latents", "text", "training", "experiment", "text_experiment"},
    "runs": BOTTOM | {"models", "diffusion", "latents", "checkpoint", "experiment", "generate"},
    "analysis": BOTTOM
    | {"processes", "moe", "models", "diffusion", "data", "latents", "text", "generate", "runs", "text_runs"}
    | {"experiment", "text_experiment", "figures", "pictures", "costs"},
    "studies": BOTTOM
    | {"checkpoint", "moe", "diffusion", "evaluation", "training", "experiment", "text_experiment"}
    | {"figures", "pictures"},
    "cli": BOTTOM | {"commands", "processes", "training", "diffusion", "latents", "text"},
}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    """The parts of dit_moe that a file imports anywhere in it."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the layer"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("dit_moe.")}


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_from_the_layers_below_it(path):
    part = part_of(path)
    if part == "commands":  # the top: may use everything but the console command that calls it
        assert "cli" not in imported_parts(path)
        return
    assert part in MAY_IMPORT, f"give {part} a place in the layers"
    assert imported_parts(path) - {part} <= MAY_IMPORT[part]


def test_the_layers_have_no_cycle():
    order: list[str] = []
    waiting = dict(MAY_IMPORT)
    while waiting:
        free = [part for part, below in waiting.items() if below - {"commands"} <= set(order)]
        assert free, f"cycle among {sorted(waiting)}"
        order += free
        for part in free:
            del waiting[part]


def test_scripts_are_thin():
    root = PACKAGE.parent
    for script in [root / "train.py", root / "sample.py", *(root / "eval").glob("*.py")]:
        assert len(script.read_text().splitlines()) <= 60, script
