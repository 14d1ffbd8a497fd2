"""Every command that a guide or a command's help shows runs as it stands there, in its smallest form.

They run in a folder of their own, with the words that the guide has and, behind them, some that make the work small
(see small_forms.py). What needs something that is not everywhere (`shown.NEEDS`) is read, with its config, and not run.
"""

import re
import shutil
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import pytest
from matplotlib.figure import Figure
from transformers import TrainingArguments

from dit_moe.analysis import report as routing_report
from dit_moe.autoencoders.own_copy import OWN_STATISTICS
from dit_moe.cli import parse
from dit_moe.data import digits
from dit_moe.evaluation import own_extractor
from dit_moe.extractors import trained_cnn
from dit_moe.metrics import METRICS
from dit_moe.moe import ROUTERS
from dit_moe.sampling.recipes import sampling_recipe
from dit_moe.studies.plan import DIVERGED_FILE
from dit_moe.studies.study import experiments_of, find_study, load_study
from dit_moe.tasks.train import load
from tests.cli import small_forms
from tests.interop.models import tokens
from tests.shown import (
    BLOCK,
    CONFIGS,
    GUIDES,
    HELPS,
    NEEDS,
    PROGRAM,
    ROOT,
    SCRIPTS,
    blocks,
    entry,
    in_blocks,
    in_help,
    in_passing,
)

SHOWN = {path.name: shown for path in GUIDES if (shown := in_blocks(path))}
SHOWN |= {path.name: shown for path in HELPS if (shown := in_help(path))}

NAMED = {str(path.relative_to(ROOT)): in_passing(path) for path in (*GUIDES, *HELPS, *CONFIGS, *SCRIPTS)}
NAMED = {name: named for name, named in NAMED.items() if named}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The commands that have run by now, in a folder that has what they begin from."""
    router, metric = blocks(ROOT / "docs" / "extending.md", "python")
    whole = digits.load_digits()
    few = SimpleNamespace(images=whole.images[:200], target=whole.target[:200])
    with pytest.MonkeyPatch.context() as patch, entry(router, ROUTERS, "minp"), entry(metric, METRICS, "mean_gap"):
        patch.setattr(digits, "load_digits", lambda: few)
        patch.setattr(routing_report, "write_page", lambda stats, folder: [])  # pictures have tests of their own
        patch.setattr(Figure, "savefig", lambda *args, **kwargs: None)
        patch.setattr(own_extractor, "missing_weights", lambda: "not asked for")
        patch.setattr(trained_cnn, "FEWEST_STEPS", 2)
        patch.setattr(sys, "path", list(sys.path))  # to which --plugin adds the folder
        patch.chdir(tmp_path_factory.mktemp("reader"))
        small_forms.furnish(Path.cwd())
        yield set(small_forms.BEFORE)


def test_the_guide_names_every_file_of_a_run_folder(done):
    guide = (ROOT / "docs" / "run-folder.md").read_text()
    names = [
        name for row in guide.splitlines() for name in re.findall(r"`([^`]+)`", row.split("|")[1] if "|" in row else "")
    ]
    known = [f"{name}*" if name.endswith("/") else name for name in names]
    known += [f"checkpoints/step_*/{name}" for name in ("ema.safetensors", "config.yaml")]
    for words in (
        ["quickstart", "photos"],
        ["routing", "runs/digits"],
        ["dial", "runs/digits"],
        ["sample", "runs/lm_tiny"],
    ):
        if tuple(words) not in done:
            done.add(tuple(words))
            assert small_forms.run(words) == 0
    runs = [Path("runs", name) for name in ("photos", "digits", "lm_tiny")]
    files = [path.relative_to(run).as_posix() for run in runs for path in run.rglob("*") if path.is_file()]
    assert {file for file in files if not any(fnmatch(file, name) for name in known)} == set()
    assert len({file.split("/")[0] for file in files}) > 10
    assert {OWN_STATISTICS, DIVERGED_FILE, "log.jsonl.damaged"} <= set(names)  # of runs that went wrong, or on latents


@pytest.mark.parametrize("name", SHOWN)
def test_commands_run_as_they_are_shown(name, done, capsys):
    failed = []
    for shown in SHOWN[name]:
        words = shown.ours()
        if words is None:
            require_known(shown)
        elif shown.needs:
            require_sense(words)
        elif tuple(words) not in done:
            done.add(tuple(words))
            if small_forms.run(words) != 0:
                failed.append(f"{shown}\n{capsys.readouterr().err.strip().splitlines()[-1]}")
    assert failed == []


def require_known(shown):
    """Of another program's command: it is one that a reader of the repository has, or it says what it needs."""
    match shown.words:
        case ("make", target, *settings):
            assert re.search(rf"^\.PHONY:.*\b{target}\b", (ROOT / "Makefile").read_text(), re.MULTILINE), shown
            files = [value for name, _, value in (each.partition("=") for each in settings) if "." not in name]
            assert all((ROOT / file).exists() for file in files if "…" not in file), shown
        case ("pip", "install", *_, what):
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            packages = {re.match(r"[\w-]+", need)[0] for each in extras.values() for need in each}
            checkout = re.fullmatch(r"\.(?:\[(.*)\])?", what)  # no registry has dit_moe
            assert set(checkout[1].split(",") if checkout and checkout[1] else ()) <= set(extras), shown
            assert checkout or what in packages, shown
        case ("python", "-m", module, *_) if module.startswith("benchmarks."):
            assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file(), shown  # test_benchmarks.py runs them
        case ("python", "-m", module, *_):
            assert module == "tests.bad_inputs", shown  # which the tests run by itself
        case ("source", path):
            assert path.startswith(".venv/"), shown  # which make has made
        case _:
            assert shown.needs, shown


