"""Sets that torchvision downloads, here small ones of the same format from files, and their class folders."""

import gzip
import hashlib
import io
import os
import pickle
import re
import tarfile
import threading
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler

import numpy as np
import pytest
import scipy.io
import torch
import torchvision.datasets
from PIL import Image

from dit_moe import downloads
from dit_moe.config import ConfigError, NotThere
from dit_moe.data import DATASETS
from dit_moe.data.torchvision_downloads import SETS
from dit_moe.data.torchvision_sets import TorchvisionConfig
from dit_moe.schema import located
from tests.data.examples import class_files, encoded, food_files, pixels, write_tar, write_tree

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
ARCHIVE = "cifar-10-python.tar.gz"
EACH = 12  # images of a class


def md5(content):
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def batch(images, seed):
    """(pixels [N, 3072], labels) of so many images, the classes by turns."""
    rows = np.random.default_rng(seed).integers(256, size=(images, 3072), dtype=np.uint8)
    return rows, [row % len(CLASSES) for row in range(images)]


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """An archive like CIFAR-10's, which torchvision takes for it and downloads from this machine."""
    batches = {"data_batch_1": batch(EACH * len(CLASSES), 1), "test_batch": batch(20, 2)}
    files = {name: pickle.dumps({"data": rows, "labels": labels}) for name, (rows, labels) in batches.items()}
    files["batches.meta"] = pickle.dumps({"label_names": list(CLASSES)})
    archive = tmp_path / "server" / ARCHIVE
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    server = HTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=archive.parent))
    threading.Thread(target=server.serve_forever, args=(0.01,)).start()
    recorded = {
        "url": f"http://127.0.0.1:{server.server_port}/{ARCHIVE}",
        "tgz_md5": md5(archive.read_bytes()),
        "train_list": [["data_batch_1", md5(files["data_batch_1"])]],
        "test_list": [["test_batch", md5(files["test_batch"])]],
        "meta": {"filename": "batches.meta", "key": "label_names", "md5": md5(files["batches.meta"])},
    }
    for name, value in recorded.items():
        monkeypatch.setattr(torchvision.datasets.CIFAR10, name, value)
    monkeypatch.setattr(downloads, "_unanswered", {})
    yield archive
    server.shutdown()
    server.server_close()


def read(path, split="train", name="cifar10", **options):
    return DATASETS.build(TorchvisionConfig(set=name, path=str(path), **options), split)


def everything(dataset):
    return dataset.__getitems__(range(len(dataset)))


def test_a_set_is_downloaded_once_and_read_from_then_on(cifar10, tmp_path):
    path = tmp_path / "data" / "cifar10"
    rows, labels = batch(EACH * len(CLASSES), 1)
    images = torch.from_numpy(rows.reshape(-1, 3, 32, 32))
    for _ in range(2):
        found = read(path)
        assert torch.equal(everything(found)["images"], images) and everything(found)["labels"].tolist() == labels
        assert found.class_names == CLASSES and found.image_shape == (3, 32, 32)
        cifar10.unlink(missing_ok=True)
    assert len(read(path, "heldout")) == 20 and len(read(path, "heldout", heldout="train", train="test")) == len(rows)
    assert os.listdir(path) == ["cifar-10-batches-py"]
    assert read(path).fingerprint != read(path, "heldout").fingerprint


def test_an_archive_that_was_put_there_is_unpacked_and_stays(cifar10, tmp_path):
    path = write_tree(tmp_path / "data", {ARCHIVE: cifar10.read_bytes()})
    cifar10.unlink()
    assert len(read(path)) == EACH * len(CLASSES) and (path / ARCHIVE).is_file()


def test_files_that_belong_in_a_folder_of_the_set_are_found_beside_it(tmp_path, monkeypatch):
    pictures = {f"jpg/image_{i:05d}.jpg": encoded(pixels(i), "JPEG") for i in (1, 2, 3)}
    files = {"102flowers.tgz": gzip.compress(write_tar(tmp_path / "images.tar", pictures).read_bytes())}
    for name, arrays in (
        ("imagelabels.mat", {"labels": [1, 2, 2]}),
        ("setid.mat", {"trnid": [3, 1], "valid": [2], "tstid": [2]}),
    ):
        scipy.io.savemat(content := io.BytesIO(), arrays)
        files[name] = content.getvalue()
    kinds = dict(zip(("image", "label", "setid"), files.items(), strict=True))
    recorded = {kind: (name, md5(content)) for kind, (name, content) in kinds.items()}
    monkeypatch.setattr(torchvision.datasets.Flowers102, "_file_dict", recorded)
    found = read(write_tree(tmp_path / "data", files), name="flowers102")
    assert found.labels_N.tolist() == [1, 0] and found.read(0) == pictures["jpg/image_00003.jpg"]
    assert found.class_names[:2] == ("pink primrose", "hard-leaved pocket orchid")
    assert found.locate(1) == str(tmp_path / "data" / "flowers-102" / "jpg" / "image_00001.jpg")


