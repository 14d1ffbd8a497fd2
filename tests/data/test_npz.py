"""images.npz written as the images come: what readers find, and that nothing half-written is ever in place."""

import os
import struct
import zipfile

import numpy as np
import pytest

from dit_moe.data.npz import image_writer, write_images

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3), dtype=np.uint8)
LABELS = np.arange(7)


def written(path, parts, count=7, labels=LABELS):
    with image_writer(path, count, labels) as add:
        for part in parts:
            add(part)


def read(path):
    with np.load(path) as arrays:
        return arrays["arr_0"]


@pytest.mark.parametrize("cuts", [[], [3], [1, 2, 6]])
def test_a_set_written_in_batches_is_byte_for_byte_the_one_written_at_once(tmp_path, cuts):
    written(tmp_path / "parts.npz", np.split(IMAGES, cuts))
    write_images(tmp_path / "whole.npz", IMAGES, LABELS)
    assert (tmp_path / "parts.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
    with np.load(tmp_path / "parts.npz") as arrays:
        assert arrays.files == ["arr_0", "labels"]
        assert np.array_equal(arrays["arr_0"], IMAGES) and np.array_equal(arrays["labels"], LABELS)


def test_images_that_are_views_of_another_layout_are_written_in_order(tmp_path):
    written(tmp_path / "images.npz", [IMAGES.transpose(0, 3, 1, 2).copy().transpose(0, 2, 3, 1)])
    assert np.array_equal(read(tmp_path / "images.npz"), IMAGES)


def test_adms_way_of_reading_finds_the_images_without_loading_them(tmp_path):
    """It opens the zip entry as a stream, reads the npy header from it and then batches of bytes."""
    written(tmp_path / "images.npz", np.split(IMAGES, [4]))
    with zipfile.ZipFile(tmp_path / "images.npz") as archive:
        first = archive.infolist()[0]
        assert (first.filename, first.compress_type) == ("arr_0.npy", zipfile.ZIP_STORED)
        with archive.open("arr_0.npy") as entry:
            assert np.lib.format.read_magic(entry) == (1, 0)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(entry)
            assert (shape, fortran, dtype) == ((7, 8, 8, 3), False, np.uint8)
            for start in range(0, 7, 2):
                batch = IMAGES[start : start + 2]
                assert entry.read(batch.nbytes) == batch.tobytes()


@pytest.mark.parametrize("limit", [None, 1200])
def test_only_an_entry_beyond_two_gigabytes_has_the_fields_of_zip64_and_says_so(tmp_path, monkeypatch, limit):
    """By a limit of 1200 bytes in place of 2 GiB; Python 3.11.2 and 3.11.4 differ in what ``force_zip64`` writes."""
    if limit is not None:
        monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limit)
    written(tmp_path / "images.npz", np.split(IMAGES, [4]))
    assert np.array_equal(read(tmp_path / "images.npz"), IMAGES)
    content = (tmp_path / "images.npz").read_bytes()
    with zipfile.ZipFile(tmp_path / "images.npz") as archive:
        headers = [content[entry.header_offset :][:30] for entry in archive.infolist()]
    # Of a local header: version needed, size, length of the extra field.
    found = [struct.unpack("<4xH16xI2xH", header) for header in headers]
    plain = [(20, IMAGES.nbytes + 128, 0), (20, LABELS.nbytes + 128, 0)]
    assert found == (plain if limit is None else [(45, 0xFFFFFFFF, 20), plain[1]])


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([IMAGES[:3]], "3 of 7 images; the rest was never made"),
        ([], "0 of 7 images"),
        ([IMAGES, IMAGES[:1]], "more than the 7 images"),
        ([IMAGES[:3], IMAGES[3:, :4]], r"images of \(4, 8, 3\) follow such of \(8, 8, 3\)"),
        ([IMAGES[:3], np.full((4, 8, 8, 3), np.nan)], "image 0 holds NaN or infinity"),
        ([IMAGES / 255], "dtype float64; save them as uint8"),
        ([IMAGES[..., :2]], "with 1 or 3 channels"),
    ],
)
def test_an_incomplete_or_impossible_set_is_refused_and_the_old_file_stays(tmp_path, parts, message):
    write_images(tmp_path / "images.npz", IMAGES[:2])
    with pytest.raises(ValueError, match=f"images.npz: .*{message}"):
        written(tmp_path / "images.npz", parts)
    assert [path.name for path in tmp_path.iterdir()] == ["images.npz"]
    assert np.array_equal(read(tmp_path / "images.npz"), IMAGES[:2])


def test_an_error_in_between_or_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    write_images(tmp_path / "images.npz", IMAGES[:2])

    def interrupted():
        yield IMAGES[:3]
        raise KeyboardInterrupt

    def full(*args):
        raise OSError("no space left")

    with pytest.raises(KeyboardInterrupt):
        written(tmp_path / "images.npz", interrupted())
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_images(tmp_path / "images.npz", IMAGES)
    assert [path.name for path in tmp_path.iterdir()] == ["images.npz"]
    assert np.array_equal(read(tmp_path / "images.npz"), IMAGES[:2])


def test_labels_that_do_not_fit_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"images.npz: labels are int64 of shape \(6,\).* each of 7 images"):
        write_images(tmp_path / "images.npz", IMAGES, LABELS[:6])
    assert not any(tmp_path.iterdir())
