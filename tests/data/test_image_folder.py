"""Images in class folders."""

import os

import numpy as np
import pytest
import torch

from dit_moe.config import ConfigError
from dit_moe.data import DATASETS, BrokenImages, image_folder
from dit_moe.data.image_folder import ImageFolderConfig
from dit_moe.data.images import FORMATS
from tests.data.examples import class_files, encoded, pixels, write_tree

IMAGE = encoded(pixels(0))


@pytest.fixture
def tree(tmp_path):
    return write_tree(tmp_path / "tree", class_files(each=2))


def read(folder, split="train", **options):
    return DATASETS.build(ImageFolderConfig(path=str(folder), **options), split)


def test_classes_are_the_folders_in_order_and_images_come_class_by_class_in_order(tree):
    dataset = read(tree)
    rows = dataset.__getitems__(range(4))
    assert dataset.class_names == ("ant", "bee") and rows["labels"].tolist() == [0, 0, 1, 1]
    expected = np.stack([pixels(seed) for seed in (0, 1, 100, 101)]).transpose(0, 3, 1, 2)
    assert torch.equal(rows["images"], torch.from_numpy(expected))


def test_images_are_found_at_any_depth_with_any_known_extension_in_any_case(tmp_path):
    names = ["z.PNG", "a/b/c.JPEG", "a/b.jpg", "a-1.bmp", "ü.webp", "b.tiff", "b.tif", "c.ppm", "c.pgm", "\udcff.jpeg"]
    dataset = read(write_tree(tmp_path, {f"k/{name}": IMAGE for name in names}))
    found = [dataset.locate(i).removeprefix(f"{tmp_path}/k/") for i in range(len(dataset))]
    assert found == sorted(names)


def test_what_is_passed_over_is_not_in_the_fingerprint(tree):
    before = read(tree).fingerprint
    write_tree(
        tree, {"ant/._000.png": b"", "ant/.trash/a.png": b"", "ant/notes.txt": b"", ".git/a.png": b"", "a.txt": b""}
    )
    for name, target in (("ant/loop", "."), ("ant/all", ".."), ("again", "."), ("bee/other", "../ant")):
        (tree / name).symlink_to(target)
    dataset = read(tree)
    assert (len(dataset), dataset.class_names, dataset.fingerprint) == (4, ("ant", "bee"), before)


def test_folders_may_be_links(tree, tmp_path):
    (tmp_path / "linked").mkdir()
    for name in ("ant", "bee"):
        (tmp_path / "linked" / name).symlink_to(tree / name)
    assert read(tmp_path / "linked").fingerprint == read(tree).fingerprint


@pytest.mark.parametrize(
    "folders, labels, names",
    [
        (["3", "7", "9"], [3, 7, 9], tuple("0123456789")),
        (["0", "1", "10", "2"], [0, 1, 10, 2], tuple(map(str, range(11)))),
        (["000", "001"], [0, 1], ("000", "001")),
        (["10", "9", "cat"], [0, 1, 2], ("10", "9", "cat")),
        (["²", "1"], [1, 0], ("1", "²")),
    ],
)
def test_folders_that_are_whole_numbers_are_labels_and_others_are_numbered_in_order(tmp_path, folders, labels, names):
    trees = [write_tree(tmp_path / split, {f"{name}/0.png": IMAGE for name in folders}) for split in ("t", "h")]
    for split in ("train", "heldout"):
        dataset = read(trees[0], split, heldout=str(trees[1]))
        assert dataset.class_names == names and sorted(dataset.labels_N) == sorted(labels)
        assert [dataset.locate(i).split("/")[-2] for i in range(len(folders))] == sorted(folders)
        assert dataset.class_counts() == [labels.count(label) for label in range(len(names))]


