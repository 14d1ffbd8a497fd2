"""What `make` installs: a locked version of every package, once, and again only when the lock changes."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import distributions
from itertools import chain
from pathlib import Path
from string import Template
from subprocess import CompletedProcess

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from dit_moe.extras import DISTRIBUTIONS, how_to_install
from tests.shown import Shown

ROOT = Path(__file__).parent.parent
LOCKS = sorted((ROOT / "requirements").glob("python*.txt"))


def load_install():
    spec = importlib.util.spec_from_file_location("install", ROOT / "requirements" / "install.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def install(monkeypatch, tmp_path):
    """requirements/install.py on a project of its own, whose commands are collected and not run."""
    module = load_install()
    (tmp_path / "requirements").mkdir()
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    lock = tmp_path / "requirements" / "python{}.{}.txt".format(*sys.version_info)
    lock.write_text("numpy==2.0.0\n")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "make_venv", lambda venv, system: venv.mkdir(exist_ok=True))
    monkeypatch.setattr(module, "versions", lambda python: "torch 2.14.1")
    ran = []
    monkeypatch.setattr(module, "run", ran.append)

    def call(*words):
        ran.clear()
        monkeypatch.setattr(sys, "argv", ["install.py", *words])
        module.main()
        return [" ".join(command) for command in ran]

    call.lock, call.module, call.venv = lock, module, tmp_path / ".venv"
    return call


def test_packages_are_installed_once_and_again_when_the_lock_changes(install, capsys):
    (first,) = install("base")
    assert str(install.lock) in first and first.endswith(str(install.lock.parent.parent))
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == f"installed torch 2.14.1, by requirements/{install.lock.name}"
    assert install("base") == [] and capsys.readouterr().out == ""
    install.lock.write_text("numpy==2.0.1\n")
    assert len(install("base")) == 1 and install("base") == []
    with (install.lock.parent.parent / "pyproject.toml").open("a") as file:
        file.write("[tool.other]\nsetting = 1\n")
    assert install("base") == []


def test_a_disk_without_room_is_noted_before_gigabytes_are_fetched(install, monkeypatch, capsys):
    for free, noted in ((5.2e9, True), (50e9, False)):
        usage = shutil._ntuple_diskusage(60e9, 0, free)
        asked = []
        monkeypatch.setattr(
            install.module.shutil, "disk_usage", lambda path, usage=usage, asked=asked: asked.append(path) or usage
        )
        there = install.venv if install.venv.is_dir() else install.venv.parent
        assert install("dev") and asked == [there]  # the disk that the environment is to be on
        assert ("note: 5.2 GB are free, and torch with CUDA takes 7 GB" in capsys.readouterr().out) == noted
        (install.venv / "installed.json").unlink()


def test_a_command_that_needs_more_installs_more_and_one_that_needs_less_takes_nothing_away(install):
    assert install("base")[0].endswith(str(install.lock.parent.parent))
    assert install("dev")[0].endswith("[dev]")
    assert install("lm") == install("base") == []
    install.lock.write_text("numpy==2.0.1\n")
    assert install("base")[0].endswith("[dev]")


def test_an_environment_of_another_python_is_left_alone(install):
    install.venv.mkdir()
    (install.venv / "pyvenv.cfg").write_text("home = /usr/bin\nversion = 3.4.1\n")
    with pytest.raises(SystemExit, match=r"made by Python 3\.4 and this is .*; name a folder for this one: make VENV="):
        install("base")
    assert [path.name for path in install.venv.iterdir()] == ["pyvenv.cfg"]


@pytest.mark.parametrize("start", ["#!{}/python3\n", '#!/bin/sh\n\'\'\'exec\' "{}/python3" "$0" "$@"\n'])
def test_an_environment_that_was_copied_from_elsewhere_is_not_taken_for_the_own(install, tmp_path, start):
    (tmp_path / "a link").symlink_to(tmp_path)
    (install.venv / "bin").mkdir(parents=True)
    script = install.venv / "bin" / "pip"
    script.write_text(start.format(tmp_path / "a link" / ".venv" / "bin"))
    assert install("base")
    for elsewhere in (tmp_path / "gone" / ".venv" / "bin", tmp_path):
        script.write_text(start.format(elsewhere))
        with pytest.raises(
            SystemExit, match=r"\.venv was moved or copied, and its commands run what lies elsewhere; del"
        ):
            install("base")


def test_another_letter_set_neither_stops_the_installation_nor_repeats_it(tmp_path):
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    code = (
        "import runpy, shutil, subprocess, sys; shutil.disk_usage = lambda path: shutil._ntuple_diskusage(9, 9, 1)\n"
        "subprocess.run = lambda command: subprocess.CompletedProcess(command, 0)\n"
        "subprocess.check_output = lambda *_, **__: ''\n"
        "sys.argv = ['install.py', 'base']\n"
        f"runpy.run_path({str(tmp_path / 'requirements' / 'install.py')!r}, run_name='__main__')"
    )
    (tmp_path / ".venv").mkdir()
    found = []
    for settings in ({"PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}, {"PYTHONUTF8": "1"}):
        environment = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", **settings}
        ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        found.append((tmp_path / ".venv" / "installed.json").read_text())
    assert found[0] == found[1]


@pytest.mark.parametrize("asked, made_with, sees", [(True, None, True), (False, "true", True), (False, "false", False)])
def test_an_environment_that_sees_the_packages_of_its_python_keeps_them(tmp_path, monkeypatch, asked, made_with, sees):
    module, ran = load_install(), []
    monkeypatch.setattr(module.subprocess, "run", lambda command: ran.append(command) or CompletedProcess(command, 0))
    if made_with is not None:
        (tmp_path / "pyvenv.cfg").write_text(f"home = /usr/bin\ninclude-system-site-packages = {made_with}\n")
    module.make_venv(tmp_path, asked)
    assert ("--system-site-packages" in ran[0]) is sees


def test_too_old_a_python_is_told_so(install, monkeypatch):
    monkeypatch.setattr(install.module, "OLDEST", (99, 0))
    with pytest.raises(SystemExit, match=r"Python 99\.0 or newer is needed, this is"):
        install("base")


def test_the_newest_of_everything_knows_neither_lock_nor_upper_bound(install):
    upgrade, own = install("dev", "--newest", "--venv", str(install.venv))
    assert "--constraint" not in upgrade + own and "<" not in upgrade and "transformers>=" in upgrade
    assert "--no-deps" in own and not (install.venv / "installed.json").exists()


# ------------------------------------------------------------------------------------------------------------ the wheel


def test_a_wheel_holds_every_file_that_the_package_reads_and_building_it_leaves_nothing_behind(tmp_path):
    wheel = pytest.importorskip("hatchling.builders.wheel", reason="hatchling is not installed")
    before = sorted(path.name for path in ROOT.iterdir())
    (built,) = wheel.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    assert sorted(path.name for path in ROOT.iterdir()) == before
    inside = {"dit_moe": ROOT / "dit_moe", "dit_moe/configs": ROOT / "configs"}
    wanted = {
        f"{name}/{path.relative_to(folder)}"
        for name, folder in inside.items()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    packed = {name for name in zipfile.ZipFile(built).namelist() if ".dist-info/" not in name}
    assert packed == wanted and "dit_moe/configs/studies/digits.yaml" in packed and "dit_moe/py.typed" in packed


def test_a_package_that_is_missing_is_installed_in_the_versions_that_the_project_works_with(monkeypatch):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    needs = [f"{need}; extra == '{extra}'" for extra, each in extras.items() for need in each]
    monkeypatch.setattr("importlib.metadata.requires", lambda name: needs)
    assert how_to_install("lm-eval") == "pip install 'lm-eval>=0.4.13,<0.5'"
    named = [*DISTRIBUTIONS.values(), "zstandard", "tensorboard", "wandb", "trackio"]
    assert all(re.match(r"pip install '[\w-]+[<>]", how_to_install(each)) for each in named)


# ------------------------------------------------------------------------------------------- containers and clusters


def test_the_image_is_built_of_files_that_are_there_with_the_lock_of_its_python_and_runs_as_a_user():
    text = re.sub(r"\\\n", "", (ROOT / "Dockerfile").read_text())
    steps = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    assert {name for name, _ in steps} <= {
        "FROM",
        "ARG",
        "SHELL",
        "ENV",
        "RUN",
        "WORKDIR",
        "COPY",
        "USER",
        "ENTRYPOINT",
        "CMD",
    }
    sources = [each for name, rest in steps if name == "COPY" for each in rest.split()[:-1]]
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert all((ROOT / each).exists() and each.split("/")[0] in allowed for each in sources)
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["readme"] in sources
    python = re.search(r"FROM python:(\d+\.\d+)", text)[1]
    assert set(re.findall(r"python[\d.]+\.txt", text)) == {f"python{python}.txt"}
    assert [rest for name, rest in steps if name == "USER"] == ["1000"] and steps[-2][1] == '["dit-moe"]'


def test_the_batch_script_is_valid_and_starts_a_command_that_is_understood():
    script = ROOT / "docs" / "train.sbatch"
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    command = re.search(r"^srun (torchrun .*) &$", re.sub(r"\\\n", "", script.read_text()), re.MULTILINE)[1]
    words = shlex.split(Template(command).safe_substitute(SLURM_NNODES=2, host="host", SLURM_JOB_ID=1))
    assert Shown(script.name, tuple(words)).ours() == ["train", "$@"]


@pytest.mark.parametrize(
    ("signalled", "code", "queued"), [(False, 1, False), (True, 1, True), (True, 0, False), (False, 0, False)]
)
def test_the_batch_script_queues_itself_again_when_its_time_is_up_and_after_no_other_failure(
    signalled, code, queued, tmp_path
):
    """With stand-ins for what Slurm brings: `srun` is the training, which a signal makes end with `code`."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    signal = "kill -TERM $PPID; until [ -e told ]; do sleep 0.05; done; " if signalled else ""
    stands_in = {
        ".venv/bin/activate": "",
        "scontrol": '[ "$1" != requeue ] || touch queued',
        "scancel": "touch told",
        "srun": f"{signal}exit {code}",
    }
    for name, body in stands_in.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    given = {"SLURM_JOB_ID": "1", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "a,b"}
    path = f"{tmp_path}:{os.environ['PATH']}"
    script = ["bash", ROOT / "docs" / "train.sbatch", "digits"]
    done = subprocess.run(script, cwd=tmp_path, env={"PATH": path, **given}, timeout=30, check=False)
    assert done.returncode == code and (tmp_path / "queued").exists() == queued


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_hands_words_on_as_they_are_and_shows_a_command_without_gaps(tmp_path):
    def commands(*words):
        command = ["make", "-n", "quickstart", *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()

    shown = commands("VENV=v", "data.path=my  images", "train.steps=3")[-1]
    assert shown == "v/bin/dit-moe quickstart configs/digits.yaml 'data.path=my  images' 'train.steps=3'"
    venv = tmp_path / "one's  own"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").touch()
    install, quickstart = map(shlex.split, commands(f"VENV={venv}", "CONFIG=my  images"))
    assert install == [f"{venv}/bin/python", "requirements/install.py", "--venv", str(venv), "base"]
    assert quickstart == [f"{venv}/bin/dit-moe", "quickstart", "my  images"]


# ------------------------------------------------------------------------------------------------------------ the locks


def requirements(lock):
    return [Requirement(line) for line in lock.read_text().splitlines() if not line.startswith("#")]


def direct():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    each = [*project["dependencies"], *chain.from_iterable(project["optional-dependencies"].values())]
    return [Requirement(text) for text in each if not text.startswith(project["name"])]


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.stem)
def test_a_lock_has_a_version_within_its_bounds_for_every_package_the_project_names(lock):
    locked = {each.name: each.specifier for each in requirements(lock)}
    assert {name for name, version in locked.items() if not str(version).startswith("==")} == {"torch", "torchvision"}
    for need in direct():
        name = canonicalize_name(need.name)
        if name not in ("torch", "torchvision"):
            version = str(locked[name]).removeprefix("==")
            assert need.specifier.contains(version), f"{need}, but the lock has {version}; run make lock"


