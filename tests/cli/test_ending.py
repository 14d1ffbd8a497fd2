"""A command ends, on stderr, with where its results are and with commands that go on from them."""

import shlex
import shutil
import signal

import pytest

from dit_moe.cli import main
from dit_moe.cli.ending import end, scoring
from dit_moe.cli.sample import _to_go_on
from dit_moe.training import Interrupted
from tests.cli.conftest import CONFIG, SMALL, cli


def next_commands(err: str) -> list[list[str]]:
    """The words after `dit-moe` of each."""
    lines = err[err.index("\nnext ") :].splitlines()[1:]
    return [shlex.split(line[9:])[1:] for line in lines]


def test_results_are_named_with_their_sizes_and_commands_are_quoted_for_the_shell(tmp_path, capsys, monkeypatch):
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / "x").write_bytes(bytes(1500))
    (tmp_path / "a b" / "y").hardlink_to(tmp_path / "a b" / "x")
    monkeypatch.chdir(tmp_path)
    end([tmp_path / "a b", tmp_path / "not made"], ("sample", tmp_path / "a b"), ("eval", "x"))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        f"results  {tmp_path}/a b (1.5 kB)",
        f"next     dit-moe sample '{tmp_path}/a b'",
        "         dit-moe eval x",
    ]
    monkeypatch.setenv("RANK", "1")
    end([tmp_path])
    assert capsys.readouterr().err == "", "another process than the first"


@pytest.mark.parametrize("error", [Interrupted(signal.SIGTERM, "it is saved"), KeyboardInterrupt()])
def test_a_command_that_is_interrupted_ends_with_the_words_that_go_on(tmp_path, capsys, monkeypatch, error):
    def stop(*given):
        raise error

    monkeypatch.setattr("dit_moe.cli.train.train", stop)
    words = ["train", CONFIG, *SMALL, "--run", str(tmp_path / "a run")]
    assert main(words) in (130, 143)
    assert next_commands(f"\n{capsys.readouterr().err}") == [words]
    monkeypatch.setenv("RANK", "0")
    assert main(words) != 0 and "next" not in capsys.readouterr().err, "a launcher's own words go on"


@pytest.mark.parametrize("save", ["npz", "png", "grid"])
def test_the_command_that_sample_ends_with_measures_what_was_sampled(a_run, tmp_path, capsys, save):
    assert cli("sample", a_run, "count=20", "--save", save, "--out", tmp_path / "out of it") == 0
    ((command, measured, *rest),) = next_commands(capsys.readouterr().err)
    assert command == "eval" and (measured == str(a_run) if save == "grid" else "out of it" in measured)
    assert rest == [] if save == "grid" else rest[0] == "digits"
    if save == "npz":
        assert main([command, measured, *rest]) == 0


def test_what_was_sampled_from_a_checkpoint_that_lies_by_itself_is_named_where_it_is(a_run, tmp_path, capsys):
    copy = shutil.copytree(a_run / "checkpoints" / "step_00000004", tmp_path / "step_00000004")
    assert cli("sample", copy, "count=2", "--save", "npz") == 0
    assert f"results  {tmp_path}/images.npz (" in capsys.readouterr().err


def test_after_a_few_images_of_listed_classes_there_is_nothing_to_measure_and_own_images_are_measured_by_the_run(
    tmp_path,
):
    data, files = {"name": "image_folder", "path": str(tmp_path)}, [tmp_path / "images.npz"]
    many = {"count": 100, "labels": "balanced"}

    def following(sample, **changes):
        return _to_go_on({"eval": {}, "data": data | changes, "sample": sample}, tmp_path / "run", files)

    measured = [("eval", tmp_path / "run")]
    assert following(many) == measured
    assert following({"count": 16, "labels": ["cat"]}) == []
    assert following({"count": 100, "labels": ["cat"]}) == measured


def test_a_run_is_measured_only_where_the_images_that_it_names_are(tmp_path):
    run, data = tmp_path / "run", {"name": "image_folder", "path": str(tmp_path)}
    gone, latents = {"path": str(tmp_path / "gone")}, {"name": "latents", "path": str(tmp_path)}

    def following(reference=None, **sections):
        return scoring("eval", {"eval": {"reference": reference}, "data": data, **sections}, run)

    assert following() == following(data={"name": "digits"}) == following("digits", data=latents) == [("eval", run)]
    assert following(data=latents, encode={"images": data}) == [("eval", run)]
    assert following(data=data | gone) == following(data=latents) == []
    assert following(data=latents, encode={"images": data | gone}) == []
    text = {"eval": {}, "data": gone}
    assert scoring("perplexity", text, run) == [] != scoring("perplexity", text | {"data": data}, run)
