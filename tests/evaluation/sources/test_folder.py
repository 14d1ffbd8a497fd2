"""Folders of image files."""

import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dit_moe.data.image_folder import ImageFolderConfig
from dit_moe.data.images import crop
from dit_moe.evaluation.requirements import plan, summarize
from dit_moe.evaluation.sources.base import EvaluationInput, ReadOptions, converted, label_by_name
from dit_moe.evaluation.sources.dataset import open_dataset
from dit_moe.evaluation.sources.folder import FolderSource
from dit_moe.metrics.classifier import ClassAccuracyConfig
from dit_moe.pictures import png_folder
from tests.data.examples import encoded, pixels, write_tree
from tests.evaluation.fakes import PixelExtractor


def files(count=5, **sizes):
    return {f"{i:03d}.png": encoded(pixels(i, **sizes)) for i in range(count)}


def with_crc(kind, body):
    """A chunk of a PNG file."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def read(source, parts=None):
    """[N, H, W, C]."""
    return torch.cat(list(source.batches(parts or [range(len(source))]))).permute(0, 2, 3, 1).numpy()


def test_images_come_in_the_order_of_their_paths_folder_by_folder(tmp_path):
    names = ["b.PNG", "a/2.png", "a-1/1.webp", "a/10.bmp", "a/sub/0.png", "c.png"]
    contents = {name: encoded(pixels(i), "WEBP", lossless=True) for i, name in enumerate(names)}
    extra = {"notes.txt": b"", ".hidden.png": b"", ".cache/x.png": b"", "a/Thumbs.db": b""}
    source = FolderSource(write_tree(tmp_path, contents | extra))
    assert source.files == ["a/10.bmp", "a/2.png", "a/sub/0.png", "a-1/1.webp", "b.PNG", "c.png"]
    assert np.array_equal(read(source), [pixels(i) for i in (3, 1, 4, 2, 0, 5)])
    (tmp_path / "odd").mkdir()
    Path(os.fsdecode(bytes(tmp_path) + b"/odd/\xff.png")).write_bytes(encoded(pixels(0)))  # no Unicode
    odd = FolderSource(tmp_path / "odd")
    assert np.array_equal(read(odd), [pixels(0)]) and odd.identity()["sha256"]
    assert source.image_shape == (3, 16, 16) and source.labels_N is None


@pytest.mark.parametrize("workers", [0, 2])
def test_images_are_the_same_for_any_parts_order_and_workers_and_a_damaged_one_is_named(tmp_path, workers):
    source = FolderSource(write_tree(tmp_path, files()), ReadOptions(workers=workers))
    assert np.array_equal(read(source, [[4], [0, 2, 2], [1]]), [pixels(i) for i in (4, 0, 2, 2, 1)])
    (tmp_path / "002.png").write_bytes(encoded(pixels(2))[:-300])
    with pytest.raises(ValueError, match=f"{tmp_path}/002.png cannot be decoded .*; mend what is broken, or leave"):
        read(source)


def test_a_folder_of_grey_images_has_one_channel_and_a_mixed_one_three(tmp_path):
    grey = {f"{i}.png": encoded(Image.fromarray(pixels(i)[..., 0])) for i in range(2)}
    alone, mixed = (
        FolderSource(write_tree(tmp_path / name, grey | more)) for name, more in (("g", {}), ("m", files()))
    )
    assert alone.image_shape == (1, 16, 16) and mixed.image_shape == (3, 16, 16)
    assert np.array_equal(read(alone), [pixels(i)[..., :1] for i in range(2)])
    assert np.array_equal(read(mixed)[-1], pixels(1)[..., :1].repeat(3, -1))


def test_size_crops_as_training_data_is_cropped_and_without_it_a_tiny_image_is_an_image(tmp_path):
    source = FolderSource(write_tree(tmp_path / "large", files(2, height=30, width=40)), ReadOptions(size=12))
    assert source.image_shape == (3, 12, 12)
    assert np.array_equal(read(source), [crop(Image.fromarray(pixels(i, 30, 40)), 12) for i in range(2)])
    tiny = FolderSource(write_tree(tmp_path / "tiny", files(2, height=2, width=3)))
    assert np.array_equal(read(tiny), [pixels(i, 2, 3) for i in range(2)])


def test_a_folder_with_another_file_of_mixed_sizes_or_without_images_is_refused_before_the_work(tmp_path):
    large = (
        b"\x89PNG\r\n\x1a\n" + with_crc(b"IHDR", struct.pack(">2I5B", 10**5, 10**5, 8, 2, 0, 0, 0)) + b"\0\0\0\0IDAT"
    )
    for content, problem in (
        (b"", "is empty"),
        (b"no image", "is not an image that can be read"),
        (b"<html>", "is a web page"),
        (large, "is 100000×100000 pixels, 10000 million, more than max_megapixels=200"),
    ):
        write_tree(tmp_path / "other", files() | {"002.png": content})
        with pytest.raises(ValueError, match=f"{tmp_path}/other/002.png {problem}.*mend it, or leave it out by"):
            FolderSource(tmp_path / "other")
    os.truncate(tmp_path / "other" / "002.png", 2**40)  # a file without blocks
    with pytest.raises(ValueError, match=r"002.png has 1,100 GB, more than any image of max_megapixels=200; mend it"):
        FolderSource(tmp_path / "other")
    write_tree(tmp_path / "mixed", files() | {"odd.png": encoded(pixels(9, height=20, width=24))})
    with pytest.raises(ValueError, match=r"000.png is 16×16 and odd.png 24×20; give --size N to crop and resize"):
        FolderSource(tmp_path / "mixed")
    write_tree(tmp_path / "none", {"notes.txt": b"", "more/readme.md": b""})
    with pytest.raises(ValueError, match=f"{tmp_path}/none has no images; known are JPEG, .*images.npz"):
        FolderSource(tmp_path / "none")


# --------------------------------------------------------------------------------------------------------------- labels


def test_pictures_saved_by_sampling_are_read_with_their_labels_and_their_record(tmp_path):
    images, labels = torch.from_numpy(np.stack([pixels(i) for i in range(3)])).permute(0, 3, 1, 2), [7, 0, 2]
    names = tuple("abcdefgh")
    with png_folder(tmp_path / "png", torch.tensor(labels), names) as add:
        add(images)
    (tmp_path / "sample.json").write_text(json.dumps({"step": 9, "files": ["png"]}))
    source = FolderSource(tmp_path / "png")
    assert source.labels_N.tolist() == labels and source.labels_N.dtype == torch.int64
    assert source.class_names == names
    assert torch.equal(next(source.batches([range(3)])), images)
    assert source.facts()["sample"]["step"] == 9
    assert "labels.json" in source.label_remedy and "sub-folder" in source.label_remedy


@pytest.mark.parametrize(
    "folders, labels",
    [
        (("bee", "ant", "ant-lion"), [0, 1, 2]),
        (("7", "10", "3"), [3, 7, 10]),
        (("4",), [4]),
        (("png",), None),
        (("train", "test"), None),
        (("bee", "ant", "."), None),
    ],
)
def test_sub_folders_are_classes_by_their_number_or_their_order_if_all_images_lie_in_them(tmp_path, folders, labels):
    tree = {f"{name}/{i}.png": encoded(pixels(i)) for name in folders for i in range(2)}
    source = FolderSource(write_tree(tmp_path, tree))
    found = None if source.labels_N is None else sorted(source.labels_N.tolist())
    assert found == (labels and [label for label in labels for _ in range(2)])


def test_classes_have_the_labels_that_their_names_have_in_the_reference_or_are_refused(tmp_path):
    def tree(place, *names):
        return write_tree(tmp_path / place, {f"{name}/0.png": encoded(pixels(0)) for name in names})

    def planned(given):
        sides = [summarize(one, PixelExtractor(3 * 8 * 8, classes=3)) for one in (given, reference)]
        return plan([ClassAccuracyConfig()], PixelExtractor(classes=3), sides[:1], sides[1])

    options = ReadOptions(size=8)
    reference = open_dataset(ImageFolderConfig(path=str(tree("reference", "ant", "bee", "cow"))), options=options)
    for place, names, labels in (("some", ("bee", "cow"), [1, 2]), ("others", ("ape", "bee", "cow"), [0, 1, 2])):
        samples = converted(EvaluationInput(FolderSource(tree(place, *names))), options)
        label_by_name(samples, reference)
        assert samples.source.labels_N.tolist() == labels
        assert place == "others" or planned(samples)
    with pytest.raises(ValueError, match=r"others has the class ape, which is none of the 3 of .*/reference;"):
        planned(samples)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "is truncated, or still being written"),
        ("[1, 2]", "must be a JSON object"),
        ('{"000.png": 1}', "has no label for 001.png"),
        ('{"000.png": 1, "001.png": true}', "has the label True for 001.png"),
        ('{"000.png": 1, "001.png": 0, "classes": ["cat"]}', "has the label 1 for 000.png, and names 1 classes"),
        ('{"000.png": 1, "001.png": 0, "classes": ["cat", 3]}', r"has classes=\['cat', 3\]; wanted"),
        ('{"000.png": 1, "001.png": 0, "classes": ["cat", "cat"]}', r"has classes=\['cat', 'cat'\]; wanted"),
        ('{"000.png": 1, "001.png": 0, "002.png": 1}', "has a label for 002.png, which is not there"),
    ],
)
def test_labels_that_do_not_fit_the_images_are_refused(tmp_path, text, message):
    write_tree(tmp_path, files(2) | {"labels.json": text.encode()})
    with pytest.raises(ValueError, match=f"labels.json {message}.*remove it to go on without labels"):
        FolderSource(tmp_path)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_labels_that_are_no_file_are_refused(tmp_path, make):
    write_tree(tmp_path, files(2))
    make(tmp_path / "labels.json")
    with pytest.raises(ValueError, match=r"labels.json .*remove it"):
        FolderSource(tmp_path)


def test_labels_that_contradict_the_numbers_of_folders_count_and_this_is_said(tmp_path, capsys):
    labels = {"0/a.png": 0, "3/b.png": 7}
    images = {name: files(1)["000.png"] for name in labels}
    write_tree(tmp_path, images | {"labels.json": json.dumps(labels).encode()})
    assert FolderSource(tmp_path).labels_N.tolist() == [0, 7]
    assert "labels.json counts and not the folders, as for 3/b.png with the label 7" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- identity


def test_identity_is_of_names_and_contents_wherever_they_lie(tmp_path):
    def identity(name, tree, **options):
        return FolderSource(write_tree(tmp_path / name, tree), ReadOptions(**options)).identity()

    first = identity("a", files())
    assert first == identity("elsewhere/b", files()) == identity("c", files(), workers=2) and first["kind"] == "folder"
    assert first == json.loads(json.dumps(first)) and str(tmp_path) not in json.dumps(first)
    changes = [
        identity("renamed", {name.replace("4", "5"): content for name, content in files().items()}),
        identity("changed", files() | {"004.png": encoded(pixels(77))}),
        identity("fewer", files(4)),
        identity("smaller", files(), size=8),
        identity("labelled", files() | {"labels.json": json.dumps(dict.fromkeys(files(), 1)).encode()}),
    ]
    assert all(change != first for change in changes)
