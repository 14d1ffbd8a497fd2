"""Two commands with one output: nothing is mixed or damaged, and none says that it did what another did."""

from pathlib import Path

import pytest

from tests.scripts import said

pytest.importorskip("transformers")

SCRIPT = Path(__file__).with_name("race_script.py")


def test_what_lies_there_after_a_race_is_whole_and_of_a_command_that_ended_well(finished_run, tmp_path):
    """The two kinds that once failed; `race_script.py` without kinds tries eval, encode and routing, too."""
    assert said(SCRIPT, finished_run, tmp_path, 2, "sample", "export")[0] == "sample"
