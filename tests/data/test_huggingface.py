"""Datasets of the Hugging Face Hub, here from folders."""

import sys

import numpy as np
import pytest

from dit_moe.config import ConfigError
from dit_moe.data import DATASETS, BrokenImages
from dit_moe.data.huggingface import HuggingFaceConfig
from dit_moe.data.images import FORMATS
from dit_moe.experiments.image import load_experiment
from tests.data.examples import encoded, pixels, save_huggingface, write_tree

datasets = pytest.importorskip("datasets")


def read(place, split="train", **options):
    return DATASETS.build(HuggingFaceConfig(id=str(place), **options), split)


def rows(features=None, **columns):
    """Three images, labelled unless told otherwise."""
    columns = {"image": [{"bytes": encoded(pixels(i)), "path": None} for i in range(3)], "label": [1, 0, 1]} | columns
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])} | (features or {})
    columns = {name: values for name, values in columns.items() if values is not None}
    return datasets.Dataset.from_dict(columns, datasets.Features({name: kinds[name] for name in columns}))


def save(folder, **splits):
    datasets.DatasetDict(splits).save_to_disk(str(folder))
    return folder


def labels(dataset):
    return dataset.__getitems__(range(len(dataset)))["labels"].tolist()


def test_a_saved_dataset_gives_its_images_labels_and_class_names(tmp_path):
    dataset = read(save_huggingface(tmp_path / "saved", [1, 0, 1]))
    batch = dataset.__getitems__([2, 0])
    assert dataset.class_names == ("ant", "bee") and batch["labels"].tolist() == [1, 1]
    assert np.array_equal(batch["images"].permute(0, 2, 3, 1), np.stack([pixels(2), pixels(0)]))


def test_shares_divide_the_split_of_training_so_that_the_recipe_for_own_images_takes_a_dataset(tmp_path):
    place = save_huggingface(tmp_path / "saved", [0, 1] * 20)
    config = load_experiment("my_images", ["data.name=huggingface", f"data.id={place}"]).data
    parts = [DATASETS.build(config, split) for split in ("train", "heldout", "extractor")]
    assert (config.heldout, config.reserve) == (0.2, 0.2) and all(map(len, parts))
    assert sorted(part.key(i) for part in parts for i in range(len(part))) == sorted(b"%d" % i for i in range(40))


def test_parquet_files_are_read_by_split_with_the_same_fingerprint(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "files").mkdir()
    for split in ("train", "validation"):
        rows().to_parquet(tmp_path / "files" / f"{split}-00000-of-00001.parquet")
    dataset = read(tmp_path / "files")
    assert labels(dataset) == labels(read(tmp_path / "files", "heldout")) == [1, 0, 1]
    assert dataset.fingerprint == read(save(tmp_path / "saved", train=rows())).fingerprint
    with pytest.raises(ConfigError, match=r"^train=test is no split of .*files; known: train, validation$"):
        read(tmp_path / "files", train="test")


def test_one_saved_split_is_the_training_split(tmp_path):
    rows().save_to_disk(str(tmp_path))
    assert labels(read(tmp_path)) == [1, 0, 1]
    with pytest.raises(ConfigError, match=r"^heldout=validation is no split of .*; known: train"):
        read(tmp_path, "heldout")


def test_images_may_be_files_beside_the_rows(tmp_path):
    write_tree(tmp_path, {f"{i}.png": encoded(pixels(i)) for i in range(3)})
    images = [{"bytes": None, "path": str(tmp_path / f"{i}.png")} for i in range(3)]
    save(tmp_path / "saved", train=rows(image=images))
    assert np.array_equal(read(tmp_path / "saved").__getitems__([1])["images"][0].permute(1, 2, 0), pixels(1))


