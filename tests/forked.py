"""``forked.py N SCRIPT WORDS…``: run a script in N processes, as torchrun would, in a fraction of the time.

What the script imports, and what the package imports late, is imported once, before the processes are forked. If one
fails, the others are stopped.
"""

from __future__ import annotations

import ast
import importlib
import os
import runpy
import signal
import socket
import sys
from pathlib import Path


def main(count: int, script: Path) -> int:
    sys.path.insert(0, str(script.parent))
    imports = [node for node in ast.parse(script.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    exec(compile(ast.Module(imports, []), script, "exec"), {"__name__": "imported"})
    importlib.import_module("tests.scripts").prepare_forks()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ |= {"WORLD_SIZE": f"{count}", "LOCAL_WORLD_SIZE": f"{count}"}
    running = set()
    for rank in range(count):
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"}
            sys.argv = [str(script), *sys.argv[3:]]
            runpy.run_path(str(script), run_name="__main__")
            return 0
        running.add(child)
    worst = 0
    while running:
        child, status = os.wait()
        running.remove(child)
        if code := os.waitstatus_to_exitcode(status):
            worst = worst or abs(code)
            for other in running:
                os.kill(other, signal.SIGTERM)
    return worst


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2])))
