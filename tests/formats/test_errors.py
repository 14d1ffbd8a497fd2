"""What cannot be imported is refused in one line, before anything is written."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dit_moe.formats import home_of
from dit_moe.formats.sources import holds_weights, is_source
from tests.cli.conftest import cli
from tests.formats.files import HEADS, bare, of_training, weights_of

RAN = []


class Code:
    """An object whose loading would run code."""

    def __reduce__(self):
        return RAN.append, ("run",)


def refused(capsys, source, *words: object) -> str:
    """The one line that `dit-moe import` says, with what it leaves behind checked."""
    capsys.readouterr()
    run = source.parent / "run"
    assert cli("import", source, "--out", run, *words) == 2
    assert not run.exists()
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "pickle"])
def test_a_pickle_that_would_run_code_is_refused_without_running_it(tmp_path, capsys, zipped):
    path = tmp_path / "dit.pt"
    torch.save({"model": weights_of("dit"), "args": Code()}, path, _use_new_zipfile_serialization=zipped)
    assert "which are code and are not loaded" in refused(capsys, path)
    path.write_bytes(pickle.dumps(Code()))
    refused(capsys, path)
    assert RAN == []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"no weights", "is no file of weights"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    ],
)
@pytest.mark.parametrize("name", ["dit.pt", "dit.safetensors"])
def test_what_is_no_file_of_weights_is_said_to_be_none(tmp_path, capsys, name, content, said):
    path = tmp_path / name
    path.write_bytes(content)
    assert said in refused(capsys, path)


def test_keys_that_are_missing_left_over_or_misshapen_are_listed_ten_and_the_count(tmp_path, capsys):
    weights = weights_of("dit")
    weights["final_layer.adaLN_modulation.1.bias"] = torch.zeros(3)
    weights |= {f"extra.{number}": torch.zeros(1) for number in range(12)}
    for name in [name for name in weights if name.startswith("blocks.1.attn")]:
        del weights[name]
    torch.save(weights, tmp_path / "dit.pt")
    line = refused(capsys, tmp_path / "dit.pt", "--format", "dit", HEADS)
    assert "4 missing: blocks.1.attn.qkv.weight" in line
    assert "12 unexpected: extra.0, " in line and "extra.9 and 2 more" in line
    assert "final_layer.adaLN_modulation.1.bias [3] for [96]" in line


def test_weights_of_no_known_format_are_told_why_each_does_not_fit(tmp_path, capsys):
    save_file({"linear.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    line = refused(capsys, tmp_path / "other.safetensors")
    assert "dit: there is no tensor blocks.0.attn.qkv.weight" in line
    assert "diffusers: there is no tensor pos_embed.proj.weight" in line


def test_weights_of_two_formats_are_a_question(tmp_path, capsys):
    line = refused(capsys, bare(tmp_path / "dit.pt", "dit"), HEADS)
    assert "fits the formats dit and " in line and "sit" in line and "--format dit" in line


def test_weights_of_several_formats_are_a_question_also_where_the_folder_is_the_current_one(
    tmp_path, capsys, monkeypatch
):
    save_file(weights_of("dit"), tmp_path / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    assert cli("import", ".", "--out", tmp_path / "run", HEADS) == 2
    assert ". fits the formats dit and " in capsys.readouterr().err
    assert home_of(".") == Path("runs", tmp_path.name)


@pytest.mark.parametrize("average", [{"decay": 0.99, "shadow": weights_of("dit")}, list(weights_of("dit").values())])
def test_raw_weights_are_not_taken_for_averages_that_cannot_be_read(tmp_path, capsys, average):
    path = of_training(tmp_path / "dit.pt", "dit")
    torch.save(torch.load(path, weights_only=False) | {"ema": average}, path)
    assert "holds averaged weights as ema, in a layout that is not read" in refused(capsys, path, HEADS)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"pos_embed": torch.zeros(1, 16, 48, dtype=torch.int8)}, "1 of another kind: pos_embed int8 for float32"),
        ({"final_layer.linear.bias": torch.tensor(1.0)}, "final_layer.linear.bias has the shape []"),
        ({"x_embedder.proj.weight": torch.zeros(48, 4, 0, 0)}, "x_embedder.proj.weight has the shape [48, 4, 0, 0]"),
    ],
    ids=["kind", "scalar", "empty"],
)
def test_tensors_that_are_no_weights_are_named_before_a_run_is_made_of_them(tmp_path, capsys, changed, said):
    torch.save(weights_of("dit") | changed, tmp_path / "dit.pt")
    assert said in refused(capsys, tmp_path / "dit.pt", "--format", "dit", HEADS)


def test_heads_that_weights_do_not_tell_are_asked_for(tmp_path, capsys):
    path = of_training(tmp_path / "dit.pt", "dit")
    assert "model.heads" in refused(capsys, path)
    assert cli("sample", path, "model.heads=3") == 2  # which changes a run's section `sample` alone
    assert f"make a run of them that does, and name it instead: dit-moe import {path} model.heads=… --out RUN" in (
        " ".join(capsys.readouterr().err.split())
    )


def test_an_unknown_format_or_kind_of_weights_is_refused_by_its_name(tmp_path, capsys):
    path = of_training(tmp_path / "dit.pt", "dit")
    assert "--format did is not known; did you mean 'dit'?" in refused(capsys, path, "--format", "did")
    bare(path, "dit")
    assert "holds no weights of the kind model" in refused(capsys, path, "--weights", "model", "--format", "dit", HEADS)


def test_a_run_folder_that_holds_something_is_left_as_it_is(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    assert cli("import", of_training(tmp_path / "dit.pt", "dit"), "--out", tmp_path / "run", HEADS) == 2
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine.txt"]


def test_a_folder_of_several_files_without_an_index_is_a_question(tmp_path, capsys):
    for name in ("a", "b"):
        save_file(weights_of("dit"), tmp_path / f"{name}.safetensors")
    assert "holds 2 files of weights and no index" in refused(capsys, tmp_path)


def test_a_folder_that_holds_weights_beside_other_things_is_not_taken_for_them(tmp_path):
    bare(tmp_path / "mine.pt", "dit")
    assert not is_source(tmp_path)  # it may be a folder of images, but where a model is named it is one
    assert holds_weights(tmp_path)


def test_a_damaged_checkpoint_of_ours_is_not_taken_for_weights_of_another_suite(tmp_path, capsys):
    folder = tmp_path / "step_00000004"
    folder.mkdir()
    save_file(weights_of("dit"), folder / "model.safetensors")
    (folder / "config.yaml").touch()
    assert cli("sample", folder) == 2
    assert "state.json is missing" in capsys.readouterr().err


@pytest.mark.parametrize("listed", [None, {}, {"a": "../1.safetensors"}, {"a": 1, "b": []}])
def test_an_index_that_names_no_files_beside_it_is_refused(tmp_path, capsys, listed):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    refused(capsys, tmp_path)


def test_a_file_that_an_index_lists_and_is_not_there_is_named(tmp_path, capsys):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "1.safetensors"}}))
    assert is_source(tmp_path)
    assert "1.safetensors" in refused(capsys, tmp_path)


def test_an_import_holds_the_weights_that_its_config_samples(tmp_path, capsys):
    path = of_training(tmp_path / "dit.pt", "dit")
    assert "sample.weights=model: the run will hold one set" in refused(capsys, path, HEADS, "sample.weights=model")