def test_there_is_a_lock_for_every_python_that_the_readme_names():
    run = re.search(r"tests were run on Python ([^(;]*)", (ROOT / "README.md").read_text())[1]
    assert {f"python{version}.txt" for version in re.findall(r"\d+\.\d+", run)} == {lock.name for lock in LOCKS}


def test_interfaces_that_the_project_implements_have_an_upper_bound():
    bounded = {canonicalize_name(need.name) for need in direct() if "<" in str(need.specifier)}
    assert bounded == {"accelerate", "datasets", "diffusers", "lm-eval", "transformers"}


def test_tests_run_on_the_locked_versions():
    """Unless this environment was made by other means than `make`, or for the newest of everything."""
    record = Path(sys.prefix, "installed.json")
    if not record.exists():
        pytest.skip("this environment was not made from a lock")
    assert json.loads(record.read_text())["level"] in ("dev", "docs")
    lock = ROOT / "requirements" / "python{}.{}.txt".format(*sys.version_info)
    # What an import takes: setuptools, once another test has imported it, adds its own older copies behind.
    here = {canonicalize_name(each.name): each.version for each in reversed(list(distributions()))}
    found = [each for each in requirements(lock) if each.name in here]
    strays = [f"{each.name} {here[each.name]}" for each in found if not each.specifier.contains(here[each.name])]
    assert len(found) > 50 and strays == []
