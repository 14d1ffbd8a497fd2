from pathlib import Path

import pytest

from tests.autoencoders.encoded import encode
from tests.scripts import said


@pytest.fixture(scope="session")
def processes(finished_run, tmp_path_factory) -> Path:
    """A folder with what the processes of processes_script.py said and left there."""
    folder = tmp_path_factory.mktemp("processes")
    encode(folder / "latents" / "latents")
    said(Path(__file__).with_name("processes_script.py"), folder, finished_run)
    return folder
