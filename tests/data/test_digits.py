import hashlib

import numpy as np
import pytest
from sklearn.datasets import load_digits

from dit_moe.data import DATASETS
from dit_moe.data.digits import DigitsConfig, pixels_to_uint8, split_indices

SIZES = {"train": 898, "heldout": 450, "extractor": 449}


@pytest.fixture(scope="module")
def parts():
    return split_indices(load_digits().target)


def test_splits_have_the_stated_sizes_and_share_no_image(parts):
    assert {name: len(part) for name, part in parts.items()} == SIZES
    assert np.array_equal(np.sort(np.concatenate(list(parts.values()))), np.arange(1797))


def test_splits_never_change(parts):
    content = b"".join(parts[name].astype("<i8").tobytes() for name in SIZES)
    assert hashlib.sha256(content).hexdigest() == "54d4e41c47c0c91f7a2e1ee1188aeaf4c6de05d5cf65a34df1e9c870ec9eef8c"


def test_every_split_has_each_class_at_its_share_of_the_whole_within_one_image(parts):
    labels = load_digits().target
    for name, share in {"train": 2 / 4, "heldout": 1 / 4, "extractor": 1 / 4}.items():
        assert np.abs(np.bincount(labels[parts[name]]) - share * np.bincount(labels)).max() <= 1


def test_no_image_of_one_split_is_a_copy_of_one_in_another():
    images = {name: _all(name)["images"].flatten(1).tolist() for name in SIZES}
    seen = [set(map(tuple, part)) for part in images.values()]
    assert len(seen[0] | seen[1] | seen[2]) == sum(map(len, seen))


def _all(split):
    dataset = DATASETS.build(DigitsConfig(), split)
    return dataset.__getitems__(range(len(dataset)))


@pytest.mark.parametrize("split", SIZES)
def test_a_split_as_a_dataset_has_its_size(split):
    assert len(DATASETS.build(DigitsConfig(), split)) == SIZES[split]


def test_images_and_labels_belong_together(parts):
    raw = load_digits()
    batch = _all("heldout")
    assert np.array_equal(batch["labels"].numpy(), raw.target[parts["heldout"]])
    assert np.array_equal((batch["images"][:, 0].numpy() / 255 * 16).round(), raw.images[parts["heldout"]])


def test_grey_levels_map_to_the_nearest_of_255_steps_with_halves_up():
    expected = [0, 16, 32, 48, 64, 80, 96, 112, 128, 143, 159, 175, 191, 207, 223, 239, 255]
    assert pixels_to_uint8(np.arange(17.0)[None]).tolist() == [expected]


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0, 17.0])
def test_a_bad_pixel_is_refused_naming_image_value_and_place(value):
    pixels = np.zeros((4, 8, 8))
    pixels[2, 3, 5] = value
    with pytest.raises(ValueError, match=rf"image 2 .* pixel {value} at \(3, 5\)"):
        pixels_to_uint8(pixels)
