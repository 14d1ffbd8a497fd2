"""`dit-moe train --profile N`: the run is as without it, and says where its time goes."""

import gzip
import json

import pytest

from dit_moe.config import ConfigError
from dit_moe.training.profile import FILE, PARTS, TRACE, WARM_UP, StepProfile
from tests.training.tiny_run import bits, log

pytestmark = pytest.mark.parametrize("family", ["DiT"], indirect=True)


def test_a_profiled_run_learns_the_same_to_the_bit_and_says_where_its_time_goes(build, unbroken, tmp_path, capsys):
    trainer = build(tmp_path, steps=10)
    trainer.profile = StepProfile(3, flops=1e6, peak=1e9, count=32)
    trainer.train()
    assert bits(tmp_path, 10) == bits(unbroken, 10) and log(tmp_path) == log(unbroken)[:2]
    found = json.loads((tmp_path / FILE).read_text())
    assert found["parts"].keys() == PARTS.keys() and sum(found["parts"].values()) == pytest.approx(found["seconds"])
    assert all(found["parts"][part] > 0 for part in PARTS)
    assert found["mfu"] == pytest.approx(1e6 / found["seconds"] / 1e9)
    assert found["images_per_s"] == pytest.approx(32 / found["seconds"])
    with gzip.open(tmp_path / TRACE) as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert {"forward", "backward", "optimizer"} <= set(names)
    assert names.count("forward") == names.count("backward") == 1  # of one step
    said = capsys.readouterr().err
    assert "profile of 3 steps" in said and "the network and the loss, without the routers" in said


def test_a_profile_that_the_steps_left_do_not_suffice_for_is_refused(build, tmp_path):
    trainer = build(tmp_path, steps=10)
    trainer.profile = StepProfile(10 - WARM_UP, flops=1e6)
    with pytest.raises(ConfigError, match=r"--profile=7 takes 11 steps .*, and 10 are left to train"):
        trainer.train()
    with pytest.raises(ConfigError, match="--profile=0 must be at least 1"):
        StepProfile(0, flops=1e6)