@pytest.mark.parametrize("name", SETS)
def test_torchvision_has_every_set_with_the_md5_of_its_files(name):
    kind = getattr(torchvision.datasets, SETS[name].kind)
    for file, recorded in [*SETS[name].archives(kind), *SETS[name].pickles(kind)]:
        assert file.rpartition("/")[2] and re.fullmatch("[0-9a-f]{32}", recorded)


def test_class_folders_of_the_same_images_have_the_same_classes_and_are_divided_alike(cifar10, tmp_path):
    rows, labels = batch(EACH * len(CLASSES), 1)
    pictures = rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    files = {
        f"{CLASSES[label]}/{row // len(CLASSES):04d}.jpg": encoded(Image.fromarray(picture))
        for row, (label, picture) in enumerate(zip(labels, pictures, strict=True))
    }
    folder, shares = write_tree(tmp_path / "folder", files), {"heldout": 0.2, "reserve": 0.2}
    for split in ("train", "heldout", "extractor"):
        one, other = read(folder, split, **shares), read(tmp_path / "downloaded", split, **shares)
        assert one.class_names == other.class_names and one.class_counts() == other.class_counts()
        rows_of = [
            {(each.numpy().tobytes(), int(label)) for each, label in zip(*everything(found).values(), strict=True)}
            for found in (one, other)
        ]
        assert rows_of[0] == rows_of[1] and len(rows_of[0]) == len(one)


class Harm:
    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.mark.parametrize("file", ["data_batch_1", "test_batch", "batches.meta"])
def test_no_file_is_unpickled_whose_md5_is_another(cifar10, tmp_path, monkeypatch, file):
    monkeypatch.chdir(tmp_path)
    read("data")
    (tmp_path / "data" / "cifar-10-batches-py" / file).write_bytes(pickle.dumps(Harm()))
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda path, md5: True)
    with pytest.raises(
        ConfigError, match=rf"^path=data: .*{file} is missing or damaged, by its md5; delete data/cifar"
    ):
        read("data")
    assert not (tmp_path / "harm").exists()


def test_without_network_the_error_names_the_file_to_get_and_leaves_nothing(cifar10, tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", f"http://127.0.0.1:1/{ARCHIVE}")
    path = tmp_path / "data"
    problem = (
        rf"^path={path} has no cifar-10-batches-py, and it cannot be downloaded \(Connection refused\); put {ARCHIVE}"
    )
    remedy = r"\(from http://.*\) there, or name a folder that has its images in class folders$"
    with pytest.raises(NotThere, match=f"{problem} {remedy}"):
        read(path)
    assert not path.exists()


def test_a_damaged_archive_is_refused_downloaded_or_put_there_and_that_stays_as_it_is(cifar10, tmp_path):
    content = cifar10.read_bytes()[:-1]
    cifar10.write_bytes(content)
    with pytest.raises(NotThere, match=r"cannot be downloaded \(File not found or corrupted"):
        read(tmp_path / "data")
    path = write_tree(tmp_path / "other", {ARCHIVE: content})
    with pytest.raises(
        ConfigError, match=rf"^path={path}: .*{ARCHIVE} is not the file of CIFAR10, whose md5 is \w+; del"
    ):
        read(path)
    assert (path / ARCHIVE).read_bytes() == content and os.listdir(path) == [ARCHIVE]


@pytest.mark.parametrize(
    "options, problem",
    [
        ({"name": "cifar"}, r"set=cifar is not known; did you mean 'cifar10'\? known: cifar10, cifar100, dtd"),
        ({"name": "food101", "train": "val"}, "train=val is no split of food101; known: train, test"),
        ({"heldout": "train"}, "heldout=train is trained on; name another split, a share, or null"),
    ],
)
def test_what_is_no_set_and_no_split_is_refused_with_those_there_are(tmp_path, options, problem):
    with pytest.raises(ConfigError, match=f"^{problem}"):
        read(write_tree(tmp_path, food_files()), **options)


def test_class_folders_must_be_as_many_as_the_set_has_classes_and_their_held_out_images_a_share_or_folder(tmp_path):
    path = write_tree(tmp_path, class_files())
    with pytest.raises(ConfigError, match=rf"^path={path} holds 2 class folders, and cifar10 has 10 classes; name its"):
        read(path)
    with pytest.raises(ConfigError, match=r"^heldout=test is no folder and no share, .*; give the share .*=0.1$"):
        read(path, "heldout")


def test_a_split_is_no_path_though_a_folder_of_its_name_is_there_and_held_out_class_folders_are_one(tmp_path):
    for name in ("test", "other"):
        (tmp_path / name).mkdir()
    splits = [located(TorchvisionConfig(set="stl10", heldout=each), tmp_path).heldout for each in ("test", "other")]
    assert splits == ["test", str(tmp_path / "other")]
