"""The memory that this machine gives to a process: all of it, or what a container or a job of a cluster may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

GROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")  # control groups, cgroups(7)


def memory_of_machine() -> int:
    """Bytes, without those of GPUs."""
    return min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *_limits()])


def _limits() -> Iterator[int]:
    """Those of the control groups that this process is in, of either version, and of all around them."""
    with suppress(OSError):  # there are none outside of Linux
        for line in OWN_GROUPS.read_text(encoding="utf-8").splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0":
                root, name = GROUPS, "memory.max"
            elif "memory" in controllers.split(","):
                root, name = GROUPS / "memory", "memory.limit_in_bytes"
            else:
                continue
            group = Path(path.lstrip("/"))
            for each in (group, *group.parents):  # in a container the path may be the host's, and its end be the root
                with suppress(OSError, ValueError):  # of "max", no limit
                    yield int((root / each / name).read_text(encoding="utf-8"))
