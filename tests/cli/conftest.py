"""The command in this process, small settings for it, and what to sample from and damage."""

import json
import shutil
from pathlib import Path

import pytest

from dit_moe.cli import main
from dit_moe.data import DATASETS
from dit_moe.data.digits import DigitsConfig
from tests.npz_files import write_images

CONFIG = str(Path(__file__).parents[2] / "configs" / "digits.yaml")
SMALL = [
    "model.name=DiT-custom/4-4E2A",
    "model.width=32",
    "model.depth=2",
    "model.heads=2",
    "train.steps=4",
    "train.batch_size=8",
    "train.warmup_steps=0",
    "train.checkpoint_every=2",
    "train.sample_every=null",
    "sample.sampler.steps=2",
    "sample.count=10",
    "eval.images=20",
]


def cli(*words: object) -> int:
    """Exit code of ``dit-moe words…``, in this process."""
    try:
        return main([str(word) for word in words])
    except SystemExit as stop:  # argparse's own
        return int(stop.code or 0)


def evaluate(capsys, *words):
    """The report that `dit-moe eval` prints."""
    capsys.readouterr()
    assert cli("eval", *words) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def refuse(capsys, *words):
    """The one line that `dit-moe eval` ends with."""
    capsys.readouterr()
    assert cli("eval", *words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    return err


@pytest.fixture
def a_run(finished_run, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.fixture(scope="session")
def heldout():
    """100 held-out digits, (images [N, 8, 8, 1], labels)."""
    batch = DATASETS.build(DigitsConfig(), "heldout").__getitems__(range(100))
    return batch["images"].permute(0, 2, 3, 1).contiguous().numpy(), batch["labels"].numpy()


@pytest.fixture
def samples(heldout, tmp_path):
    """A folder with an images.npz of them."""
    folder = tmp_path / "samples"
    folder.mkdir()
    write_images(folder / "images.npz", *heldout)
    return folder
