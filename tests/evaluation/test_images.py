"""What is said of arrays that are no images or labels."""

import numpy as np
import pytest

from dit_moe.data import npz as checks
from dit_moe.data.npz import blocks, require_images, require_labels

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
LABELS = np.arange(6)


def with_a_nan(image):
    floats = IMAGES.astype(np.float32)
    floats[image, 3, 4, 1] = np.nan
    return floats


@pytest.mark.parametrize(
    "images, message",
    [
        (IMAGES / 255, "dtype float64; save them as uint8"),
        (IMAGES.astype(np.int64), "dtype int64; save them as uint8"),
        (with_a_nan(4), "image 4 holds NaN or infinity"),
        (np.full((2, 3), np.inf), "image 0 holds NaN or infinity"),
        (IMAGES[0], r"\(8, 8, 3\); wanted \[N, height, width, channels\] with 1 or 3 channels; an axis is missing"),
        (IMAGES.transpose(0, 3, 1, 2), r"the channels seem to stand first: save images.transpose\(0, 2, 3, 1\)"),
        (IMAGES[..., :2], r"\(6, 8, 8, 2\); wanted .* with 1 or 3 channels"),
        (IMAGES[:0], r"nothing in images of shape \(0, 8, 8, 3\)"),
        (IMAGES[:, :0], r"nothing in images of shape \(6, 0, 8, 3\)"),
        (np.uint8(3) * np.ones((), np.uint8), r"images have shape \(\)"),
    ],
)
def test_what_is_no_images_is_refused_naming_its_source_and_what_helps(images, message):
    with pytest.raises(ValueError, match=f"run 7: .*{message}"):
        require_images(images, "run 7")


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_accepted(channels):
    require_images(IMAGES[..., :channels], "run 7")


@pytest.mark.parametrize(
    "labels, message",
    [
        (LABELS[:5], r"int64 of shape \(5,\); wanted one whole number for each of 6 images"),
        (LABELS / 2, "labels are float64"),
        (LABELS[:, None], r"of shape \(6, 1\)"),
        (LABELS - 1, "label -1 of image 0 is negative"),
    ],
)
def test_what_is_no_labels_is_refused(labels, message):
    with pytest.raises(ValueError, match=f"run 7: .*{message}"):
        require_labels(labels, 6, "run 7")


def test_a_nan_is_found_in_whichever_block_it_is(monkeypatch):
    monkeypatch.setattr(checks, "BLOCK", 2 * 8 * 8 * 3 * 4)  # two images
    assert [start for start, _ in blocks(with_a_nan(0))] == [0, 2, 4]
    for image in range(6):
        with pytest.raises(ValueError, match=f"image {image} holds NaN"):
            require_images(with_a_nan(image), "run 7")
