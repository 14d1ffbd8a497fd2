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


def listed(capsys, *words):
    """{what a line begins with: the rest of it}"""
    assert main(["configs", *words]) == 0
    return dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())


def test_configs_begins_with_own_images_and_small_ones_and_has_a_line_for_each_large_folder(capsys):
    lines = listed(capsys)
    folders = [name for name in lines if name.endswith("/…")]
    names = list(lines)[: -len(folders)]
    assert names[0] == "my_images" and folders[:3] == ["imagenet256/…", "imagenet512/…", "lm/…"]
    for folder in folders:
        of_folder = listed(capsys, folder.removesuffix("/…"))
        assert lines[folder].startswith(f"{len(of_folder)} configs, see `dit-moe configs {folder[:-2]}`")
        names += of_folder
    assert sorted(names) == built_in.names() and all(len(text) > 20 for text in lines.values())


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["show"], "needs the name of a config"),
        (["digits"], "`dit-moe configs show digits` prints it"),
        (["imagenet"], "is no folder of built-in configs; did you mean"),
        (["imagenet256", "base"], "to print one say show base"),
    ],
)
def test_what_configs_cannot_list_says_what_it_can(words, problem, capsys):
    assert main(["configs", *words]) == 2 and problem in capsys.readouterr().err


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


def test_what_a_config_is_said_to_be_is_one_whole_sentence():
    names = [path.relative_to(built_in.FOLDER).with_suffix("") for path in built_in.FOLDER.rglob("*.yaml")]
    assert not [name for name in names if built_in.summary(name.as_posix()).endswith("al.")]
    assert built_in.summary("lm/tasks/svamp") == "SVAMP (Patel et al. 2021): arithmetic word problems."
