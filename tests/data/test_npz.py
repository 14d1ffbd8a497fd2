"""images.npz: what its arrays must be, what readers find in a written one, and that no half-written one is in place."""

import struct
import zipfile

import numpy as np
import pytest

from dit_moe.data.npz import image_writer, require_images, require_labels
from tests.npz_files import write_images

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3), dtype=np.uint8)
LABELS = np.arange(7)


@pytest.mark.parametrize(
    "images, message",
    [
        (IMAGES / 255, "dtype float64; save them as uint8"),
        (IMAGES.astype(np.int64), "dtype int64; save them as uint8"),
        (IMAGES[0], r"\(8, 8, 3\); wanted \[N, height, width, channels\] with 1 or 3 channels; an axis is missing"),
        (IMAGES.transpose(0, 3, 1, 2), r"the channels seem to stand first: save images.transpose\(0, 2, 3, 1\)"),
        (IMAGES[..., :2], r"\(7, 8, 8, 2\); wanted .* with 1 or 3 channels"),
        (IMAGES[:0], r"nothing in images of shape \(0, 8, 8, 3\)"),
        (IMAGES[:, :0], r"nothing in images of shape \(7, 0, 8, 3\)"),
        (np.ones((), np.uint8), r"images have shape \(\)"),
    ],
)
def test_other_arrays_than_images_are_refused_naming_their_source_and_a_remedy(images, message):
    with pytest.raises(ValueError, match=f"run 7: .*{message}"):
        require_images(images, "run 7")


@pytest.mark.parametrize(
    "labels, message",
    [
        (LABELS[:5], r"int64 of shape \(5,\); wanted one whole number for each of 7 images"),
        (LABELS / 2, "labels are float64"),
        (LABELS[:, None], r"of shape \(7, 1\)"),
        (LABELS - 1, "label -1 of image 0 is negative"),
    ],
)
def test_other_arrays_than_labels_are_refused(labels, message):
    with pytest.raises(ValueError, match=f"run 7: .*{message}"):
        require_labels(labels, 7, "run 7")


# ------------------------------------------------------------------------------------------------------------- writing


def written(path, parts, count=7, labels=LABELS):
    with image_writer(path, count, labels) as add:
        for part in parts:
            add(part)


def read(path):
    with np.load(path) as arrays:
        return arrays["arr_0"]


@pytest.mark.parametrize("cuts", [[], [3], [1, 2, 6]])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_set_written_in_batches_is_byte_for_byte_the_one_written_at_once(tmp_path, cuts, channels):
    images = IMAGES[..., :channels]  # a view of another layout, if of one channel
    written(tmp_path / "parts.npz", np.split(images, cuts))
    write_images(tmp_path / "whole.npz", images, LABELS)
    assert (tmp_path / "parts.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
    with np.load(tmp_path / "parts.npz") as arrays:
        assert arrays.files == ["arr_0", "labels"]
        assert np.array_equal(arrays["arr_0"], images) and np.array_equal(arrays["labels"], LABELS)


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


def interrupted():
    yield IMAGES[:3]
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "parts, labels, error, message",
    [
        ([IMAGES[:3]], LABELS, ValueError, "images.npz: 3 of 7 images; the rest was never made"),
        ([], LABELS, ValueError, "images.npz: 0 of 7 images"),
        ([IMAGES, IMAGES[:1]], LABELS, ValueError, "images.npz: more than the 7 images"),
        ([IMAGES[:3], IMAGES[3:, :4]], LABELS, ValueError, r"images of \(4, 8, 3\) follow images of \(8, 8, 3\)"),
        ([IMAGES[:3], IMAGES[3:] / 255], LABELS, ValueError, "images.npz: .*save them as uint8"),
        ([IMAGES], LABELS[:6], ValueError, r"images.npz: labels are int64 of shape \(6,\)"),
        (interrupted(), LABELS, KeyboardInterrupt, None),
    ],
    ids=["few", "none", "many", "size", "dtype", "labels", "interrupted"],
)
def test_a_set_that_is_not_finished_or_is_refused_leaves_the_old_file(tmp_path, parts, labels, error, message):
    write_images(tmp_path / "images.npz", IMAGES[:2])
    with pytest.raises(error, match=message):
        written(tmp_path / "images.npz", parts, labels=labels)
    assert [path.name for path in tmp_path.iterdir()] == ["images.npz"]
    assert np.array_equal(read(tmp_path / "images.npz"), IMAGES[:2])
