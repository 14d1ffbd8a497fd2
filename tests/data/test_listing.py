"""Which files count, whatever source reads them: what goes in and what is passed over are all that is on the disk."""

import os

import numpy as np
import pytest

from dit_moe.data import DATASETS
from dit_moe.data.image_folder import ImageFolderConfig
from dit_moe.data.listing import (
    BROKEN_LINKS,
    LISTED_ALREADY,
    OTHER_KINDS,
    OUTSIDE_CLASSES,
    SPECIAL,
)
from dit_moe.data.tars import TarsConfig
from dit_moe.evaluation.sources.folder import FolderSource
from dit_moe.evaluation.sources.npz import open_npz
from dit_moe.text.corpora import CORPORA
from tests.data.examples import encoded, pixels, write_tar, write_tree

PNG, JPEG, GIF = (encoded(pixels(0), form) for form in ("PNG", "JPEG", "GIF"))
COUNT = {  # as images
    "a/1.png": PNG,
    "a/2.PNG": PNG,
    "a/3.jfif": JPEG,
    "a/4.gif": GIF,
    "a/5.avif": encoded(pixels(0), "AVIF"),
    "a/without": PNG,
    "a/b/photo.2024": JPEG,
    "a/clip.png/6.jpe": JPEG,
    "b/7.tif": encoded(pixels(0), "TIFF"),
}
PASSED_OVER = {
    "hidden files": {"a/._1.png": PNG, "b/.DS_Store": b""},
    "hidden folders": {"a/.ipynb_checkpoints/1.png": PNG},
    "temporary files": {"a/1.png~": PNG, "a/#2.png#": PNG, "b/Thumbs.db": b"", "b/8.png.part": PNG[:99]},
    "temporary folders": {"__MACOSX/1.png": PNG},
    "files of other kinds": {"a/1.txt": b"", "b/notes": b"Python", "b/7.dat": b"II*"},
    "images of formats that are not read": {"b/9.HEIC": b""},
}
TEXT = {"a/1.txt": b"x", "a/2.MD": b"x", "b/.3.txt": b"x", "b/4.txt~": b"x", "b/5.html": b"", "c/clip.txt/6.txt": b"x"}


def counts(passed_over):
    return {reason: found["count"] for reason, found in passed_over.items()}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    tree = write_tree(tmp_path_factory.mktemp("mixed"), COUNT)
    for files in PASSED_OVER.values():
        write_tree(tree, files)
    return tree


EXPECTED = {reason: len(files) for reason, files in PASSED_OVER.items()}


def test_images_and_what_is_passed_over_are_all_files_of_a_folder(mixed, capsys):
    for source in (DATASETS.build(ImageFolderConfig(path=str(mixed), size=8), "train"), FolderSource(mixed)):
        assert len(source) == len(COUNT) and counts(source.passed_over) == EXPECTED
    assert len([p for p in mixed.rglob("*") if p.is_file()]) == len(COUNT) + sum(EXPECTED.values())
    told = [line for line in capsys.readouterr().err.splitlines() if "passed over" in line]
    assert len(told) == 1 and told[0].startswith(f"note: {mixed}: passed over are files of other kinds (3: a/1.txt, …)")
    assert source.facts()["passed_over"]["temporary files"] == {"count": 4, "first": "a/#2.png#"}


def test_a_name_that_is_not_utf8_is_recorded_in_unicode_as_what_is_recorded_is_read_again(tmp_path):
    write_tree(tmp_path, {"a/1.png": PNG, "a/caf\udce9.txt": b""})
    dataset = DATASETS.build(ImageFolderConfig(path=str(tmp_path), size=8), "train")
    assert dataset.passed_over == {OTHER_KINDS: {"count": 1, "first": r"a/caf\udce9.txt"}}