def test_a_run_that_began_when_all_labels_were_in_sorted_order_goes_on_so(tmp_path):
    tree = write_tree(tmp_path, {f"{name}/0.png": b"" for name in ("1", "2", "10")})
    before = "33800ddd1c8926c20e67fd90c19b9699938d8ddf8f39af2516ac21c8fd93f48f"
    now = read(tree, size=8)
    assert now.labels_N.tolist() == [1, 10, 2] and now.fingerprint != before
    for split in ("train", "heldout"):
        recorded = read(tree, split, heldout=str(tree), fingerprint=before, size=8)
        assert recorded.labels_N.tolist() == [0, 1, 2] and recorded.class_names == ("1", "10", "2")
        assert recorded.fingerprint == before


def test_a_folder_of_images_without_class_folders_is_one_class_which_is_said(tmp_path, capsys):
    trees = [write_tree(tmp_path / place, {name: IMAGE}) for place, name in (("a", "x.png"), ("b", "ant/x.png"))]
    write_tree(trees[0], {"y.png": encoded(pixels(1)), ".hidden/z.png": IMAGE})
    other = write_tree(tmp_path / "other", {"z.png": IMAGE})
    for split, count in (("train", 2), ("heldout", 1)):
        dataset = read(trees[0], split, heldout=str(other))
        assert dataset.class_names == ("all",) and dataset.labels_N.tolist() == [0] * count
    assert read(trees[0]).locate(1) == f"{trees[0]}/y.png" and read(trees[0]).key(1) == b"y.png"
    said = " ".join(capsys.readouterr().err.split())
    assert f"note: {trees[0]}: 2 images without class folders are one class" in said
    for path, heldout, which in ((*trees, "has"), (*trees[::-1], "has no")):
        with pytest.raises(ConfigError, match=rf"^heldout={heldout} {which} class folders, unlike path={path}; its"):
            read(path, "heldout", heldout=str(heldout))


@pytest.mark.parametrize(
    "folders, problem",
    [
        (["1", "01"], "the class folders 01 and 1 are one label; join them"),
        (["0", "2024"], "the class folder 2024 is a label by its number, but there are 2 images; if the numbers are"),
        (["train/ant", "Val/ant"], "has the folders Val and train, which are splits, not classes; name one of them"),
        (["train", "test"], "has the folders test and train, which are splits, not classes; name one of them"),
        (["ant", "p\udceache"], r"the name of the class p\\udceache is not UTF-8; rename it"),
    ],
)
def test_folders_that_cannot_be_classes_are_refused(tmp_path, folders, problem):
    with pytest.raises(ValueError, match=f"{tmp_path}.* {problem}"):
        read(write_tree(tmp_path, {f"{name}/0.png": IMAGE for name in folders}))


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: (tree / "ant/000.png").rename(tree / "ant/002.png"),
        lambda tree: (tree / "ant/000.png").rename(tree / "bee/002.png"),
        lambda tree: (tree / "ant/000.png").unlink(),
        lambda tree: (tree / "ant").rename(tree / "ape"),
        lambda tree: write_tree(tree, {"ant/001.png": encoded(pixels(1, 8, 8))}),
    ],
    ids=["renamed", "moved to another class", "removed", "class renamed", "resized"],
)
def test_the_fingerprint_tells_another_listing_and_other_sizes(tree, change):
    before = read(tree).fingerprint
    change(tree)
    assert read(tree).fingerprint != before


def test_of_many_files_the_sizes_of_some_spread_over_all_are_in_the_fingerprint(tmp_path, monkeypatch):
    monkeypatch.setattr(image_folder, "SIZES", 3)
    names = [f"{folder}/{i}.png" for folder in ("ant", "bee") for i in range(5)]
    write_tree(tmp_path, dict.fromkeys(names, b""))
    fingerprints = [read(tmp_path, size=8).fingerprint]
    for name in names:
        write_tree(tmp_path, {name: b"more"})
        fingerprints.append(read(tmp_path, size=8).fingerprint)
    noticed = [name for name, a, b in zip(names, fingerprints, fingerprints[1:], strict=False) if a != b]
    assert noticed == ["ant/0.png", "ant/4.png", "bee/4.png"]


