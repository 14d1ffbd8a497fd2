"""How processes come together and part."""

import os
import subprocess
import sys

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
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    said = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True, timeout=120).stdout
    assert sorted(said.split()) == ["False", "False", "True", "True"]
