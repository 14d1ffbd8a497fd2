"""What every registered extractor promises."""

import re

import pytest

from dit_moe.metrics import EXTRACTORS


@pytest.mark.parametrize("name", EXTRACTORS.names())
def test_an_extractor_carries_its_registered_name_and_the_hash_of_its_weights(name):
    extractor = EXTRACTORS.build(EXTRACTORS.config_class(name)())
    assert extractor.name == name and extractor.dim > 0
    assert re.fullmatch("[0-9a-f]{64}", extractor.sha256)