def require_sense(words):
    """Of a command that cannot run here: its words mean something, and the config or study that it names is sound."""
    args = parse(words)
    if args.command in ("encode", "quickstart", "train"):
        if not str(args.config).startswith("runs/"):  # of a run that these commands make
            load(args.config, args.overrides)
    elif args.command == "compare":
        path = find_study(args.study)
        experiments_of(load_study(path, args.overrides), path.parent)
    elif args.command == "eval" and args.sampling is not None:
        sampling_recipe(args.sampling, "ddpm")
    else:
        assert args.command in ("eval", "import", "lm-eval", "completion", "upcycle"), words


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.name)
def test_commands_of_guides_stand_in_blocks_that_say_so(path):
    text = path.read_text()
    languages = re.findall(r"^```(\w*)$", text, re.MULTILINE)
    assert set(languages[::2]) <= {"bash", "python", "yaml"} and set(languages[1::2]) <= {""}
    assert not re.findall(rf"^ {{4}}{PROGRAM}", BLOCK.sub("", text), re.MULTILINE)


def test_what_commands_can_need_is_what_some_need():
    assert set().union(*(shown.needs for each in SHOWN.values() for shown in each)) == NEEDS


@pytest.mark.parametrize("name", NAMED)
def test_commands_that_a_sentence_names_would_be_understood(name, capsys):
    for shown in NAMED[name]:
        words = shown.ours()
        if words is None:
            require_known(shown)
        elif "--help" not in words:
            assert any(understood([*words, *["WORD"] * missing]) for missing in range(3)), shown


def understood(words):
    try:
        return bool(parse(words))
    except SystemExit:
        return False


@pytest.mark.parametrize("path", [path for path in GUIDES if blocks(path, "yaml")], ids=lambda path: path.name)
def test_configs_run_as_they_are_shown(path, tmp_path):
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "configs" / "other.yaml").write_text("{}")
    file = tmp_path / "configs" / "shown.yaml"
    for text in blocks(path, "yaml"):
        if text.startswith("title: "):  # of a study, which studies.md has a command for
            study = text
            continue
        if text.startswith("search:"):
            file.write_text(study.replace("seeds: [0, ", "seeds: [") + text)
            assert load_study(file).search is not None
            continue
        of = "lm_tiny" if "tokenize:" in text else "imagenet256/base" if "name: DiT" in text else "digits"
        file.write_text(text if text.startswith("base: ") else f"base: {of}.yaml\n{text}")
        load(file, [])


def test_programs_in_python_run_as_they_are_shown(done, capsys):
    generate, train, convert = blocks(ROOT / "docs" / "transformers.md", "python")
    names = {
        "args": TrainingArguments("trained", max_steps=1, use_cpu=True, report_to=[], save_strategy="no"),
        "rows": [{"input_ids": row, "labels": row} for row in tokens(batch=8)],
    }
    for code in (generate, train, convert):
        exec(compile(code, "transformers.md", "exec"), names)
    assert "A class is" in capsys.readouterr().out
