import pytest

from dit_moe import progress
from dit_moe.progress import work_bar


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only where a test says so."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def told(capsys) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_off_a_terminal_long_work_says_soon_what_it_is_and_then_how_far(capsys, clock):
    with work_bar("training runs/x/extractor", 1000, "steps") as advance:
        shown = []
        for clock[0] in range(1, 51):
            advance(4)
            shown += told(capsys)
    assert shown == [f"training runs/x/extractor: {done} of 1,000 steps, 4 a second" for done in (4, 84, 164)]
    assert told(capsys) == ["training runs/x/extractor: 200 steps, 4 a second"]


def test_off_a_terminal_images_that_are_not_done_are_not_told_in_parts(capsys, clock):
    with work_bar("sampling", 1000, "images") as advance:
        clock[0] = 100.0
        advance(100 / 3)
    assert told(capsys)[0] == "sampling: 33 of 1,000 images, 0.333 a second"


def test_off_a_terminal_short_work_says_one_line(capsys, clock):
    with work_bar("sampling", 10, "images") as advance:
        for clock[0] in (0.2, 0.5):
            advance(5)
    assert told(capsys) == ["sampling: 10 images, 20 a second"]


def test_work_of_unknown_length_says_how_much_is_done(capsys, clock):
    with work_bar("tokenising train", None, "MB") as advance:
        clock[0] = 2.0
        advance(3)
        assert told(capsys) == ["tokenising train: 3 MB, 1.5 a second"]
