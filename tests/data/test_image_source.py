"""What sources of images share: mirrored rows, the report of broken files, one size for all, options."""

import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from dit_moe.config import ConfigError
from dit_moe.data import DATASETS, BrokenImages
from dit_moe.data.image_folder import ImageFolderConfig
from dit_moe.data.image_source import ImageSource, ImageSourceConfig
from dit_moe.data.images import FORMATS
from tests.data.examples import class_files, encoded, pixels, save_huggingface, write_tar, write_tree


class Listed(ImageSource):
    """Files in a list, labelled by place; counts how often one is read."""

    def __init__(self, files, split="train", **options):
        self.files, self.reads = files, 0
        super().__init__(ImageSourceConfig(**options), split, np.arange(len(files)), ["any"] * len(files), "")

    def locate(self, image):
        return f"file{image}"

    def read(self, image):
        self.reads += 1
        if self.files[image] is None:
            raise FileNotFoundError(2, "No such file or directory")
        return self.files[image]

    def keep(self, image_K):
        super().keep(image_K)
        self.files = [self.files[image] for image in image_K]


FILES = [encoded(pixels(i)) for i in range(5)]


def test_in_training_mirrored_images_follow_the_others():
    plain, flipped = Listed(FILES), Listed(FILES, flip=True)
    assert (len(plain), len(flipped)) == (5, 10)
    rows, both = plain.__getitems__(range(5)), flipped.__getitems__(range(10))
    assert torch.equal(both["images"], torch.cat([rows["images"], rows["images"].flip(-1)]))
    assert torch.equal(both["labels"], rows["labels"].repeat(2))
    assert len(Listed(FILES, "heldout", flip=True)) == 5


def test_an_image_and_its_mirror_are_read_once_in_a_batch():
    source = Listed(FILES, flip=True, size=8)
    rows = source.__getitems__([7, 2, 7, 4])
    assert source.reads == 2
    assert torch.equal(rows["images"][1].flip(-1), rows["images"][0]) and rows["labels"].tolist() == [2, 2, 2, 4]


def test_all_broken_images_of_a_batch_are_reported_at_once():
    source = Listed([FILES[0], b"text", FILES[2], b"", None], flip=True)
    with pytest.raises(BrokenImages) as error:
        source.__getitems__([0, 1, 2, 3, 4, 6])
    assert error.value.problems == {
        1: f"file1 is not an image that can be read ({', '.join(FORMATS)})",
        3: "file3 is empty (0 bytes)",
        4: "file4 cannot be read (No such file or directory)",
        6: f"file1 is not an image that can be read ({', '.join(FORMATS)})",
    }
    assert str(error.value) == (
        f"file1 is not an image that can be read ({', '.join(FORMATS)}), and 2 more; mend them, or "
        "set skip_broken=true in the section of the images, data.skip_broken=true for one"
    )
    assert pickle.loads(pickle.dumps(error.value)).problems == error.value.problems  # as workers send it
    with pytest.raises(BrokenImages, match=r"^file1 is empty \(0 bytes\); mend it, or set skip_broken=true .*"):
        Listed([FILES[0], b""], flip=True).__getitems__([1, 3])


@pytest.mark.parametrize("name", ["image_folder", "tars", "huggingface"])
def test_broken_images_are_left_out_on_demand_and_the_others_are_as_they_were(name, tmp_path, capsys):
    broken = b"no image"
    files = class_files(each=3) | {"ant/001.png": broken, "bee/000.png": b""}
    if name == "image_folder":
        place = {"path": str(write_tree(tmp_path / "tree", files))}
    elif name == "tars":
        write_tar(tmp_path / "a.tar", files)
        place = {"path": str(tmp_path / "a.tar")}
    else:
        place = {"id": str(save_huggingface(tmp_path / "saved", [0, 0, 0, 1, 1, 1], {1: broken, 3: b""}))}
    build = DATASETS.config_class(name)
    whole, left = (
        DATASETS.build(build(**place, flip=True, size=16, skip_broken=skip), "train") for skip in (False, True)
    )
    assert len(left) == 8 and left.fingerprint != whole.fingerprint
    for key, rows in left.__getitems__(range(8)).items():
        assert torch.equal(rows, whole.__getitems__([0, 2, 4, 5, 6, 8, 10, 11])[key])
    assert [left.locate(i).split("row")[0] for i in range(4)] == [whole.locate(i).split("row")[0] for i in (0, 2, 4, 5)]
    assert left.sizes(range(4)).tolist() == whole.sizes([0, 2, 4, 5]).tolist() and left.class_counts() == [2, 2]
    assert left.passed_over["images that cannot be used"] == {"count": 2, "first": whole.problem(1)}
    assert f"passed over are images that cannot be used (2: {whole.locate(1)} is not" in capsys.readouterr().err


def test_an_image_mended_in_the_same_process_comes_back(tmp_path):
    good = encoded(pixels(1))
    folder = write_tree(tmp_path / "tree", class_files(each=3) | {"ant/001.png": good[:-40] + bytes(40)})
    config = ImageFolderConfig(path=str(folder), skip_broken=True)
    assert len(DATASETS.build(config, "train")) == 5
    (folder / "ant/001.png").write_bytes(good)
    assert len(DATASETS.build(config, "train")) == 6


def test_a_source_of_nothing_but_broken_images_is_refused(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # as on macOS
    with pytest.raises(ValueError, match=r"^none of the 2 images can be used: file0 is empty \(0 bytes\); mend them"):
        Listed([b"", b""], skip_broken=True)


def test_without_a_size_images_stay_as_they_are_and_another_size_is_refused_with_both():
    source = Listed([encoded(pixels(0, 16, 20)), encoded(pixels(1, 16, 20)), encoded(pixels(2, 20, 16))])
    assert source.image_shape == (3, 16, 20)
    assert np.array_equal(source.__getitems__([1])["images"][0].permute(1, 2, 0), pixels(1, 16, 20))
    with pytest.raises(
        ValueError, match=r"^file2 is 16×20, and file0 20×16; set size in their section to make them one$"
    ):
        source.__getitems__([1, 2])


def test_with_a_size_images_of_all_sizes_become_one():
    source = Listed([encoded(pixels(0, 16, 20)), encoded(pixels(1, 40, 9))], size=12)
    assert source.__getitems__([0, 1])["images"].shape == (2, *source.image_shape) == (2, 3, 12, 12)


def test_an_orientation_that_is_not_applied_is_said_once(capsys):
    exif = Image.Exif()
    exif[0x0112] = 6
    files = [FILES[0], *[encoded(pixels(i, 16, 20), exif=exif) for i in range(2)]]
    Listed(files, size=8).__getitems__([0, 1, 2])
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "note: file1 has the EXIF orientation 6, which is not applied" in told
    assert Listed(files[1:], orientation="exif").image_shape == (3, 20, 16) and not capsys.readouterr().err


def test_the_shape_is_known_although_the_first_image_is_broken_and_refused_if_all_are():
    assert Listed([b"", FILES[0]]).image_shape == (3, 16, 16)
    with pytest.raises(BrokenImages, match=r"file0 is empty .* and 1 more"):
        _ = Listed([b"", b"text"]).image_shape


@pytest.mark.parametrize(
    "option, value, wanted",
    [
        ("size", 0, "must be at least 1, or null to keep images whole"),
        ("min_side", 0, "must be at least 1"),
        ("max_megapixels", 0.0, "must be above 0"),
    ],
)
def test_options_out_of_range_are_refused(option, value, wanted):
    with pytest.raises(ConfigError, match=f"^{option}={value} {wanted}"):
        ImageSourceConfig(**{option: value})
