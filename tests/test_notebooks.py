"""The notebooks run from top to bottom, and are committed with the outputs of a run that did."""

import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
SMALL = {"first_steps": "steps, per_class, evaluated, run = 2, 1, 10, 'run'"}  # in place of the cell of parameters
LARGEST = 300_000  # bytes


def code_cells(name):
    cells = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_every_notebook_is_run():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == SMALL.keys()


@pytest.mark.parametrize("name", SMALL)
def test_a_notebook_runs_from_top_to_bottom(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    names: dict = {}
    for cell in code_cells(name):
        given = "parameters" in cell["metadata"].get("tags", ())
        exec(SMALL[name] if given else "".join(cell["source"]), names)
    assert names["model"].step == 2 and len(names["images"]) == 10 and names["report"].flat()


@pytest.mark.parametrize("name", SMALL)
def test_a_notebook_is_committed_with_its_outputs_small_and_without_paths_or_errors(name):
    path = FOLDER / f"{name}.ipynb"
    assert path.stat().st_size < LARGEST and "/site-packages/" not in path.read_text(encoding="utf-8")
    cells = code_cells(name)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not any(output["output_type"] == "error" for output in outputs)
    assert sum("image/png" in output.get("data", ()) for output in outputs) >= 3
