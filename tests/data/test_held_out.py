"""Held-out images that are trained on: the same files, links to them and copies."""

import os
import shutil
from dataclasses import replace

import pytest

from dit_moe.config import ConfigError
from dit_moe.data import DATASETS
from dit_moe.data.held_out import require_held_out
from dit_moe.evaluation.sources import open_input
from tests.autoencoders.encoded import encode
from tests.cli.conftest import CONFIG, SMALL, cli
from tests.data.examples import class_files, example, keyed_files, write_tar, write_tree


def renamed(path, folder):
    for number, file in enumerate(sorted(path.rglob("*.png"))):
        place = folder / file.parent.name / f"other{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place)
    return folder


SAME = {  # held-out folders made of the folder that is trained on
    "itself": lambda path, folder: path,
    "relative": lambda path, folder: os.path.relpath(path),
    "link": lambda path, folder: folder.symlink_to(path) or folder,
    "link of a class": lambda path, folder: (
        write_tree(folder, class_files(2, first=90))
        and (shutil.rmtree(folder / "ant"), (folder / "ant").symlink_to(path / "ant"), folder)[-1]
    ),
    "copy": lambda path, folder: shutil.copytree(path, folder),
    "copy with other names": renamed,
}


@pytest.fixture
def images(tmp_path):
    return write_tree(tmp_path / "train", class_files(3))


@pytest.mark.parametrize("same", SAME)
def test_held_out_images_that_are_trained_on_are_refused_before_anything_is_made(same, images, tmp_path, capsys):
    heldout = SAME[same](images, tmp_path / "heldout")
    message = "heldout holds copies of images that are trained on; name" if "copy" in same else "which is trained on"
    given = f"{{name: image_folder, path: {images}, heldout: {heldout}, size: 8}}"
    with pytest.raises(ValueError, match=message):
        open_input(given)
    assert cli("train", CONFIG, "--run", tmp_path / "run", *SMALL, f"data={given}", "--dry-run") == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_other_images_are_no_copies_though_of_equal_names_and_sizes_and_those_in_part_are_counted(images, capsys):
    other = write_tree(
        images.with_name("other"), {name: bytes(reversed(each)) for name, each in class_files(3).items()}
    )
    config = DATASETS.config_class("image_folder")(path=str(images), heldout=str(other), size=8)
    trained = DATASETS.build(config, "train")
    heldout = DATASETS.build(config, "heldout")
    assert trained.fingerprint == heldout.fingerprint
    require_held_out(trained, heldout)
    capsys.readouterr()
    shutil.copy(images / "bee" / "001.png", other / "bee")
    require_held_out(trained, DATASETS.build(config, "heldout"))
    assert "1 of 6 held-out images that were looked at are trained on" in capsys.readouterr().err


def test_tars_and_latents_and_splits_that_are_trained_on_are_refused(tmp_path):
    tars = example("tars", tmp_path / "tars")
    both = replace(tars, heldout=str(tmp_path / "tars" / "part-[0-9].tar"))
    copy = write_tar(tmp_path / "copy.tar", keyed_files([0, 1, 1, 0, 0, 1, 1, 0]))
    encode(tmp_path / "latents")
    shutil.copytree(tmp_path / "latents", tmp_path / "again")
    latents = DATASETS.config_class("latents")(path=str(tmp_path / "latents"), heldout=str(tmp_path / "again"))
    for config in (both, replace(tars, heldout=str(copy)), latents):
        trained, heldout = (DATASETS.build(config, split) for split in ("train", "heldout"))
        with pytest.raises(ConfigError, match=r"^heldout h.*trained on.*; name images that are not trained on"):
            require_held_out(trained, heldout)
    with pytest.raises(ConfigError, match="heldout=validation is trained on; name another split, a share, or null"):
        DATASETS.config_class("huggingface")(id="x", train="validation")
