"""What tests of several parts share: finished runs, and every family of models in turn.

`parametrize("family", [...], indirect=True)` takes some families. What takes long to import is imported when asked for.
"""

import gc
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from hypothesis import settings

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: runs are compared bit for bit with those of scripts
# glibc's own value: commands in this process leave its allocator as it is, or no test could measure what it takes.
os.environ["MALLOC_ARENA_TEST"] = "8"

# These files take longest. They begin first, so that no worker is left with one when the others have ended.
LONGEST = (
    "distributed/test_processes.py",
    "distributed/test_two_processes.py",
    "distributed/test_routers.py",
    "cli/test_shown_commands.py",
    "cli/test_compare.py",
    "cli/test_streams.py",
    "cli/test_races.py",
    "cli/test_latents.py",
    "cli/test_commands.py",
    "test_bad_inputs.py",
    "analysis/test_figures.py",
    "experiments/test_own_images.py",
    "training/test_resume.py",
    "costs/test_estimate.py",
    "extractors/test_inception.py",
)

settings.register_profile("dit_moe", deadline=None)  # a busy machine is no fault of what is tested
settings.load_profile("dit_moe")
gc.disable()  # until all tests are collected: what is imported is no garbage


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    assert all(path.exists() for path in places)
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def away_from_the_checkout(tmp_path_factory) -> Iterator[None]:
    """Tests begin in an empty folder, as the checkout may hold runs, and leave it empty."""
    checkout, folder = Path.cwd(), tmp_path_factory.mktemp("empty")
    os.chdir(folder)
    yield
    os.chdir(checkout)
    left = sorted(path.name for path in folder.iterdir())
    assert not left, f"a test wrote {left} where it was started; give it a folder of its own"


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Path:
    """A small run on the digits, by `dit-moe train`."""
    from tests.cli.conftest import CONFIG, SMALL, cli

    folder = tmp_path_factory.mktemp("runs") / "small"
    assert cli("train", CONFIG, "--run", folder, *SMALL) == 0
    return folder


@pytest.fixture(scope="session")
def finished_text(tmp_path_factory) -> Path:
    """A folder with a small run on text, by `dit-moe quickstart`, and the text and tokens that it is of."""
    from tests.cli.conftest import cli
    from tests.cli.language import LM_CONFIG, small

    folder = tmp_path_factory.mktemp("language")
    assert cli("quickstart", LM_CONFIG, "--run", folder / "run", *small(folder)) == 0
    return folder


@pytest.fixture(scope="module", params=["DiT", "LM"])
def family(request) -> str:
    """The name of its registry entry."""
    return request.param


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """The folder of what all families train on."""
    return tmp_path_factory.mktemp("data") / "tokens"


@pytest.fixture(scope="module")
def build(family, tiny_data):
    """`tiny_run.build` of the family."""
    from tests.training import tiny_run

    return partial(tiny_run.build, family=family, data=tiny_data)


@pytest.fixture(scope="session")
def runs_by_family() -> dict:
    return {}


@pytest.fixture(scope="module")
def unbroken(family, build, runs_by_family, tmp_path_factory) -> Path:
    """A tiny run of 20 steps without a break; it is read, and never changed."""
    if family not in runs_by_family:
        runs_by_family[family] = tmp_path_factory.mktemp("unbroken")
        build(runs_by_family[family]).train()
    return runs_by_family[family]
