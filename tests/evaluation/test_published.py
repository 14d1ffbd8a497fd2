"""The published rows are whole, and agree with what this package computes itself."""

from collections import Counter

import pytest
import torch

from dit_moe.evaluation.published import BASELINES
from dit_moe.models import MODELS

TYPED_AGAIN = [  # from the papers' tables, independently of the rows: model, FID, IS
    ("DiT-XL/2", 2.27, 278.2),
    ("DiT-XL/2", 18.1, None),
    ("DiT-XL/2", 19.5, None),
    ("DiT-B/4", 68.4, None),
    ("DiT-S/2", 68.4, None),
    ("DiT-B/2", 43.5, None),
    ("DiT-L/2", 23.3, None),
    ("SiT-XL/2", 2.06, 270.3),
    ("DiffMoE-L-E8", 9.60, None),
    ("DiffMoE-L-E8", 9.17, None),
    ("ProMoE-B", 24.44, 60.4),
    ("ProMoE-L", 11.61, 100.8),
    ("ProMoE-XL", 9.44, 114.9),
    ("ProMoE-B", 6.39, 154),
    ("ProMoE-L", 2.79, 244),
    ("ProMoE-XL", 2.59, 266),
    ("DSMoE-S-E16", 39.84, None),
    ("DSMoE-B-E16", 20.33, None),
    ("DSMoE-L-E16", 9.80, None),
    ("DSMoE-3B-E16", 7.52, None),
    ("DiffMoE-S-E16", 41.02, None),
    ("DiffMoE-B-E16", 20.83, None),
    ("DiffMoE-L-E16", 11.16, None),
    ("DiffMoE-L-E16", 14.41, None),
    ("DiT-L", 17.01, None),
    ("DiT-L, token choice", 19.06, None),
    ("DiT-L, expert choice", 16.12, None),
    ("LightningDiT-XL/1", 1.35, None),
    ("REPA SiT-XL/2", 1.42, None),
    ("EDM2-XXL", 1.25, None),
]
DITS = [row for row in BASELINES if row.parameters is not None]


@pytest.mark.parametrize("row", DITS, ids=lambda row: f"{row.model} {row.fid}")
def test_parameters_are_those_of_our_own_model_of_the_same_size(row):
    name = "DiT-" + row.model.partition("-")[2]
    with torch.device("meta"):
        sizes = {"in_channels": 4, "input_size": 32, "num_classes": 1000, "learn_sigma": True}
        model = MODELS.build(MODELS.config_class("DiT")(name=name, **sizes))
    ours = sum(p.numel() for p in model.parameters())
    assert ours == pytest.approx(row.parameters, abs=5001)  # in millions with two decimals: B/2 and B/4 are 0.04 apart


def test_every_number_is_that_of_its_source():
    assert Counter((row.model, row.fid, row.inception_score) for row in BASELINES) == Counter(TYPED_AGAIN)


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
