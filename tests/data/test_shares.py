"""Splits made by shares of one place of images."""

import pytest

from dit_moe.config import ConfigError
from dit_moe.data import DATASETS
from dit_moe.data.held_out import require_held_out
from tests.data.examples import CLASSES, class_files, save_huggingface, write_tar, write_tree

SPLITS = ("train", "heldout", "extractor")
MAKE = {  # data set: what puts so many images of each class into a folder, and returns its options
    "image_folder": lambda folder, each: {"path": str(write_tree(folder, class_files(each)))},
    "tars": lambda folder, each: {"path": str(write_tar(folder / "all.tar", class_files(each)).parent)},
    "huggingface": lambda folder, each: {"id": str(save_huggingface(folder / f"saved{each}", [0, 1] * each))},
}


@pytest.fixture(params=MAKE)
def kind(request):
    if request.param == "huggingface":
        pytest.importorskip("datasets")
    return request.param


def splits_of(kind, folder, each, **shares):
    options = {"heldout": 0.3, "reserve": 0.3} | shares
    config = DATASETS.config_class(kind)(**MAKE[kind](folder, each), **options)
    return {split: DATASETS.build(config, split) for split in SPLITS}


def content(dataset):
    return {dataset.locate(image): dataset.read(image) for image in range(len(dataset))}


def test_splits_by_share_are_disjoint_and_make_up_the_whole_and_images_that_come_later_move_none(
    kind, tmp_path, capsys
):
    few, many = (
        {name: content(each) for name, each in splits_of(kind, tmp_path / "images", count).items()}
        for count in (10, 20)
    )
    found = splits_of(kind, tmp_path / "images", 20)
    assert {name: len(each) for name, each in found.items()} == found["train"].split_counts
    assert sum(found["train"].split_counts.values()) == 40
    assert all(each.class_names == CLASSES for each in found.values())
    assert len({each.fingerprint for each in found.values()}) == 3
    require_held_out(found["train"], found["heldout"])
    locations = [set(each) for each in many.values()]
    assert len(set.union(*locations)) == 40 == sum(map(len, locations))
    for name in SPLITS:
        assert set(few[name].values()) <= set(many[name].values())
    counts = found["train"].split_counts
    said = f"{counts['train']} images are trained on, {counts['heldout']} images are held out"
    assert f"{said}, {counts['extractor']} images are reserved for the feature extractor" in capsys.readouterr().err


def test_shares_that_leave_a_split_or_a_class_nothing_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"heldout=0.001 and .* leave none of its 8 images to the split held"):
        splits_of("image_folder", tmp_path, 4, heldout=0.001)
    with pytest.raises(ConfigError, match=r"heldout=0.7 and reserve=None leave no image to train on of the class bee"):
        splits_of("image_folder", tmp_path, 4, heldout=0.7, reserve=None)
    for shares in ({"heldout": 1.0}, {"heldout": 0.5, "reserve": 0.5}, {"reserve": 0.0}):
        with pytest.raises(ConfigError, match=r"must be above 0 and below 1|leaves nothing to train on"):
            splits_of("image_folder", tmp_path, 4, **shares)


def test_images_beside_a_held_out_folder_can_be_reserved_too(tmp_path):
    heldout = write_tree(tmp_path / "heldout", class_files(3, first=50))
    found = splits_of("image_folder", tmp_path / "images", 20, heldout=str(heldout))
    assert len(found["heldout"]) == 6 and found["train"].split_counts.keys() == {"train", "extractor"}
    assert len(found["train"]) + len(found["extractor"]) == 40
