"""The printed table: what it shows, and that it can be read on a narrow terminal."""

import io

import pytest
from rich.console import Console

from dit_moe.evaluation.report_table import print_table

REASONS = ["the features are others", "450 generated images instead of 50 000", "a third", "a fourth"]


def report(**provenance):
    def value(name, number, std=0.0123):
        return {name: number, f"{name}_std": std, f"{name}_heldout": 0.9022222, f"{name}_reconstruction": None}

    distance = {"generated": 153.372, "generated_std": 1.713, "floor": 1.94, "floor_estimate": 4.92, "ratio": 79.055}
    distance |= {"reconstruction": 4.5, "reconstruction_ratio": 2.3196, "n": 450, "n_reference": 898, "seeds": 3}
    numbers = {"fd_digits_cnn64": distance, **value("kid_digits_cnn64", -0.000123456)}
    numbers |= value("kid_subset_std_digits_cnn64", 12.04) | value("nearest_features_digits_cnn64", 123456.789)
    facts = {"samples": [{}] * 3, "reference": {"name": "digits/train"}, "extractor": {"name": "digits_cnn64"}}
    return numbers | {"provenance": facts | {"n_gen": 450} | provenance, "warnings": ["[b]one"], "train_seconds": 9.5}


def printed(width=80, **provenance):
    console = Console(file=io.StringIO(), width=width)
    print_table(report(**provenance), console)
    return console.file.getvalue()


def cells(text):
    lines = [line.split("│")[1:-1] for line in text.splitlines() if line.startswith("│")]
    return {line[0].strip(): [cell.strip() for cell in line[1:]] for line in lines}


def test_each_number_has_a_row_and_spreads_within_a_set_have_none():
    better = {"fd_digits_cnn64": "lower", "nearest_features_digits_cnn64": "higher"}
    assert cells(printed(better=better)) == {
        "fd ↓": ["153.4", "1.713", "1.94", "79.06", "4.92"],
        "reconstructed": ["4.5", "", "1.94", "2.32", ""],
        "kid": ["-1.23e-04", "0.0123", "0.9022", "", ""],
        "nearest_features ↑": ["123457", "0.0123", "0.9022", "", ""],
    }


def test_nothing_is_cut_off_at_80_columns():
    text = printed(better={"nearest_features_digits_cnn64": "lower"})
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    header = " ".join(printed(width=200).split("┏")[1].split())
    for title in ("generated", "± over seeds", "held-out", "generated / held-out", "expected floor"):
        assert f"┃ {title}" in header


@pytest.mark.parametrize(
    ("counts", "shown"),
    [
        ({"n_ref_statistics": 898, "n_ref_images": 898}, "digits/train (898 images), "),
        ({"n_ref_statistics": 50_000, "n_ref_images": 100}, "digits/train (statistics of 50000, 100 images), "),
        ({"n_ref_statistics": 50_000, "n_ref_images": None}, "digits/train (statistics of 50000), "),
        ({"n_ref_statistics": None, "n_ref_images": 100}, "digits/train (100 images), "),
        ({"n_ref_statistics": None, "n_ref_images": None}, "digits/train, "),
    ],
)
def test_the_title_has_the_counts_that_exist(counts, shown):
    assert f"3 × 450 images against {shown}features of digits_cnn64" in printed(200, **counts)


@pytest.mark.parametrize(
    ("facts", "shown"),
    [
        ({}, "not comparable to published FIDs\n"),
        ({"comparable_to_published": True, "not_comparable_because": []}, "\ncomparable to published numbers\n"),
        ({"not_comparable_because": REASONS[:1]}, f"FIDs: {REASONS[0]}\n"),
        ({"not_comparable_because": REASONS[:2]}, f"FIDs: {REASONS[0]}; {REASONS[1]}\n"),
        ({"not_comparable_because": REASONS}, f"FIDs: {REASONS[0]}; {REASONS[1]}; and 2 more in the result\n"),
    ],
)
def test_the_first_reasons_stand_under_the_table(facts, shown):
    text = printed(200, **facts)
    assert shown in text and text.endswith("\nwarning: [b]one\n")
