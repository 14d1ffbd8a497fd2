import errno
import hashlib

import pytest

from dit_moe.files import read_sealed, require_size, require_writable, sha256_of, write_atomically, write_sealed


@pytest.mark.parametrize("content", ["grün\n", "grün\n".encode(), lambda file: file.write("grün\n".encode())])
def test_text_bytes_and_what_a_function_writes_replace_the_file(tmp_path, content):
    path = tmp_path / "file"
    path.write_text("a longer text that was there before")
    write_atomically(path, content)
    assert path.read_bytes() == "grün\n".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    def fail(file):
        file.write(b"half")
        raise OSError("no space left")

    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_reported_with_the_file_that_did_not_fit(tmp_path):
    def fill(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path / 'file'}'"):
        write_atomically(tmp_path / "file", fill)


def test_a_folder_is_made_and_left_empty_or_named_if_that_is_impossible(tmp_path):
    require_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").touch()  # in the way: works for root too, whom permissions do not stop
    for folder in (tmp_path / "file", tmp_path / "file" / "b"):
        with pytest.raises(ValueError, match=f"{folder} cannot be written .*; choose another folder"):
            require_writable(folder)


def test_a_sealed_file_comes_back_and_no_change_to_it_is_missed(tmp_path):
    path, body = tmp_path / "manifest.json", {"format": 1, "name": "grün", "shards": [{"file": "a"}]}
    write_sealed(path, body)
    assert read_sealed(path, 1, "make it anew").items() >= body.items()
    whole = path.read_bytes()
    for i in range(len(whole) - 1):  # the last is a line's end
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
        with pytest.raises(ValueError, match=r"manifest.json .*(damaged|changed|has format)"):
            read_sealed(path, 1, "make it anew")
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"has format 1, this version reads 2; use a dit_moe to match"):
        read_sealed(path, 2, "make it anew")


def test_a_file_of_another_size_or_none_is_named_with_the_remedy(tmp_path):
    path = tmp_path / "shard"
    with pytest.raises(ValueError, match=r"shard is missing; restore it from a copy, or make it anew"):
        require_size(path, 3, "the list", "make it anew")
    path.write_bytes(b"four")
    require_size(path, 4, "the list", "make it anew")
    with pytest.raises(ValueError, match=r"shard has 4 bytes where the list says 3; restore"):
        require_size(path, 3, "the list", "make it anew")
    assert sha256_of(path) == hashlib.sha256(b"four").hexdigest()
