import errno
import fcntl
import hashlib
import os
from pathlib import Path

import pytest

from dit_moe import files
from dit_moe.files import (
    atomic_file,
    atomic_folder,
    require_own,
    require_regular,
    require_size,
    require_writable,
    sha256_of,
    write_atomically,
)


@pytest.mark.parametrize("content", ["grün\n", "grün\n".encode()])
def test_text_and_bytes_replace_the_file(tmp_path, content):
    path = tmp_path / "file"
    path.write_text("a longer text that was there before")
    write_atomically(path, content)
    assert path.read_bytes() == "grün\n".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    def fail():
        with atomic_file(path) as file:
            file.write(b"half")
            raise OSError("no space left")

    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(OSError, match="no space left"):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_device_or_a_pipe_is_not_replaced_by_a_file_nor_is_a_link_to_one(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path / "link", Path("/dev/stdout")):
        before = path.lstat()
        with pytest.raises(ValueError, match=f"{path} is a (pipe, a device|link).*, and a file is to be written"):
            require_regular(path)
        assert path.lstat().st_ino == before.st_ino
    with pytest.raises(ValueError, match="is a pipe"):
        write_atomically(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink() and len(list(tmp_path.iterdir())) == 2


def test_no_file_or_link_of_a_user_is_taken_for_a_temporary_one(tmp_path):
    (tmp_path / "file.partial").symlink_to(tmp_path / "precious")
    (tmp_path / "precious").write_text("precious")
    write_atomically(tmp_path / "file", "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "file.partial", "precious"]
    assert (tmp_path / "precious").read_text() == "precious"


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600)])
def test_those_may_read_a_file_whom_the_umask_lets(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "file", "new")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_the_next_writer_removes_what_a_killed_one_left_and_nothing_that_is_being_written(tmp_path, kind):
    write = atomic_file if kind == "file" else atomic_folder
    path = tmp_path / ("n" * 240)
    with write(path):
        [ours] = tmp_path.iterdir()
        left = ours.with_name(ours.name.replace(ours.name.split(".")[2], "00000000"))
        left.touch() if kind == "file" else left.mkdir()
        other = tmp_path / left.name.replace(".nn", ".xn")  # of another output
        other.touch()
        with write(path):
            assert not left.exists() and ours.exists() and other.exists()
    assert {each.name for each in tmp_path.iterdir()} == {path.name, other.name}


@pytest.mark.parametrize("write", [atomic_file, atomic_folder])
def test_a_writer_that_was_taken_for_dead_before_it_had_its_lock_begins_anew(tmp_path, write, monkeypatch):
    flock, first = fcntl.flock, []

    def removed_first(descriptor, operation):
        flock(descriptor, operation)
        if not first:
            [private] = tmp_path.iterdir()
            first.append(private)
            private.rmdir() if private.is_dir() else private.unlink()

    monkeypatch.setattr(fcntl, "flock", removed_first)
    with write(tmp_path / "output"):
        assert first and not first[0].exists()
    assert [path.name for path in tmp_path.iterdir()] == ["output"]


def test_a_folder_appears_whole_or_not_at_all_and_replaces_only_what_is_not_foreign(tmp_path, monkeypatch):
    def fill(content, foreign=files.everything):
        with atomic_folder(tmp_path / "out", foreign) as unfinished:
            (unfinished / "file").write_text(content)
            if content == "bad":
                raise ValueError("bad")

    def not_file(folder):
        return [name for name in os.listdir(folder) if name != "file"]

    with pytest.raises(ValueError, match="bad"):
        fill("bad")
    assert not any(tmp_path.iterdir())
    fill("first")
    with pytest.raises(ValueError, match=r"out is there already and holds file, which would be lost; move it away, or"):
        fill("second")
    fill("second", not_file)
    assert (tmp_path / "out" / "file").read_text() == "second"
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(ValueError, match=r"holds mine, which would be lost"):
        fill("third", not_file)
    assert (tmp_path / "out" / "file").read_text() == "second" and (tmp_path / "out" / "mine").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file is there already and is no folder"), atomic_folder(tmp_path / "file"):
        pass
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for current in (Path(), tmp_path / "empty"):
        with pytest.raises(ValueError, match="is the current folder, whose place"), atomic_folder(current):
            pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "out"]


def test_the_last_of_two_writers_of_a_folder_wins_and_a_link_to_it_stays(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "out", target_is_directory=True)
    with atomic_folder(tmp_path / "out", lambda folder: []) as first:
        (first / "first").touch()
        with atomic_folder(tmp_path / "link", lambda folder: []) as second:
            (second / "second").touch()
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["second"]
    assert [path.name for path in (tmp_path / "link").iterdir()] == ["first"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "out"]


def test_nothing_is_written_over_what_lies_there_unless_that_is_ours(tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "notes.txt").touch()
    require_own(tmp_path, ("manifest.json", "shards"), False)
    (tmp_path / "shards" / "0.tar").touch()
    with pytest.raises(ValueError, match=r"shards is there already, and nothing says that dit-moe wrote it; move it"):
        require_own(tmp_path, ("manifest.json", "shards"), False)
    require_own(tmp_path, ("manifest.json", "shards"), True)
    (tmp_path / "manifest.json").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"manifest.json is a pipe, a device or a link to nothing"):
        require_own(tmp_path, ("manifest.json",), False)


def test_a_full_disk_is_reported_with_the_file_that_did_not_fit(tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match=f"{full.strerror}: '{tmp_path / 'file'}'"), atomic_file(tmp_path / "file"):
        raise full


def test_a_folder_is_made_and_left_empty_or_named_if_that_is_impossible(tmp_path):
    require_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").touch()  # in the way: works for root too, whom permissions do not stop
    for folder in (tmp_path / "file", tmp_path / "file" / "b"):
        with pytest.raises(ValueError, match=f"{folder} cannot be written .*; choose another folder"):
            require_writable(folder)


def test_a_file_of_another_size_or_none_is_named_with_the_remedy(tmp_path):
    path = tmp_path / "shard"
    with pytest.raises(ValueError, match=r"shard is missing; restore it from a copy, or make it anew"):
        require_size(path, 3, "the list", "make it anew")
    path.write_bytes(b"four")
    require_size(path, 4, "the list", "make it anew")
    with pytest.raises(ValueError, match=r"shard has 4 bytes where the list says 3; restore"):
        require_size(path, 3, "the list", "make it anew")
    assert sha256_of(path) == hashlib.sha256(b"four").hexdigest()
