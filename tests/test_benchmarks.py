"""Every script in benchmarks/ runs, in its smallest form, and prints its measurements."""

import importlib
import json
import multiprocessing.dummy
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OTHERS = ("__init__", "_timing", "report")  # what they share, and the tables of what they print
NAMES = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if path.stem not in OTHERS)
SMALLEST = {  # by name: words, and how many lines it prints
    "controller": ("--images 1 --steps 12 --laws scheduled,0.2,0.3", 8),
    "controller_training": (
        "--steps 20 --cases 4,2 --p0 0.5 --set model.width=16 model.heads=2 model.depth=2 train.batch_size=32",
        1,
    ),
    "diffmoe_evaluation": (
        "--steps 2 --images 32 --set model.width=16 model.heads=2 model.depth=2 train.batch_size=32",
        1,
    ),
    "memory": ("--models DiT-S/32,DiT-S/32-4E2A --batch 2 --dtypes fp32", 2),
    "metrics": ("--dim 32 --samples 40 --reference 50", 12),
    "moe_layer": ("--shapes 16,4,2,8,32 --routers dtopp,topk --dtypes fp32,bf16 --turns 1", 4),
    "olmoe": ("--width 64 --depth 1 --experts 4 --active 2 --expert-hidden 16 --length 8 --repeats 1", 2),
    "reading": ("--images 300 --files 2 --batches 1", 4),
    "routing": ("--shapes 16,4,2,8,32 --routers dtopp --dtypes bf16 --turns 1", 1),
    "sampling": ("--model DiT-S/16 --images 1 --steps 2 --dtypes fp32 --turns 1", 1),
    "side_by_side": ("--jobs 2 --steps 2 --set model.width=16 model.heads=2 model.depth=1 train.batch_size=8", 1),
    "streaming": ("--images 20 --size 16", 1),
    "train_step": ("--models DiT-S/32,DiT-S/32-4E2A --batch 2 --dtypes fp32 --turns 1", 1),
    "upcycling": (
        "--steps 2 --added 1 --seeds 1 --set model.width=16 model.heads=2 model.depth=1 train.batch_size=8",
        6,
    ),
}


def printed(name, words, monkeypatch, capsys):
    """The lines of JSON that a script prints, in this process."""
    script = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: multiprocessing.dummy)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *words.split()])
    capsys.readouterr()
    script.main()
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_prints_what_it_measured(name, monkeypatch, capsys):
    words, lines = SMALLEST[name]
    assert len(printed(name, words, monkeypatch, capsys)) == lines


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_has_the_options_that_it_and_the_guides_name(name, monkeypatch, capsys):
    texts = [(ROOT / "benchmarks" / f"{name}.py").read_text(), *(path.read_text() for path in ROOT.glob("docs/*.md"))]
    commands = re.findall(rf"python -m benchmarks\.{name}\b((?:[^`\n]|\n +\[)*)", "\n".join(texts))
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module(f"benchmarks.{name}").main()
    options = set(re.findall(r"--[\w-]+", capsys.readouterr().out.partition("usage:")[2].partition("\n\n")[0]))
    assert commands and set(re.findall(r"--[\w-]+", " ".join(commands))) <= options


def test_tables_have_a_row_for_each_line_and_what_lines_share_above_them(tmp_path, monkeypatch, capsys):
    lines = [{"benchmark": "layer", "shape": [2, 3], "times": {"a": i, "b": 0.5}, "machine": "m"} for i in (1, 2)]
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, lines[0] | {"machine": "other"}]))
    script = importlib.import_module("benchmarks.report")
    monkeypatch.setattr(sys, "argv", ["report.py", str(path)])
    script.main()
    first, second = capsys.readouterr().out.split("### layer\n")[1:]
    above, _, *table = first.strip().split("\n")
    assert above == "shape 2, 3, times b 0.5, machine m"
    assert [row.strip("| ") for row in table] == ["times a", "------:", "1", "2"]
    assert "machine other" in second
