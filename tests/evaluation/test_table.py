"""Results become rows, and nothing stands under a name that is not its own."""

import csv
import io
import json

import pytest

from dit_moe.evaluation.published import BASELINES
from dit_moe.evaluation.table import Row, published_row, read_result, to_csv, to_markdown

REASONS = ["5 000 generated images instead of 50 000", "the images were resized for the evaluation"]


def made(seed=0, **more):
    """A sample as a result describes it: a run, sampled while it was evaluated."""
    sample = {
        "sampler": {"name": "heun", "steps": 125, "time_shift": 1.0},
        "guidance": {"scale": 1.5, "interval": [0.0, 0.7], "channels": 3},
        "seed": seed,
    }
    experiment = {
        "model": {"name": "DiT-S/2-8E2A", "moe": {"experts": 8, "router": {"name": "dtopp", "p": 0.5}}},
        "objective": {"name": "flow", "path": "linear"},
        "train": {"batch_size": 256, "steps": 500_000},
        "sample": sample,
    }
    facts = {"parameters": 199_123_456, "active_parameters": 72_000_000.5, "active_experts": 2 + seed / 10}
    return (
        {"kind": "run", "step": 400_000, "weights": "ema", "experiment": experiment, "evaluations": 425} | facts | more
    )


def distance(generated, std=None, floor=None, estimate=1.234, n=5000):
    return {"generated": generated, "generated_std": std, "floor": floor, "floor_estimate": estimate, "n": n}


def result(samples, extractor, reasons=(), **numbers):
    provenance = {
        "samples": samples,
        "extractor": extractor,
        "n_gen": 5000,
        "n_ref": 10_000,
        "comparable_to_published": not reasons,
        "not_comparable_because": list(reasons),
    }
    return {**numbers, "provenance": provenance, "warnings": []}


INCEPTION = {"name": "inception", "is_fid": True}
DIGITS = {"name": "digits_cnn64", "is_fid": False}
VALUES = {"inception_score": 182.345, "inception_score_std": 1.5, "precision": 0.7912, "recall": 0.5534, "kid": 0.00213}
FID = result([made()], INCEPTION, fid=distance(8.1234), sfid=distance(9.9), **VALUES)
DIGIT = result(
    [made(0), made(1)], DIGITS, REASONS, fd_digits_cnn64=distance(2.083, 0.39, 1.94), precision_digits_cnn64=0.5
)


@pytest.fixture
def read(tmp_path):
    def read(report, name="metrics.json"):
        (tmp_path / name).write_text(json.dumps(report))
        return read_result(tmp_path if name == "metrics.json" else tmp_path / name)

    return read


def cells(markdown):
    """The table as one dict per row."""
    lines = [
        [cell.strip() for cell in line.strip("| ").split(" | ")] for line in markdown.split("\n\n")[0].splitlines()
    ]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def test_a_row_says_how_the_images_came_about(read):
    (row,) = cells(to_markdown([read(FID)]))
    wanted = {"model": "DiT-S/2-8E2A", "router": "dtopp", "params": "199 M", "active params": "72 M"}
    wanted |= {"active experts": "2.00", "steps × batch": "400 K × 256", "objective": "flow", "sampler": "heun 125"}
    wanted |= {"NFE": "425", "cfg": "1.5, 3 channels, t 0…0.7", "n": "5 000", "FID": "8.12", "its floor": "≈ 1.23"}
    wanted |= {"sFID": "9.90", "IS": "182.3 ± 1.5", "precision": "0.791", "recall": "0.553", "KID": "0.00213"}
    assert row == wanted | {"comparable": "✓", "source": row["source"]}


def test_images_of_a_file_take_what_was_written_beside_them(read):
    npz = {"kind": "npz", "sha256": "ab", "sample": made() | {"recipe": "sit-ode", "kind": None}}
    plain, beside = read(FID), read(result([npz], INCEPTION, fid=distance(8.1234), sfid=distance(9.9), **VALUES))
    assert beside.sampling_recipe == "sit-ode"
    assert to_markdown([beside]) == to_markdown([plain])


def test_seeds_are_averaged_and_a_setting_in_which_they_differ_is_left_open(read):
    row = read(DIGIT)
    assert row.seeds == 2 and row.active_experts == pytest.approx(2.05)
    assert cells(to_markdown([row]))[0]["n"] == "5 000 × 2"
    mixed = read(result([made(), made(step=100)], INCEPTION, fid=distance(1.0)))
    assert mixed.steps is None and mixed.evaluations == 425


def test_a_dense_model_is_told_from_an_unknown_one(read):
    dense = made()
    dense["experiment"]["model"]["moe"] = None
    assert read(result([dense], INCEPTION)).router == "dense"
    assert read(result([{"kind": "npz"}], INCEPTION)).router is None


