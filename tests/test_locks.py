"""An output is held by one process at a time, and nothing is left of that."""

import fcntl
import os

import pytest

from dit_moe.locks import exclusive
from tests.scripts import in_use


@pytest.mark.parametrize("file", ["", "result.json"])
def test_an_output_that_another_process_writes_is_refused_until_that_has_ended(tmp_path, file):
    with in_use(tmp_path, file):
        wanted = f"{tmp_path / file} is in use by another process; wait for it, or choose another folder"
        with pytest.raises(ValueError, match=wanted), exclusive(tmp_path, file):
            pass
    with exclusive(tmp_path, file), exclusive(tmp_path, file):  # a process may enter again
        [lock] = tmp_path.iterdir()
        with lock.open() as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert not any(tmp_path.iterdir())


def test_another_file_in_the_folder_is_another_output(tmp_path):
    with in_use(tmp_path), in_use(tmp_path, "a.json"), exclusive(tmp_path, "b.json"):
        pass


def test_a_folder_made_for_a_lock_goes_with_it_unless_it_holds_something(tmp_path):
    with exclusive(tmp_path / "empty"):
        pass
    with exclusive(tmp_path / "full"):
        (tmp_path / "full" / "file").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_a_lock_file_that_was_there_is_used_and_stays(tmp_path):
    (tmp_path / ".lock").write_text("a user's")
    with exclusive(tmp_path), pytest.raises(BlockingIOError), (tmp_path / ".lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert (tmp_path / ".lock").read_text() == "a user's"


def test_who_had_the_lock_file_open_when_its_holder_removed_it_takes_a_new_one(tmp_path, monkeypatch):
    flock, removed = fcntl.flock, []

    def removed_first(descriptor, operation):
        flock(descriptor, operation)
        if not removed:
            removed.append(os.fstat(descriptor).st_ino)
            os.unlink(tmp_path / ".lock")

    monkeypatch.setattr(fcntl, "flock", removed_first)
    with exclusive(tmp_path):
        assert (tmp_path / ".lock").exists() and removed
    assert not any(tmp_path.iterdir())