def test_the_heldout_split_is_another_tree_with_the_same_classes(tree, tmp_path):
    other = write_tree(tmp_path / "other", {"ant/x.png": IMAGE, "bee/y.png": IMAGE})
    assert len(read(tree, "heldout", heldout=str(other))) == 2
    with pytest.raises(ConfigError, match=r"^heldout=None names no held-out images; say where they are"):
        read(tree, "heldout")
    write_tree(other, {"cow/z.png": IMAGE})
    with pytest.raises(ConfigError, match=r"^heldout=.*other has the class cow, unlike path=.*tree"):
        read(tree, "heldout", heldout=str(other))
    with pytest.raises(ConfigError, match=r"^heldout=.*tree lacks the class cow, unlike path=.*other"):
        read(other, "heldout", heldout=str(tree))


@pytest.mark.parametrize(
    "place, problem",
    [
        ("nowhere", ".*nowhere does not exist .*; name a folder that has one folder of"),
        ("", " is empty; say where the images are"),
        ("a.png", ".*a.png is not a folder"),
        ("no_folders", r".* has no images; put some there \(JPEG, PNG, .*\), in one folder per class"),
        ("no_images", r".* has no images of the class ant and 1 more; add some \(JPEG, PNG, "),
        ("beside", ".* has no images of the class cow; .*, or take the folders away: the 1 images beside them are one"),
        ("one_empty", ".* has no images of the class cow; add some .*, or set allow_empty=true beside"),
        ("two_empty", ".* has no images of the class cow and 1 more; add some"),
    ],
)
def test_a_folder_without_images_in_class_folders_is_refused(tmp_path, place, problem):
    files = {"a.png": IMAGE, "no_folders/a.txt": b"", "no_images/ant/a.txt": b"", "no_images/bee/.b.png": IMAGE}
    write_tree(tmp_path, files | {"one_empty/ant/a.png": IMAGE, "two_empty/ant/a.png": IMAGE})
    write_tree(tmp_path, {"beside/a.png": IMAGE})
    for empty in ("beside/cow", "one_empty/cow", "two_empty/cow", "two_empty/dog"):
        (tmp_path / empty).mkdir()
    with pytest.raises(ConfigError, match=f"^path={problem}"):
        read(tmp_path / place if place else "")


def test_an_empty_class_folder_keeps_its_number_if_that_is_allowed(tree, tmp_path, capsys):
    (tree / "b").mkdir()
    write_tree(tmp_path / "held", {"bee/0.png": IMAGE})
    for split, labels in (("train", [0, 0, 2, 2]), ("heldout", [2])):
        dataset = read(tree, split, heldout=str(tmp_path / "held"), allow_empty=True)
        assert dataset.class_names == ("ant", "b", "bee") and dataset.labels_N.tolist() == labels
        assert dataset.class_counts() == [labels.count(0), 0, labels.count(2)]
    assert f"note: {tree}: passed over are class folders without images (1: b)" in capsys.readouterr().err
    (tmp_path / "none" / "only").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"^path=.* has no images of the class only; add some \([^)]*\)$"):
        read(tmp_path / "none", allow_empty=True)


def test_broken_files_are_named_with_their_paths(tree):
    write_tree(tree, {"ant/000.png": b"text", "bee/001.png": encoded(pixels(0, 1, 1))})
    with pytest.raises(BrokenImages) as error:
        read(tree, size=16).__getitems__(range(4))
    assert error.value.problems == {
        0: f"{tree}/ant/000.png is not an image that can be read ({', '.join(FORMATS)})",
        3: f"{tree}/bee/001.png is 1×1 pixels, less than min_side=8",
    }
    os.truncate(tree / "ant" / "000.png", 2**40)  # a file without blocks
    with pytest.raises(BrokenImages, match=r"ant/000.png has 1,100 GB, more than any image of max_megapixels=200"):
        read(tree, size=16).__getitems__([0])


def test_a_million_names_take_little_memory(tmp_path):
    write_tree(tmp_path, {f"n{c:08d}/n{c:08d}_{i:06d}.JPEG": b"" for c in range(4) for i in range(500)})
    dataset = read(tmp_path, size=8)
    held = dataset.files.nbytes + dataset.labels_N.nbytes
    assert held / len(dataset) < 40  # bytes an image: 21 of its name, 8 of its label
