"""``dit-moe sample --save``."""

import json

from dit_moe.diffusion import SamplingError
from dit_moe.sampling.generator import Generator
from tests.cli.conftest import cli


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_the_command_writes_the_kinds_named_and_says_which(finished_run, tmp_path):
    out = tmp_path / "out"
    assert cli("sample", finished_run, "count=15", "--save", "png,npz", "--out", out) == 0
    assert names(out) == {"png", "images.npz", "sample.json"}
    assert json.loads((out / "sample.json").read_text())["files"] == ["png", "images.npz"]
    assert len(list((out / "png").glob("*.png"))) == 15
    assert cli("sample", finished_run, "count=4", "--save", "png", "--out", out) == 0
    assert names(out / "png") == {*(f"{i:06d}.png" for i in range(4)), "labels.json"}
    assert json.loads((out / "sample.json").read_text())["files"] == ["png"]


def test_an_unknown_kind_is_a_mistake_that_makes_no_folder(finished_run, tmp_path, capsys):
    assert cli("sample", finished_run, "--save", "gif", "--out", tmp_path / "out") == 2
    assert "error: --save=gif: 'gif' is no kind of output" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_sampler_that_fails_midway_leaves_no_half_of_a_set(finished_run, tmp_path, monkeypatch, capsys):
    batches = Generator.batches

    def failing(self, *args):
        yield from [next(batches(self, *args))]
        raise SamplingError("the latents are not finite")

    monkeypatch.setattr(Generator, "batches", failing)
    assert cli("sample", finished_run, "count=10", "batch_size=5", "--save", "npz,png,grid", "--out", tmp_path) == 1
    assert "failed: the latents are not finite" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
