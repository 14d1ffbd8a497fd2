"""Two processes, started by torchrun as a user starts them, sample the same images as one."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.cli.conftest import cli
from tests.scripts import said

ROOT = Path(__file__).parents[2]


def test_images_do_not_depend_on_the_number_of_processes(finished_run, tmp_path):
    words = [str(finished_run), "count=7", "batch_size=3", "sampler={name: euler_maruyama, steps: 3}"]
    assert cli("sample", *words, "--out", tmp_path / "one") == 0
    said(ROOT / "sample.py", *words, "--out", tmp_path / "two", processes=2, torchrun=True)
    one, two = (np.load(tmp_path / name / "images.npz") for name in ("one", "two"))
    assert np.array_equal(one["arr_0"], two["arr_0"]) and np.array_equal(one["labels"], two["labels"])
    assert {path.name for path in (tmp_path / "two").iterdir()} == {"images.npz", "grid.png", "sample.json"}
    active = [json.loads((tmp_path / name / "sample.json").read_text())["active_experts"] for name in ("one", "two")]
    assert active[0] == pytest.approx(active[1])  # a token's experts may change with the rounding of a batch's GEMM
