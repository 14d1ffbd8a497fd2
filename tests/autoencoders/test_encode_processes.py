"""Encoding by several processes, or by one that is killed again and again: the same bytes as by one undisturbed."""

from pathlib import Path

import pytest

from dit_moe.autoencoders.autoencoder import Autoencoder, AutoencoderConfig
from dit_moe.data import DATASETS
from tests.autoencoders.encoded import DIGITS, WithBroken, encode, encoder
from tests.folders import contents
from tests.scripts import said

SCRIPT = Path(__file__).with_name("encode_script.py")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process that nothing disturbs makes, and the autoencoder beside it."""
    folder = tmp_path_factory.mktemp("alone")
    encode(folder / "latents", shard_size=4, batch_size=3)
    return folder


def test_killed_five_times_and_resumed_it_is_the_same_to_the_byte(alone, tmp_path):
    shards = said(SCRIPT, "killed", tmp_path, alone / "autoencoder")  # at each death
    assert len(shards) == 5 and 0 < int(shards[-1]) < 13
    stage = Autoencoder(AutoencoderConfig(model=str(alone / "autoencoder")))
    encoder(tmp_path, stage=stage, shard_size=4, batch_size=3).run()
    assert contents(tmp_path) == contents(alone / "latents")


@pytest.fixture(scope="module")
def together(alone, tmp_path_factory):
    """What three processes make, and the words that they print."""
    folder = tmp_path_factory.mktemp("together")
    return folder, said(SCRIPT, "together", folder, alone / "autoencoder", processes=3)


def test_several_processes_make_the_same_latents_as_one(together, alone):
    assert contents(together[0] / "whole") == contents(alone / "latents")


def test_processes_with_workers_agree_on_what_is_broken(together, alone, tmp_path):
    folder, printed = together
    assert printed == ["3,7,25"] * 3
    stage = Autoencoder(AutoencoderConfig(model=str(alone / "autoencoder")))
    encoder(tmp_path, stage=stage, dataset=WithBroken(DATASETS.build(DIGITS, "train"), 50)).run(skip_broken=True)
    assert contents(folder / "broken") == contents(tmp_path)
