"""The configs and studies that come with the package, found by name."""

import pytest

from dit_moe import built_in, config
from dit_moe.cli import main
from dit_moe.config import ConfigError
from dit_moe.studies.study import experiments_of, load_study
from dit_moe.tasks.train import load, run_folder

XL = "imagenet256/DiT-XL-2-8E2A"


@pytest.mark.parametrize("name", ["digits", XL, "lm/LM-1.3B-64E8A-topp0.40"])
def test_a_built_in_config_is_found_by_name_and_runs_in_a_folder_of_that_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load(name) == load(built_in.FOLDER / f"{name}.yaml")
    assert str(run_folder(built_in.find(name))) == str(run_folder(name)) == f"runs/{name}"


def test_a_file_of_that_name_wins_and_may_build_on_the_built_in_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lm").mkdir()  # a folder is no config
    (tmp_path / "digits").write_text("base: [imagenet256/base, digits_ddpm]\nseed: 7\n")
    tree = config.load(tmp_path / "digits")
    assert tree["seed"] == 7 and tree["model"]["num_classes"] == 1000 and tree["data"]["name"] == "digits"


@pytest.mark.parametrize(
    "word, nearest",
    [
        ("digit", "'digits'"),
        ("configs/digits.yaml", "'digits'"),
        ("DiT-XL-2-8E2A", f"'{XL}'"),
        ("lm_tiny.yml", "'lm_tiny'"),
    ],
)
def test_a_wrong_name_lists_the_nearest(word, nearest, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rf"^{word} does not exist; .*did you mean .*{nearest}.*`dit-moe configs`"):
        config.load(word)


def test_configs_lists_each_with_one_line(capsys):
    assert main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == built_in.names()
    assert all(len(line) > len(name) + 20 for line, name in zip(lines, built_in.names(), strict=True))
    assert main(["configs", "show"]) == 2 and "needs the name of a config" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["digits_topk", XL, "lm/LM-0.4B-64E8A-topk", "studies/digits"])
def test_a_config_that_is_shown_says_the_same_in_any_folder(name, tmp_path, capsys):
    assert main(["configs", "show", name]) == 0
    copy = tmp_path / "copy.yaml"
    copy.write_text(capsys.readouterr().out)
    assert copy.read_text().splitlines()[0] == (built_in.FOLDER / f"{name}.yaml").read_text().splitlines()[0]
    if name.startswith("studies/"):
        own, other = (experiments_of(load_study(path), path.parent) for path in (copy, built_in.find(name)))
        assert own == other
    else:
        assert config.load(copy) == config.load(name)
