import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dit_moe.commands import evaluate
from dit_moe.data import DATASETS
from dit_moe.data.digits import DigitsConfig
from dit_moe.metrics import write_images

SCRIPT = Path(__file__).parents[2] / "eval" / "fid.py"


@pytest.fixture
def run_folder(tmp_path):
    """A folder with an images.npz of 100 real digits."""
    dataset = DATASETS.build(DigitsConfig(), "heldout")
    batch = dataset.__getitems__(range(100))
    folder = tmp_path / "run"
    folder.mkdir()
    write_images(folder / "images.npz", batch["images"].permute(0, 2, 3, 1).numpy(), batch["labels"].numpy())
    return folder


def run(*arguments):
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    evaluate.run(parser.parse_args(list(map(str, arguments))))


def test_the_script_prints_json_to_stdout_and_a_table_to_stderr(run_folder):
    command = [sys.executable, SCRIPT, run_folder, "--reference", "digits", "--extractor", "digits_cnn64"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert report["fd_digits_cnn64"]["n"] == 100 and report["provenance"]["n_ref"] == 898
    assert "fd_digits_cnn64" in done.stderr and "held-out" in done.stderr


def test_the_script_ends_with_2_and_one_line_for_bad_input(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, tmp_path / "no.npz"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines() == [
        f"error: {tmp_path / 'no.npz'} does not exist; name an images.npz, or a folder that holds one"
    ]


def test_out_holds_what_stdout_shows(run_folder, tmp_path, capsys):
    run(run_folder, run_folder / "images.npz", "--out", tmp_path / "metrics.json")
    assert (tmp_path / "metrics.json").read_text() == capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.json", "run"]


def test_an_npz_can_be_the_reference(run_folder, capsys):
    run(run_folder, "--reference", run_folder / "images.npz")
    report = json.loads(capsys.readouterr().out)
    assert report["fd_digits_cnn64"]["generated"] == pytest.approx(0, abs=1e-9)
    assert report["fd_digits_cnn64"]["floor"] is None


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--reference", "digit"], "--reference digit is neither a file nor a dataset; did you mean 'digits'"),
        (["--reference", "gone.npz"], "gone.npz does not exist"),
        (["--extractor", "digits_cnn"], "unknown feature extractor 'digits_cnn'; did you mean 'digits_cnn64'"),
        (["--out", "no/where/m.json"], "--out no/where/m.json: the folder no/where does not exist"),
        (["--out", "."], "--out . is a folder; name a file"),
    ],
)
def test_a_bad_option_is_refused_naming_it(run_folder, arguments, message, capsys):
    with pytest.raises(ValueError, match=message):
        run(run_folder, *arguments)
    assert capsys.readouterr().out == ""


def test_bad_input_leaves_an_earlier_result_alone(run_folder, tmp_path):
    out = tmp_path / "metrics.json"
    out.write_text("earlier")
    np.savez(tmp_path / "nan.npz", arr_0=np.full((4, 8, 8, 1), np.nan))
    with pytest.raises(ValueError, match=r"nan.npz: image 0 holds NaN"):
        run(run_folder, tmp_path / "nan.npz", "--out", out)
    assert out.read_text() == "earlier"