def test_images_labels_and_what_is_passed_over_are_all_files_of_tars(tmp_path):
    beside = {"._0.tar": b"", "index.json": b"{}"}
    members = COUNT | {name: content for files in PASSED_OVER.values() for name, content in files.items()}
    labels = {f"{name.partition('.')[0]}.cls": b"0" for name in COUNT if "clip" not in name}
    write_tar(write_tree(tmp_path / "folders", beside) / "0.TAR", members)
    for place, more in (("folders", {}), ("labels", labels | {"a/clip.png/6.cls": b"0", "a/1.mask.png": PNG})):
        if more:
            write_tar(tmp_path / "labels" / "0.tar", members | more)
        dataset = DATASETS.build(TarsConfig(path=str(tmp_path / place), size=8), "train")
        found, others = counts(dataset.passed_over), {"hidden files": 4, "temporary files": 5, OTHER_KINDS: 4}
        expected = others if place == "folders" else {"hidden files": 3, "temporary files": 5, OTHER_KINDS: 3}
        expected |= {"images of formats that are not read": 1} | ({"images of other fields": 1} if more else {})
        assert len(dataset) == len(COUNT) and found == expected


def test_images_labels_and_what_is_passed_over_are_all_arrays_of_an_npz(tmp_path, capsys):
    arrays = {"arr_0": np.zeros((3, 8, 8, 3), np.uint8), "labels": np.arange(3), "more": np.zeros((9, 8, 8, 3)), "a": 1}
    np.savez(tmp_path / "x.npz", **arrays)
    source = open_npz(tmp_path / "x.npz").source
    assert len(source) == len(source.labels_N) == 3 and counts(source.passed_over) == {"arrays of other names": 2}
    assert source.facts()["passed_over"] == {"arrays of other names": {"count": 2, "first": "a"}}
    assert f"note: {tmp_path}/x.npz: passed over are arrays of other names (2: a, …)" in capsys.readouterr().err


def test_documents_and_what_is_passed_over_are_all_files_of_a_folder(tmp_path):
    corpus = CORPORA.build(CORPORA.config_class("files")(path=str(write_tree(tmp_path, TEXT))), "train")
    assert len(list(corpus.documents())) == 3
    assert counts(corpus.passed_over) == {"hidden files": 1, "temporary files": 1, OTHER_KINDS: 1}


def test_links_to_files_count_and_pipes_broken_links_and_what_a_link_repeats_do_not(tmp_path, capsys):
    write_tree(tmp_path, {"s/a/1.png": PNG, "s/b/2.png": PNG, "s/top.png": PNG, "elsewhere/3.png": PNG})
    links = {"a/4.png": "1.png", "a/5.png": "nowhere", "a/6.png": "6.png", "a/up": "..", "a/self": ".", "b/a": "../a"}
    for name, target in (links | {"c": "../elsewhere", "d": "../elsewhere", "out": "../.."}).items():
        (tmp_path / "s" / name).symlink_to(target)
    os.mkfifo(tmp_path / "s" / "b" / "7.png")
    odd = os.fsdecode(bytes(tmp_path) + b"/s/b/\xff.png")  # no Unicode
    os.link(tmp_path / "s/b/2.png", odd)
    dataset = DATASETS.build(ImageFolderConfig(path=str(tmp_path / "s")), "train")
    assert dataset.class_names == ("a", "b", "c") and dataset.class_counts() == [2, 2, 1]
    expected = {BROKEN_LINKS: 2, SPECIAL: 1, LISTED_ALREADY: 5, OUTSIDE_CLASSES: 1}
    assert counts(dataset.passed_over) == expected
    assert np.array_equal(dataset.__getitems__([1])["images"][0].permute(1, 2, 0), pixels(0))


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    write_tree(tmp_path, {"a/b/1.png": PNG})

    def scandir(path, original=os.scandir):
        if os.fsdecode(path).endswith("/b"):
            raise PermissionError(13, "Permission denied")
        return original(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ValueError, match=f"^{tmp_path}/a/b/? cannot be read .Permission denied.; make it readable"):
        FolderSource(tmp_path)
