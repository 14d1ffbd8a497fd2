"""What the C libraries below torch are told before it is imported: docs/performance.md has the measurements."""

from __future__ import annotations

import ctypes
import os
import sys

SPINS = "1000"  # how often a thread of OpenMP looks for work before it sleeps; libgomp's own are about 300 000
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of malloc.h


def prepare_process() -> None:
    """Let threads that wait for work leave the cores to others, and the allocator keep memory that was freed.

    A spinning thread takes a core from any other program: two trainings side by side would slow each other fiftyfold.
    Memory that the allocator gives back is cleared by the system page by page when it is asked for again, which for a
    large tensor takes longer than to compute it. Does nothing once torch is imported, on other systems than Linux with
    glibc, or where the environment says otherwise (GOMP_SPINCOUNT or OMP_WAIT_POLICY; GLIBC_TUNABLES or MALLOC_…).
    """
    if "torch" in sys.modules or sys.platform != "linux":
        return
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    if any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_TOP_PAD, 2**26)
