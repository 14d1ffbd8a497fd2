"""A command in a fork of this process, with a limit of its time, and what it said and changed."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import stat
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

SECONDS = 20  # of a command's own time
MEMORY = 2 * 2**30  # bytes that a command may hold
SENTENCES = 3
LONGEST = 1200  # characters of an answer


@dataclass(frozen=True)
class Answer:
    """How a command ended."""

    code: int  # exit code; of a signal, minus its number
    out: str
    err: str
    seconds: float  # of the CPU
    memory: int  # bytes, at most
    hung: bool


def run(words: list[str], folder: Path, limit: float = SECONDS) -> Answer:
    """``dit-moe words…`` in `folder`. This process has to have no other threads, as forks do not get those."""
    with tempfile.TemporaryDirectory() as aside:
        child = os.fork()
        if child == 0:
            _be_the_command(words, folder, Path(aside))
        began, hung = time.monotonic(), False
        while True:
            pid, status, usage = os.wait4(child, os.WNOHANG)
            if pid:
                break
            if not hung and _cpu_seconds(child, time.monotonic() - began) > limit:
                os.killpg(child, signal.SIGKILL)
                hung = True
            time.sleep(0.005)
        said = [Path(aside, name).read_text(errors="replace") for name in ("out", "err")]
    seconds = usage.ru_utime + usage.ru_stime
    return Answer(os.waitstatus_to_exitcode(status), *said, seconds, usage.ru_maxrss * 1024, hung)


def _cpu_seconds(pid: int, wall: float) -> float:
    """What a process has used of the CPU; of one that waits for something, a third of the time on the wall."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    used = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return max(used, wall / 3)


def _be_the_command(words: list[str], folder: Path, aside: Path) -> None:
    code = 1
    try:
        os.setsid()
        os.chdir(folder)
        for name, number in (("out", 1), ("err", 2)):
            os.dup2(os.open(aside / name, os.O_WRONLY | os.O_CREAT), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ["TMPDIR"] = str(aside)
        tempfile.tempdir = None
        from dit_moe.cli import main

        code = main(words)
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def contents(folder: Path) -> dict[str, str]:
    """What every name below `folder` stands for; locks of ours aside."""
    found = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        if stat.S_ISREG(mode):
            if not path.name.endswith(".lock"):
                with path.open("rb") as file:
                    found[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
        else:
            found[str(path.relative_to(folder))] = f"{stat.S_IFMT(mode):o}"
    return found


def faults(answer: Answer, before: dict[str, str], after: dict[str, str]) -> list[str]:
    """What is wrong with an answer to bad input; a command that ended well, exit code 0, is not judged here."""
    found = []
    if answer.hung:
        found.append(f"ran for more than {SECONDS} s")
    if answer.memory > MEMORY:
        found.append(f"took {answer.memory / 2**30:.1f} GiB")
    if answer.code not in (0, 1, 2) and not answer.hung:
        found.append(f"ended with {answer.code}")
    if "Traceback (most recent call last)" in answer.err + answer.out:
        found.append("showed a stack trace")
    if "this looks like a fault of dit-moe" in answer.err:  # how the guard ends what nobody has refused
        found.append("was not refused, but an error of the program")
    changed = [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)]
    if changed and answer.code == 2:
        found.append(f"changed {', '.join(changed[:3])}")
    if answer.code in (1, 2) and not found:
        found += _unclear(answer.err)
    return found


def _unclear(err: str) -> list[str]:
    told = [line for line in err.splitlines() if re.match(r"(error|failed|stopped|dit-moe[\w -]*: error): ", line)]
    if not told:
        return ["did not say what is wrong"]
    message = err[err.index(told[-1]) :].strip()
    if "\n" in message:
        return ["went on after its message, or broke its line"]
    if len(message) > LONGEST or len(re.findall(r"[.!?](?=\s+[A-Z]|$)", message.rstrip(".") + ".")) > SENTENCES:
        return [f"told too much: {len(message)} characters"]
    return []
