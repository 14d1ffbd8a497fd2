"""How processes come together and part."""

from tests.scripts import said

SCRIPT = """
import atexit
import torch

def tell():
    print(f"{torch.distributed.is_initialized()}\\n", end="", flush=True)

atexit.register(tell)  # first in, so last out: after all that join_processes registers
from dit_moe.processes import join_processes

join_processes()
join_processes()
tell()
"""


def test_processes_on_the_cpu_leave_their_group_before_the_interpreter_ends(tmp_path):
    # Otherwise gloo's threads may let go of a tensor while Python is being torn down, which now and then aborts one.
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    assert sorted(said(script, processes=2)) == ["False", "False", "True", "True"]
