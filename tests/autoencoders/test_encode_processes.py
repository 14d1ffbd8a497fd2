"""Encoding by several processes, or by one that is killed again and again: the same bytes as by one undisturbed."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from dit_moe.autoencoders.autoencoder import Autoencoder, AutoencoderConfig
from dit_moe.data import DATASETS
from tests.autoencoders.encoded import DIGITS, Spoilt, bits, encode, encoder
from tests.scripts import said

SCRIPT = Path(__file__).with_name("encode_script.py")


@dataclass
class Whole:
    """An encoding that nothing disturbed."""

    model: str  # the autoencoder's folder
    bits: dict[str, str]

    def stage(self) -> Autoencoder:
        return Autoencoder(AutoencoderConfig(model=self.model))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "latents"
    encode(folder, shard_size=4, batch_size=3)
    return Whole(str(folder.parent / "autoencoder"), bits(folder))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "latents").mkdir()
    return tmp_path / "latents"


def test_killed_five_times_and_resumed_it_is_the_same_to_the_byte(folder, whole):
    shards = said(SCRIPT, "killed", folder, whole.model)  # at each death
    assert len(shards) == 5 and 0 < int(shards[-1]) < 13
    encoder(folder, stage=whole.stage(), shard_size=4, batch_size=3).run()
    assert bits(folder) == whole.bits


@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_gives_the_same_latents(folder, whole, processes):
    said(SCRIPT, "whole", folder, whole.model, processes=processes)
    assert bits(folder) == whole.bits


def test_processes_with_workers_agree_on_what_is_broken(folder, tmp_path, whole):
    assert said(SCRIPT, "broken", folder, whole.model, processes=2) == ["3,7,25"] * 2
    spoilt = Spoilt(DATASETS.build(DIGITS, "train"), 50)
    (tmp_path / "alone").mkdir()
    encoder(tmp_path / "alone", stage=whole.stage(), dataset=spoilt).run(skip_broken=True)
    assert bits(folder) == bits(tmp_path / "alone")