def test_each_feature_space_has_its_own_columns(read):
    first, second = cells(to_markdown([read(DIGIT), read(FID)]))
    assert list(first).index("FID") < list(first).index("FD, digits_cnn64")
    assert (first["FD, digits_cnn64"], first["precision, digits_cnn64"]) == ("2.08 ± 0.39", "0.500")
    assert first["FID"] == first["precision"] == first["IS"] == second["FD, digits_cnn64"] == "–"
    assert second["FID"] == "8.12"


@pytest.mark.parametrize("extractor", [DIGITS, {"name": "inception", "is_fid": False}, "inception", None])
def test_a_fid_that_the_verified_inception_did_not_make_is_shown_nowhere(read, extractor):
    row = read(result([made()], extractor, REASONS, fid=distance(1.5), sfid_std=3.0))
    published = published_row(BASELINES[0])
    assert cells(to_markdown([row, published]))[0]["FID"] == "–"
    assert "1.5" not in [
        value for name, value in next(csv.DictReader(io.StringIO(to_csv([row])))).items() if "fid" in name
    ]


def test_the_measured_floor_goes_before_its_estimate(read):
    row = read(result([made()], INCEPTION, fid=distance(3.0, floor=0.756)))
    assert cells(to_markdown([row]))[0]["its floor"] == "0.76"


def test_a_row_that_is_not_comparable_is_marked_and_every_reason_is_a_footnote_once(read):
    markdown = to_markdown([read(DIGIT), read(FID), read(DIGIT | {"active_experts": 3.0}, "b.json")])
    assert [row["comparable"] for row in cells(markdown)] == ["✗¹ ²", "✓", "✗¹ ²"]
    assert markdown.split("\n\n")[1].splitlines() == [f"¹ {REASONS[0]}  ", f"² {REASONS[1]}  "]
    assert cells(markdown)[2]["active experts"] == "3.00"


def test_a_result_that_says_little_is_a_row_all_the_same_but_not_a_comparable_one(read):
    row = read(
        {"fd_digits_cnn64": {"generated": 2.5}, "provenance": {"extractor": "digits_cnn64", "samples": ["a.npz"]}}
    )
    assert row == Row(
        source=row.source,
        seeds=1,
        space="digits_cnn64",
        values={"fd_digits_cnn64": 2.5},
        notes=("the result does not say whether it is comparable",),
    )
    assert read({"provenance": {}}).values == {}


@pytest.mark.parametrize("text", ["", "[1]", '{"fid": 3}', '{"provenance": 3}', "\x00"])
def test_a_file_that_is_no_result_is_refused_by_name(tmp_path, text):
    (tmp_path / "metrics.json").write_text(text)
    with pytest.raises(ValueError, match=r"metrics.json is no result of dit-moe eval"):
        read_result(tmp_path)


def test_a_place_without_a_result_names_what_makes_one(tmp_path):
    for path in (tmp_path, tmp_path / "gone.json"):
        with pytest.raises(
            ValueError, match=r"(metrics|gone).json does not exist; name a result of dit-moe eval --out"
        ):
            read_result(path)


def test_published_rows_are_all_shown_with_their_source():
    rows = cells(to_markdown([published_row(each) for each in BASELINES]))
    assert len(rows) == len(BASELINES)
    first = rows[0]
    assert (first["model"], first["FID"], first["cfg"], first["NFE"]) == ("DiT-XL/2", "2.27", "1.5, 3 channels", "500")
    assert (first["steps × batch"], first["params"], first["source"]) == ("7 M × 256", "675 M", "DiT, arXiv 2212.09748")
    assert all(row["comparable"].startswith("✓") for row in rows)
    assert next(row for row in rows if row["model"].startswith("Lightning"))["steps × batch"] == "– × 1024"


def test_csv_holds_what_is_known_unrounded(read):
    row, baseline = csv.DictReader(io.StringIO(to_csv([read(DIGIT), published_row(BASELINES[0])])))
    assert float(row["fd_digits_cnn64"]) == 2.083 and float(row["fd_digits_cnn64_std"]) == 0.39
    assert (row["parameters"], row["interval_last"], row["fid"]) == ("199123456", "0.7", "")
    assert (row["comparable"], row["notes"]) == ("False", "; ".join(REASONS))
    assert (baseline["fid"], baseline["fd_digits_cnn64"], baseline["inception_score"]) == ("2.27", "", "278.2")


def test_a_bar_in_a_name_does_not_break_the_table(read):
    assert "a\\|b" in to_markdown([Row(source="x", model="a|b")])
