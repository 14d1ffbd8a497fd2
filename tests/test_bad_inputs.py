"""Commands answer to bad input of every kind with a sentence; see tests/bad_inputs/."""

import subprocess
import sys
from pathlib import Path


def test_bad_inputs_are_refused_in_a_sentence_in_time_in_little_memory_and_change_nothing():
    command = [sys.executable, "-m", "tests.bad_inputs", "--seed", "0", "--count", "60"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "60 bad inputs" in done.stdout
