"""The published rows are whole, and agree with what this package computes itself."""

from collections import Counter

import pytest
import torch

from dit_moe.evaluation.published import BASELINES
from dit_moe.models import MODELS

DITS = [row for row in BASELINES if row.parameters is not None]


@pytest.mark.parametrize("row", DITS, ids=lambda row: f"{row.model} {row.fid}")
def test_parameters_are_those_of_our_own_model_of_the_same_size(row):
    name = "DiT-" + row.model.partition("-")[2]
    with torch.device("meta"):
        sizes = {"in_channels": 4, "input_size": 32, "num_classes": 1000, "learn_sigma": True}
        model = MODELS.build(MODELS.config_class("DiT")(name=name, **sizes))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(row.parameters, rel=0.002)  # in millions


def test_no_row_stands_twice():
    rows = Counter(
        (row.model, row.steps, row.objective, row.sampler, row.guidance, row.source, row.fid) for row in BASELINES
    )
    assert max(rows.values()) == 1
    assert all(row.fid > 0 and row.source and row.image_size in (256, 512) for row in BASELINES)


def test_evaluations_follow_from_steps_and_guidance():
    for row in BASELINES:
        if row.evaluations is not None:
            assert row.interval is None and row.evaluations == (250 if row.guidance == 1 else 500), row
        else:
            assert row.guidance != 1, row


def test_values_that_a_source_gives_as_a_range_say_so():
    values = [(row.fid, row.note) for row in BASELINES if row.model == "DiT-XL/2" and row.steps == 400_000]
    assert [fid for fid, _ in values] == [18.1, 19.5] and all("published values" in note for _, note in values)