def test_columns_are_found_by_their_type_or_named(tmp_path):
    image, kind = rows()["image"], datasets.Image()
    many = rows({"other": kind, "coarse": datasets.Value("int64")}, other=list(image), coarse=[0, 2, 1])
    save(tmp_path / "many", train=many)
    with pytest.raises(ConfigError, match=r"^image=null, but .* has 2 columns of the type Image; name one of image, "):
        read(tmp_path / "many")
    dataset = read(tmp_path / "many", image="other", label="coarse")
    assert labels(dataset) == [0, 2, 1] and dataset.class_names == ("0", "1", "2")
    with pytest.raises(ConfigError, match=r"^label=coarze is no column of .*; did you mean 'coarse'"):
        read(tmp_path / "many", image="other", label="coarze")
    with pytest.raises(ConfigError, match=r"^image=coarse is not a column of images"):
        read(tmp_path / "many", image="coarse")
    save(tmp_path / "none", train=rows(label=None))
    with pytest.raises(ConfigError, match=r"^label=null, but .* has no columns of the type ClassLabel; name one of "):
        read(tmp_path / "none")


@pytest.mark.parametrize(
    "kind, values, problem",
    [
        ("int64", [0, None, 1], "has no label in row 1; name another column"),
        ("int64", [0, 1, -1], "has no label in row 2"),
        (
            "int64",
            [0, 1, 7],
            "has the label 7 in row 2, but there are 3 classes; name a column of classes counted from 0",
        ),
        ("string", ["a", "b", "c"], "holds string, not whole numbers"),
        ("float32", [0, 1, 2], "holds float32, not whole numbers"),
    ],
)
def test_labels_that_are_no_class_numbers_are_refused(tmp_path, kind, values, problem):
    save(tmp_path, train=rows({"label": datasets.Value(kind)}, label=values))
    with pytest.raises(ConfigError, match=f"^label=label {problem}"):
        read(tmp_path, label="label")


def test_a_label_beyond_the_names_of_classes_is_named_with_its_row(tmp_path):
    made = rows({"label": datasets.Value("int64")}, label=[0, 99999, 1])
    made.info.features["label"] = datasets.ClassLabel(names=["ant", "bee"])
    save(tmp_path, train=made)
    with pytest.raises(ConfigError, match=r"^label=label has the label 99999 in row 1, but there are 2 classes; name"):
        read(tmp_path)


def test_the_heldout_split_has_the_classes_of_training(tmp_path):
    other = rows({"label": datasets.ClassLabel(names=["bee", "ant"])})
    save(tmp_path, train=rows(), validation=other)
    with pytest.raises(ConfigError, match=r"^heldout=validation has other classes than train=train"):
        read(tmp_path, "heldout")
    with pytest.raises(ConfigError, match=r"^heldout=None names no held-out images"):
        read(tmp_path, "heldout", heldout=None)
    with pytest.raises(ConfigError, match=r"^train=trian is no split of .*; did you mean 'train'"):
        read(tmp_path, train="trian")


def test_the_fingerprint_tells_other_labels_and_images(tmp_path):
    images = [{"bytes": encoded(pixels(i, 20, 20)), "path": None} for i in range(3)]
    kinds = [rows(), rows(label=[1, 1, 1]), rows(image=images)]
    assert len({read(save(tmp_path / str(i), train=each)).fingerprint for i, each in enumerate(kinds)}) == 3


def test_broken_images_are_named_by_row_and_file(tmp_path):
    images = [{"bytes": b"text", "path": "a.jpg"}, {"bytes": b"", "path": None}, None]
    dataset = read(save(tmp_path, train=rows(image=images)), size=8)
    with pytest.raises(BrokenImages) as error:
        dataset.__getitems__([0, 1, 2])
    assert error.value.problems == {
        0: f"{tmp_path}, train, row 0 (a.jpg) is not an image that can be read ({', '.join(FORMATS)})",
        1: f"{tmp_path}, train, row 1 is empty (0 bytes)",
        2: f"{tmp_path}, train, row 2 is null",
    }


def test_what_cannot_be_loaded_is_refused_in_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"^id=.*nowhere cannot be loaded, split train: .*; name a dataset") as error:
        read(tmp_path / "nowhere")
    assert "\n" not in str(error.value)


def test_a_missing_package_is_named_with_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"^name=huggingface needs the package .*; pip install '?datasets"):
        read("any")
