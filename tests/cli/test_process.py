"""What the commands tell OpenMP and the allocator before torch is imported."""

import os
import re
import subprocess
import sys

import pytest

PROGRAM = """
import os, resource
from dit_moe.cli.process import prepare_process
prepare_process()
import torch
torch.set_num_threads(1)
faults = []
for _ in range(40):  # the allocator needs some to find a place that fits
    torch.ones(16 * 2**20)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
prepare_process()
print(os.environ.get("GOMP_SPINCOUNT"), min(after - before for before, after in zip(faults, faults[1:])))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
@pytest.mark.parametrize(
    ("environment", "spins", "kept"),
    [
        ({}, "1000", True),
        ({"GOMP_SPINCOUNT": "7", "MALLOC_ARENA_MAX": "8"}, "7", False),
        ({"OMP_WAIT_POLICY": "active", "GLIBC_TUNABLES": "glibc.malloc.arena_max=8"}, "None", False),
    ],
)
def test_freed_memory_is_kept_and_waiting_threads_sleep_soon_unless_the_environment_says_otherwise(
    environment, spins, kept
):
    own = {name: value for name, value in os.environ.items() if not re.match("GOMP_|OMP_|GLIBC_|MALLOC_", name)}
    command = [sys.executable, "-c", PROGRAM]
    shown = subprocess.run(command, env=own | environment, capture_output=True, text=True, check=True, timeout=60)
    found, faults = shown.stdout.split()
    assert found == spins
    assert (int(faults) < 100) == kept  # 64 MiB are 16 384 pages
