"""Install what a command needs into a virtual environment, once: `make` calls it before everything it runs.

    python3 requirements/install.py base|lm|dev|docs [--venv .venv] [--newest] [--system-site-packages]

Runs on any Python 3 with nothing installed. VENV/installed.json says what was installed, and by which lock: nothing
happens until pyproject.toml or the lock changes, or a command needs more. Packages are added to a VENV, never removed.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

OLDEST = (3, 11)
SPACE = 7e9  # bytes that all packages take
ROOT = Path(__file__).resolve().parent.parent
EXTRAS = {"base": "", "lm": "[lm]", "dev": "[dev]", "docs": "[dev,docs]"}  # each has all of those before it
SHOWN = ("torch", "torchvision", "diffusers", "accelerate", "transformers", "lm_eval")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("level", choices=list(EXTRAS))
    parser.add_argument("--venv", default=".venv", help="folder of the environment (default .venv)")
    parser.add_argument("--newest", action="store_true", help="the newest of all, whatever lock and bounds say")
    parser.add_argument("--system-site-packages", action="store_true", help="use packages that this Python has already")
    options = parser.parse_args()
    sys.stdout.reconfigure(errors="replace")  # a terminal may know fewer letters
    require_python()
    venv = (ROOT / options.venv).resolve()
    python = venv / "bin" / "python"
    record = venv / "installed.json"
    require_same_python(venv)
    require_same_place(venv)
    lock = ROOT / "requirements" / "python{}.{}.txt".format(*sys.version_info)
    wanted = {"level": options.level, "by": fingerprint(lock)}
    have = read(record)
    if have and not options.newest:
        wanted["level"] = max(wanted["level"], have["level"], key=list(EXTRAS).index)
        if have == wanted:
            return
    say(f"installing into {options.venv} for Python {version()}: minutes and gigabytes the first time, mostly torch")
    if not have and not options.system_site_packages:
        note_space(venv)
    make_venv(venv, options.system_site_packages)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--use-pep517"]
    extras = EXTRAS[wanted["level"]]
    if options.newest:
        run([*pip, "--upgrade", "--upgrade-strategy", "eager", *unbounded(extras)])
        run([*pip, "--no-deps", "--editable", str(ROOT)])
    else:
        if not lock.exists():
            say(f"no lock for Python {version()} in requirements/: taking the newest that pyproject.toml allows")
        constraints = ["--constraint", str(lock)] if lock.exists() else []
        run([*pip, *constraints, "--editable", str(ROOT) + extras])
        record.write_text(json.dumps(wanted) + "\n")
    source = f"requirements/{lock.name}" if lock.exists() else "no lock"
    say(f"installed {versions(python)}, by {'the newest of all' if options.newest else source}")


def require_python():
    if sys.version_info < OLDEST:
        wanted = "{}.{}".format(*OLDEST)
        sys.exit(f"Python {wanted} or newer is needed, this is {version()}; name one: make PYTHON=python{wanted} …")


def note_space(venv):
    """Before gigabytes are fetched; no error, as an index of torch for CPUs alone needs a quarter of it."""
    free = shutil.disk_usage(next(each for each in (venv, *venv.parents) if each.is_dir())).free
    if free < SPACE:
        say(
            f"note: {free / 1e9:.1f} GB are free, and torch with CUDA takes {SPACE / 1e9:.0f} GB with the rest; make "
            "room, or name a folder on another disk: make VENV=/elsewhere/venv …"
        )


def require_same_python(venv):
    """An environment is made by one Python and stays with it; another gets a folder of its own."""
    config = venv / "pyvenv.cfg"
    if not config.exists():
        return
    made = dict(line.split(" = ", 1) for line in config.read_text(encoding="utf-8").splitlines() if " = " in line)
    made_by = made.get("version", made.get("version_info", "")).split(".")[:2]
    if made_by != version().split(".")[:2]:
        ours = "{}.{}".format(*sys.version_info)
        sys.exit(
            f"{venv} was made by Python {'.'.join(made_by)} and this is {ours}; "
            f"name a folder for this one: make VENV=.venv-{ours} PYTHON={sys.executable} …"
        )


def require_same_place(venv):
    """The commands of an environment name the folder that it was made in: those of a copy run the original's code."""
    script = venv / "bin" / "pip"
    if not script.is_file():
        return
    start = b"\n".join(script.read_bytes().splitlines()[:2])  # #!PYTHON, or of a long path: #!/bin/sh and exec PYTHON
    folders = re.findall(rb"""^(?:#!|'''exec' "?)(/[^"\n]+)/""", start, re.MULTILINE)
    if not any(os.path.isdir(each) and os.path.samefile(each, venv / "bin") for each in folders):
        sys.exit(f"{venv} was moved or copied, and its commands run what lies elsewhere; delete it, then start again")


def fingerprint(lock):
    """Changes with what is to be installed: the settings of tools in pyproject.toml are not."""
    project = read_project()
    parts = [json.dumps([project["build-system"], project["project"], project["tool"]["hatch"]], sort_keys=True)]
    parts += [lock.read_text(encoding="utf-8")] if lock.exists() else []
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def read_project():
    import tomllib  # not in a Python that is too old, which has been told so by now

    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def read(record):
    try:
        return json.loads(record.read_text())
    except (OSError, ValueError):
        return None


def make_venv(venv, system_site_packages):
    """Make it, or complete one that an interruption left half made; one that sees this Python's packages keeps them."""
    config = venv / "pyvenv.cfg"
    seen = config.exists() and "include-system-site-packages = true" in config.read_text(encoding="utf-8")
    options = ["--system-site-packages"] if system_site_packages or seen else []
    if subprocess.run([sys.executable, "-m", "venv", *options, str(venv)]).returncode:
        sys.exit("this Python cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv")


def unbounded(extras):
    """The project's requirements without their upper bounds."""
    project = read_project()["project"]
    wanted, own = [*project["dependencies"], *([project["name"] + extras] if extras else [])], project["name"] + "["
    while any(each.startswith(own) for each in wanted):  # an extra that includes another
        inner = next(each for each in wanted if each.startswith(own))
        wanted.remove(inner)
        for extra in inner[len(own) : -1].split(","):
            wanted += project["optional-dependencies"][extra]
    return [",".join(part for part in each.split(",") if not part.startswith("<")) for each in wanted]


def versions(python):
    """The packages that decide most, in one line."""
    code = (
        "from importlib.metadata import distributions as d; import sys; "
        "v = {x.name.lower().replace('-', '_'): x.version for x in d()}; "
        "print(', '.join(f'{n} {v[n]}' for n in sys.argv[1:] if n in v), 'and', len(v), 'packages in all')"
    )
    return subprocess.check_output([str(python), "-c", code, *SHOWN], text=True).strip()


def run(command):
    code = subprocess.run(command).returncode
    if code:
        sys.exit(code)


def version():
    return ".".join(map(str, sys.version_info[:3]))


def say(text):
    print(text, flush=True)


if __name__ == "__main__":
    main()
