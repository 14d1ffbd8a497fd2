import numpy as np
import pytest

from dit_moe.metrics import ImageSet, read_images, write_images

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
LABELS = np.arange(6)


@pytest.mark.parametrize("labels", [LABELS, None])
def test_what_is_written_is_read(tmp_path, labels):
    write_images(tmp_path / "images.npz", IMAGES, labels)
    for name in ("images.npz", ""):  # the file, or the folder that holds it
        found = read_images(tmp_path / name)
        assert np.array_equal(found.images_NHWC, IMAGES)
        assert np.array_equal(found.labels_N, labels) if labels is not None else found.labels_N is None
    assert [path.name for path in tmp_path.iterdir()] == ["images.npz"]


@pytest.mark.parametrize(
    "images, labels, message",
    [
        (IMAGES / 255, None, "dtype float64; save them as uint8"),
        (np.full_like(IMAGES, np.nan, dtype=float), None, "image 0 holds NaN or infinity"),
        (IMAGES[0], None, "wanted \\[N, height, width, channels\\]"),
        (IMAGES.transpose(0, 3, 1, 2), None, "with 1 or 3 channels"),
        (IMAGES[:0], None, "nothing in images of shape"),
        (IMAGES, LABELS[:5], "one whole number for each of 6 images"),
        (IMAGES, LABELS / 2, "labels are float64"),
        (IMAGES, LABELS - 1, "label -1 of image 0 is negative"),
    ],
)
def test_a_bad_set_is_refused_naming_its_source_and_never_written(tmp_path, images, labels, message):
    with pytest.raises(ValueError, match=f"run 7: .*{message}"):
        ImageSet(images, labels, "run 7")
    with pytest.raises(ValueError, match=f"images.npz: .*{message}"):
        write_images(tmp_path / "images.npz", images, labels)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("keep", [0, 1, 500, -30])
def test_a_truncated_file_is_refused(tmp_path, keep):
    write_images(tmp_path / "images.npz", IMAGES, LABELS)
    content = (tmp_path / "images.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[:keep])
    with pytest.raises(ValueError, match=r"cut.npz is not a readable npz"):
        read_images(tmp_path / "cut.npz")


def test_a_flipped_byte_is_refused(tmp_path):
    write_images(tmp_path / "images.npz", IMAGES)
    content = bytearray((tmp_path / "images.npz").read_bytes())
    content[400] ^= 1
    (tmp_path / "images.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"not a readable npz.*CRC"):
        read_images(tmp_path / "images.npz")


def test_other_files_are_refused_naming_what_was_wanted(tmp_path):
    with pytest.raises(ValueError, match=r"nothing.npz does not exist"):
        read_images(tmp_path / "nothing.npz")
    with pytest.raises(ValueError, match=r"images.npz does not exist; name an images.npz, or a folder"):
        read_images(tmp_path)
    np.savez(tmp_path / "other.npz", mu=np.zeros(3))
    with pytest.raises(ValueError, match="no array arr_0 but mu"):
        read_images(tmp_path / "other.npz")
    np.save(tmp_path / "array.npy", IMAGES)
    with pytest.raises(ValueError, match=r"array.npy is not a readable npz"):
        read_images(tmp_path / "array.npy")
    ragged = np.empty(2, dtype=object)
    ragged[:] = [IMAGES[0], IMAGES[0, :4]]
    np.savez(tmp_path / "ragged.npz", arr_0=ragged)
    with pytest.raises(ValueError, match=r"ragged.npz is not a readable npz of plain arrays"):
        read_images(tmp_path / "ragged.npz")


@pytest.mark.parametrize(
    "labels", [np.repeat(np.arange(10), 100), np.tile(np.arange(10), 100)], ids=["sorted", "cyclic"]
)
@pytest.mark.parametrize("n", [450, 500, 1000])
def test_thinning_keeps_the_mix_of_classes(labels, n):
    thin = ImageSet(np.zeros((1000, 2, 2, 1), np.uint8), labels).thinned(n)
    assert len(thin) == n
    assert np.abs(np.bincount(thin.labels_N, minlength=10) - n / 10).max() <= 3
