"""Grids of samples during training."""

import pytest
from PIL import Image

from dit_moe.diffusion import SamplingError
from dit_moe.sampling.generator import Generator
from tests.cli.conftest import CONFIG, SMALL, cli


def test_a_grid_is_saved_every_so_many_steps(tmp_path):
    assert cli("train", CONFIG, "--run", tmp_path, *SMALL, "train.sample_every=2") == 0
    assert [path.name for path in sorted((tmp_path / "samples").iterdir())] == [
        "step_00000002.png",
        "step_00000004.png",
    ]
    assert Image.open(tmp_path / "samples" / "step_00000004.png").size[1] > 32


@pytest.mark.parametrize("error", [ValueError, SamplingError])
def test_a_grid_that_cannot_be_made_is_a_warning_and_the_run_goes_on(tmp_path, capsys, monkeypatch, error):
    def refuse(*args, **kwargs):
        raise error("the latents are not finite")

    monkeypatch.setattr(Generator, "batches", refuse)
    assert cli("train", CONFIG, "--run", tmp_path, *SMALL, "train.sample_every=3") == 0
    assert "warning: no samples at step 3: the latents are not finite" in capsys.readouterr().err
    assert (tmp_path / "checkpoints" / "step_00000004").is_dir()
    assert not (tmp_path / "samples").exists()
