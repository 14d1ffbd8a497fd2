"""Weights are checked, run no code, and are downloaded once."""

import hashlib
import os
import socket
import threading
import time
import zipfile
from urllib.error import URLError

import pytest
import safetensors.torch
import torch

from dit_moe import downloads
from dit_moe.extractors.base import fetch
from dit_moe.extractors.inception import InceptionConfig, InceptionExtractor, missing_weights
from dit_moe.weights import read_tensors, sha256_of_tensors, sha256_of_weights


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of torch hub, and where its files go."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture
def served(tmp_path):
    """A file at a URL, and its hash."""
    path = tmp_path / "weights.pth"
    path.write_bytes(b"weights" * 1000)
    return path.as_uri(), hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_hash_of_tensors_does_not_depend_on_their_file(tmp_path):
    tensors = {"b": torch.randn(2, 3).bfloat16(), "a": torch.tensor(1), "empty": torch.zeros(0)}
    torch.save(dict(reversed(tensors.items())), tmp_path / "one.pth")
    safetensors.torch.save_file(tensors, tmp_path / "two.safetensors")
    one, two = (read_tensors(tmp_path / name) for name in ("one.pth", "two.safetensors"))
    assert sha256_of_tensors(one) == sha256_of_tensors(two) == sha256_of_tensors(tensors)
    assert sha256_of_tensors(one) != sha256_of_tensors({**tensors, "a": torch.tensor(2)})
    assert sha256_of_tensors({"a": torch.zeros(2, 3)}) != sha256_of_tensors({"a": torch.zeros(3, 2)})


def test_code_in_a_file_of_weights_is_not_run(tmp_path):
    path, trace = tmp_path / "evil.pth", tmp_path / "trace"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(trace),)

    torch.save({"a": Evil()}, path)
    for look in (read_tensors, lambda path: InceptionExtractor(InceptionConfig(weights=str(path), verify=False))):
        with pytest.raises(ValueError, match=f"{path} is no file of weights .*--weights") as error:
            look(path)
        assert "weights_only" not in str(error.value)  # PyTorch's advice, by which code in the file would run
    assert not trace.exists()


def test_what_holds_no_weights_is_refused(tmp_path):
    (tmp_path / "text.pth").write_text("not weights")
    (tmp_path / "text.safetensors").write_text("not weights")
    torch.save({"state_dict": {"a": torch.zeros(1)}}, tmp_path / "nested.pth")
    safetensors.torch.save_file({"a": torch.zeros(2, dtype=torch.int32)}, tmp_path / "whole.safetensors")
    (tmp_path / "header.safetensors").write_bytes((10**13).to_bytes(8, "little") + b"{}" * 9)
    torch.save({"a": torch.zeros(10**6)}, tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as plain, zipfile.ZipFile(tmp_path / "bomb.pth", "w", 8) as packed:
        for entry in plain.namelist():  # torch would unpack whatever the zip says
            packed.writestr(entry, plain.read(entry))
    for name, problem in {
        "whole.safetensors": "holds int32 for a, which are no weights",
        "text.pth": r"is no file of weights \(a zip or pickle of tensors",
        "text.safetensors": "is no file of weights",
        "none.pth": r"cannot be read \(No such file",
        "none.safetensors": r"cannot be read",
        "header.safetensors": "is no file of weights",
        "bomb.pth": "is no file of weights",
        "nested.pth": "holds other things than weights",
    }.items():
        with pytest.raises(ValueError, match=f"{name} {problem}.*--weights"):
            read_tensors(tmp_path / name)
    for name in ("none.pth", "."):
        with pytest.raises(ValueError, match=r"cannot be read .*--weights FILE"):
            sha256_of_weights(tmp_path / name)


@pytest.mark.parametrize(
    "content, problem",
    [
        (b"", "is empty; get it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a pointer of Git LFS .*; run git lfs pull"),
        (b"\n<!DOCTYPE html><html>", "is a web page that was saved in place of the file; download the file itself"),
    ],
)
@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_what_stands_in_place_of_weights_is_told(tmp_path, name, content, problem):
    (tmp_path / name).write_bytes(content)
    for look in (read_tensors, sha256_of_weights):
        with pytest.raises(ValueError, match=rf"{name} {problem}"):
            look(tmp_path / name)


def test_several_that_ask_at_once_download_once_and_another_hash_leaves_no_file(hub, served, monkeypatch):
    url, sha256 = served
    with pytest.raises(ValueError, match=r"nor can it be downloaded \(invalid hash value .*--weights FILE"):
        fetch(url, "0" * 64)
    assert not list(hub.glob("*.pth")) and not list(hub.glob("*.partial"))
    downloads, start, paths = [], threading.Barrier(5), []
    original = torch.hub.download_url_to_file

    def download(*args, **options):
        downloads.append(args)
        original(*args, **options, progress=False)

    def ask():
        start.wait()
        paths.append(fetch(url, sha256))

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    threads = [threading.Thread(target=ask) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(downloads) == 1 and set(paths) == {hub / "weights.pth"}
    assert sha256_of_weights(paths[0]) == sha256
    assert sorted(path.name for path in hub.iterdir()) == ["weights.pth", "weights.pth.lock"]


def test_without_network_the_error_says_where_to_get_inception(hub, monkeypatch):
    def offline(*args, **options):
        raise OSError("no network")

    monkeypatch.setattr(downloads.urllib.request, "urlopen", offline)
    with pytest.raises(ValueError, match=r"\(no network\); get it .*https://.*6726825d.pth.* --weights FILE"):
        InceptionExtractor(InceptionConfig())


def test_the_reason_without_a_network_is_short_and_in_words(hub, monkeypatch):
    def offline(*args, **options):
        raise URLError(socket.gaierror(-2, "Name or service not known"))

    monkeypatch.setattr(downloads.urllib.request, "urlopen", offline)
    assert missing_weights() == "Inception's weights cannot be downloaded (Name or service not known)"


def test_a_network_that_swallows_questions_is_waited_for_once_and_no_longer_than_patience(hub, monkeypatch):
    def swallow(*args, **options):  # as the lookup of a name does, whatever the timeout
        asked.append(args)
        never.wait(20)
        raise OSError

    asked, never = [], threading.Event()
    monkeypatch.setattr(downloads.urllib.request, "urlopen", swallow)
    monkeypatch.setattr(downloads, "PATIENCE", 0.2)
    start = time.monotonic()
    for _ in range(2):
        assert "(no answer within 0.2 seconds)" in missing_weights()
    never.set()
    assert len(asked) == 1 and time.monotonic() - start < 10  # of the 20 that one question takes


def test_a_copy_in_the_cache_is_taken_and_checked(hub, monkeypatch):
    hub.mkdir(parents=True)
    copy = hub / "weights-inception-2015-12-05-6726825d.pth"
    copy.write_text("damaged")
    with pytest.raises(ValueError, match=f"{copy} has sha256 .*--any-weights"):
        InceptionExtractor(InceptionConfig())
