import errno

import pytest

from dit_moe.files import require_writable, write_atomically


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
