import os
import shutil
from pathlib import Path

import pytest

from dit_moe.locks import exclusive
from tests.autoencoders.encoded import encode
from tests.scripts import said


@pytest.fixture(scope="session")
def processes(finished_run, tmp_path_factory) -> Path:
    """A folder with what the processes of processes_script.py said and left there, and in "small" the run they read.

    Of the workers of pytest-xdist, whose folders lie in one, the first to ask makes it for all.
    """
    place = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = place.parent
    folder, done = place / "processes", place / "processes.done"
    with exclusive(place, folder.name, wait=True):
        if not done.exists():
            encode(folder / "latents" / "latents")
            run = shutil.copytree(finished_run, folder / "small")
            said(Path(__file__).with_name("processes_script.py"), folder, run)
            done.touch()
    return folder
