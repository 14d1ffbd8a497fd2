"""Fixtures that run a test with every family of models; ``parametrize("family", [...], indirect=True)`` takes some."""

from functools import partial

import pytest
import tiny_run


@pytest.fixture(scope="module", params=tiny_run.FAMILIES)
def family(request):
    """The name of its registry entry."""
    return request.param


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """The folder of what all of them train on."""
    return tmp_path_factory.mktemp("data") / "tokens"


@pytest.fixture(scope="module")
def build(family, data):
    """`tiny_run.build` of it."""
    return partial(tiny_run.build, family=family, data=data)
