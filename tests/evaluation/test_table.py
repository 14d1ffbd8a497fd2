"""Results become rows, and nothing stands under a name that is not its own."""

import csv
import io
import json
from dataclasses import replace

import pytest

from dit_moe.evaluation.comparability import UNKNOWN
from dit_moe.evaluation.report import Distance, Report, Value, print_report
from dit_moe.evaluation.results import Row, published_rows, read_result
from dit_moe.evaluation.table import to_csv, to_markdown
from dit_moe.formatting import PlainConsole

REASONS = ["5 000 generated images instead of 50 000", "the images were altered: resized to 256"]


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
    facts = {"image_shape": [3, 256, 256], "parameters": 199_123_456, "active_parameters": 72_000_000.5}
    facts |= {"kind": "run", "step": 400_000, "weights": "ema", "evaluations": 425, "active_experts": 2 + seed / 10}
    return facts | {"experiment": experiment} | more


def distance(generated, std=None, floor=None, estimate=1.234, n=5000, n_reference=50_000):
    values = {"generated": generated, "generated_std": std, "floor": floor, "floor_estimate": estimate, "n": n}
    return values | {"n_reference": n_reference}


def flat(name, value, std=None):
    """A value that is no distance, as a report holds it."""
    return {name: value, f"{name}_std": std, f"{name}_heldout": 0.9, f"{name}_reconstruction": None}


def result(samples, extractor, reasons=(), **numbers):
    provenance = {
        "samples": samples,
        "extractor": extractor,
        "n_gen": 5000,
        "n_ref_statistics": 50_000,
        "n_ref_images": 10_000,
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
    rows = markdown.split("\n\n")[0].splitlines()
    titles, _, *lines = [[cell.strip() for cell in row.strip("| ").split(" | ")] for row in rows]
    return [dict(zip(titles, line, strict=True)) for line in lines]


def test_a_row_says_how_the_images_came_about(read):
    (row,) = cells(to_markdown([read(FID)]))
    wanted = {"model": "DiT-S/2-8E2A", "px": "256", "router": "dtopp", "params": "199 M", "active params": "72 M"}
    wanted |= {"active experts": "2.00", "steps × batch": "400 K × 256", "objective": "flow", "sampler": "heun 125"}
    wanted |= {"NFE": "425", "cfg": "1.5, 3 channels, t 0…0.7", "n": "5 000", "n reference": "50 000, 10 000 images"}
    wanted |= {"FID": "8.12", "its floor": "≈ 1.23", "sFID": "9.90", "IS": "182.3 ± 1.5"}
    wanted |= {"precision": "0.791", "recall": "0.553", "KID": "0.00213"}
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


def changed(facts=(), experiment=(), model=()):
    """The sample of a result with other facts, sections and options of the model."""
    sample = made(**dict(facts))
    sample["experiment"] |= dict(experiment)
    sample["experiment"]["model"] |= dict(model)
    return result([sample], INCEPTION)


@pytest.mark.parametrize(
    ("report", "field", "wanted"),
    [
        (changed(model={"moe": None}), "router", "dense"),
        (result([{"kind": "npz"}], INCEPTION), "router", None),
        (changed({"image_shape": [3, 64, 64]}), "image_size", 64),
        (changed({"image_shape": [3, 64, 32]}), "image_size", None),
        (changed({"image_shape": None}), "image_size", None),
        (changed({"image_shape": None}, {"first_stage": {"name": "identity"}}, {"input_size": 8}), "image_size", 8),
        (result([{"name": "/data/of/mine/images.npz"}], INCEPTION), "name", "mine/images.npz"),
        (FID, "n_reference", 50_000),
        (FID, "n_reference_images", 10_000),
        ({"provenance": {"n_ref_statistics": 7, "n_ref_images": None}}, "n_reference", 7),
        ({"provenance": {"n_ref_statistics": 7, "n_ref_images": None}}, "n_reference_images", None),
        (DIGIT | {"provenance": DIGIT["provenance"] | {"comparable_to_published": True}}, "comparable", False),
    ],
)
def test_a_field_of_a_row_is_what_the_result_says_or_left_open(read, report, field, wanted):
    assert getattr(read(report), field) == wanted


def test_each_feature_space_has_its_own_columns_and_a_measured_floor_goes_before_its_estimate(read):
    first, second = cells(to_markdown([read(DIGIT), read(FID)]))
    assert list(first).index("FID") < list(first).index("FD, digits_cnn64")
    assert (first["FD, digits_cnn64"], first["precision, digits_cnn64"]) == ("2.08 ± 0.39", "0.500")
    assert first["FID"] == first["precision"] == first["IS"] == second["FD, digits_cnn64"] == "–"
    assert second["FID"] == "8.12"
    assert (first["its floor, digits_cnn64"], first["its floor"], second["its floor"]) == ("1.94", "–", "≈ 1.23")


@pytest.mark.parametrize("extractor", [DIGITS, {"name": "inception", "is_fid": False}, "inception", None])
def test_a_fid_that_the_verified_inception_did_not_make_is_shown_nowhere(read, extractor):
    row = read(result([made()], extractor, REASONS, fid=distance(1.5), sfid_std=3.0))
    assert cells(to_markdown([row, published_rows()[0]]))[0]["FID"] == "–"
    unrounded = next(csv.DictReader(io.StringIO(to_csv([row]))))
    assert "1.5" not in [value for name, value in unrounded.items() if "fid" in name]


def test_a_row_that_is_not_comparable_is_marked_and_every_reason_is_a_footnote_once(read):
    markdown = to_markdown([read(DIGIT), read(FID), read(DIGIT | {"active_experts": 3.0}, "b.json")])
    assert [row["comparable"] for row in cells(markdown)] == ["✗¹ ²", "✓", "✗¹ ²"]
    general = "another number of generated images than 50 000"
    assert markdown.split("\n\n")[1].splitlines() == [f"¹ {general}  ", f"² {REASONS[1]}  "]
    assert cells(markdown)[2]["active experts"] == "3.00"


def test_what_to_know_of_a_feature_space_is_a_footnote(read):
    space = DIGITS | {"caveat": "its features are of few images"}
    markdown = to_markdown([read(result([made()], space, fd_digits_cnn64=distance(2.0))), read(FID, "b.json")])
    assert [row["comparable"] for row in cells(markdown)] == ["✓¹", "✓"]
    assert "¹ digits_cnn64: its features are of few images  " in markdown


def test_a_result_that_says_little_is_a_row_all_the_same_but_not_a_comparable_one(read):
    facts = {"extractor": "digits_cnn64", "samples": ["a.npz"]}
    row = read({"fd_digits_cnn64": {"generated": 2.5}, "provenance": facts})
    known = {"space": "digits_cnn64", "values": {"fd_digits_cnn64": 2.5}, "measured": ("fd_digits_cnn64",)}
    assert row == Row(source=row.source, name=row.name, seeds=1, reasons=(UNKNOWN,), **known)
    assert read({"provenance": {}}).values == {}


@pytest.mark.parametrize("text", ["", "[1]", '{"fid": 3}', '{"provenance": 3}', "\x00"])
def test_a_file_that_is_no_result_is_refused_by_name(tmp_path, text):
    (tmp_path / "metrics.json").write_text(text)
    with pytest.raises(ValueError, match=r"metrics.json is (no result|empty|not valid JSON).*; name (one|a result of)"):
        read_result(tmp_path)
    with pytest.raises(ValueError, match=r"gone.json does not exist .*; name a result of dit-moe eval --out"):
        read_result(tmp_path / "gone.json")


def test_a_negative_distance_is_refused(tmp_path):
    (tmp_path / "metrics.json").write_text('{"fid": {"generated": -1.0}, "provenance": {}}')
    with pytest.raises(ValueError, match=r"fid.generated=-1.0 must be from 0"):
        read_result(tmp_path)


def test_published_rows_are_all_shown_with_their_source():
    rows = cells(to_markdown(published_rows()))
    assert len(rows) == len(published_rows())
    first = rows[0]
    assert (first["model"], first["FID"], first["cfg"], first["NFE"]) == ("DiT-XL/2", "2.27", "1.5, 3 channels", "500")
    assert (first["steps × batch"], first["params"], first["source"]) == ("7 M × 256", "675 M", "DiT, arXiv 2212.09748")
    assert all(row["comparable"].startswith("published") for row in rows) and rows[-1]["px"] == "512"
    assert rows[1]["comparable"] == "published¹"
    assert next(row for row in rows if row["model"].startswith("Lightning"))["steps × batch"] == "– × 1024"


def test_csv_holds_what_is_known_unrounded(read):
    row, baseline = csv.DictReader(io.StringIO(to_csv([read(DIGIT), published_rows()[0]])))
    assert float(row["fd_digits_cnn64"]) == 2.083 and float(row["fd_digits_cnn64_std"]) == 0.39
    assert (row["parameters"], row["interval_last"], row["fid"]) == ("199123456", "0.7", "")
    assert (row["comparable"], row["reasons"], row["notes"]) == ("False", "; ".join(REASONS), "")
    assert (baseline["comparable"], baseline["reasons"], baseline["image_size"]) == ("published", "", "256")
    assert (baseline["fid"], baseline["fd_digits_cnn64"], baseline["inception_score"]) == ("2.27", "", "278.2")


def test_reasons_that_differ_in_their_counts_share_a_footnote(read):
    reasons = ([f"{n} generated images instead of 50 000"] for n in ("5 000", 9))
    few, fewer = (read(result([made()], INCEPTION, each), f"{i}.json") for i, each in enumerate(reasons))
    markdown = to_markdown([few, fewer])
    assert markdown.split("\n\n")[1].count("\n") == 1 and "✗²" not in markdown
    assert "9 generated images" in to_csv([fewer])  # which merges nothing


def test_a_value_of_ones_own_metric_has_a_column_in_its_feature_space(read):
    own = {**flat("density_digits_cnn64", 0.81234, 0.0123), **flat("mean_gap_digits_cnn64", -12.34)}
    own |= flat("nearest_pixels", 507.2) | flat("kid_subset_std_digits_cnn64", 3.0) | {"train_seconds": 8.8}
    own |= flat("class_accuracy", 0.5)
    theirs = flat("density", 0.5) | flat("nearest_pixels", 12.0) | {"inception_score_split_std": 2.0}
    rows = [read(result([made()], DIGITS, REASONS, **own)), read(result([made()], INCEPTION, **theirs), "b.json")]
    first, second = cells(to_markdown(rows))
    assert (first["density, digits_cnn64"], first["mean gap, digits_cnn64"]) == ("0.812 ± 0.012", "-12.3")
    assert (first["nearest pixels"], second["nearest pixels"], first["class accuracy"]) == ("507", "12.0", "0.500")
    assert (first["density"], second["density"], second["density, digits_cnn64"]) == ("–", "0.500", "–")
    assert not [title for title in first if "std" in title or "seconds" in title or "heldout" in title]
    alone = cells(to_markdown(rows[:1]))[0]
    assert alone["nearest pixels"] == "507" and list(alone)[-3] == "nearest pixels"


@pytest.mark.parametrize(
    ("title", "value", "std", "shown"),
    [
        ("KID", 0.00213, 0.000015, "0.00213 ± 0.000015"),
        ("KID", 204.4291, 4.0346, "204 ± 4.0"),
        ("KID", 0.0000012345, None, "0.00000123"),
        ("KID", -1.5e-9, None, "-1.50e-09"),
        ("KID", 12345.6, None, "12346"),
        ("KID", 0.0, None, "0"),
        ("FID", 0.0052, 0.2, "0.00520 ± 0.20"),
        ("FID", 2.1, 0.00321, "2.10 ± 0.0032"),
        ("FID", 182.345, 0.0, "182.34 ± 0.00"),
    ],
)
def test_numbers_keep_their_significant_digits_at_any_scale(read, title, value, std, shown):
    number = flat("kid", value, std) if title == "KID" else {"fid": distance(value, std)}
    (row,) = cells(to_markdown([read(result([made()], INCEPTION, **number))]))
    assert row[title] == shown


# --------------------------------------------------------------------------------------------- one report, on stderr

WHY = ["the features are others", "450 generated images instead of 50 000", "a third", "a fourth"]


def printed_report(**provenance):
    def value(name, number, std=0.0123):
        return {name: number, f"{name}_std": std, f"{name}_heldout": 0.9022222, f"{name}_reconstruction": None}

    distance = {"generated": 153.372, "generated_std": 1.713, "floor": 1.94, "floor_estimate": 4.92, "ratio": 79.055}
    distance |= {"reconstruction": 4.5, "reconstruction_ratio": 2.3196, "n": 450, "n_reference": 898, "seeds": 3}
    numbers = {"fd_digits_cnn64": distance, **value("kid_digits_cnn64", -0.000123456)}
    numbers |= {"kid_subset_std_digits_cnn64": 12.04} | value("nearest_features_digits_cnn64", 123456.789)
    facts = {"samples": [{}] * 3, "reference": {"name": "digits/train"}, "extractor": {"name": "digits_cnn64"}}
    tree = {"provenance": facts | {"n_gen": 450} | provenance, "warnings": ["[b]one"], "train_seconds": 9.5}
    return Report.from_json(numbers | tree)


def printed(width=80, **provenance):
    console = PlainConsole(file=io.StringIO(), width=width)
    print_report(printed_report(**provenance), console)
    return console.file.getvalue()


def printed_cells(text):
    lines = [line.split("│")[1:-1] for line in text.splitlines() if line.startswith("│")]
    return {line[0].strip(): [cell.strip() for cell in line[1:]] for line in lines}


def test_each_number_has_a_row_and_spreads_within_a_set_have_none():
    better = {"fd_digits_cnn64": "lower", "nearest_features_digits_cnn64": "higher"}
    assert printed_cells(printed(better=better)) == {
        "fd ↓": ["153.4", "1.713", "1.94", "79.06", "4.92"],
        "reconstructed": ["4.5", "", "1.94", "2.32", ""],
        "kid": ["-1.23e-04", "0.0123", "0.9022", "", ""],
        "nearest_features ↑": ["123457", "0.0123", "0.9022", "", ""],
    }


def test_nothing_is_cut_off_or_broken_at_80_columns_with_all_columns_there_are():
    report = printed_report(better={"nearest_features_digits_cnn64": "lower"})
    distance = replace(report.numbers["fd_digits_cnn64"], noise=173.0)
    console = PlainConsole(file=io.StringIO(), width=80)
    print_report(replace(report, numbers={**report.numbers, "fd_digits_cnn64": distance}), console)
    text = console.file.getvalue()
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    header = text.splitlines()[2].replace("┃", " ").split()
    assert header == ["generated", "±", "held-out", "ratio", "noise", "expected"]


@pytest.mark.parametrize(
    ("facts", "shown"),
    [
        ({"n_ref_statistics": 898, "n_ref_images": 898}, "3 × 450 images against digits/train (898 images), features"),
        ({"n_ref_statistics": 50_000, "n_ref_images": 100}, "digits/train (statistics of 50000, 100 images), features"),
        ({"n_ref_statistics": 50_000, "n_ref_images": None}, "digits/train (statistics of 50000), features"),
        ({"n_ref_statistics": None, "n_ref_images": 100}, "digits/train (100 images), features of digits_cnn64"),
        ({}, "digits/train, features"),
        ({}, f"FIDs: {UNKNOWN.text}\n"),
        ({"comparable_to_published": True, "not_comparable_because": []}, "\ncomparable to published numbers\n"),
        ({"not_comparable_because": WHY[:2]}, f"FIDs: {WHY[0]}; {WHY[1]}\n"),
        (
            {"not_comparable_because": WHY},
            f"FIDs: {WHY[0]}; {WHY[1]}; and 2 more in provenance.not_comparable_because\n",
        ),
    ],
)
def test_the_title_has_the_counts_that_exist_and_the_first_reasons_stand_under_the_table(facts, shown):
    text = printed(200, **facts)
    assert shown in text and text.endswith("\nwarning: [b]one\n")


def test_under_the_table_stands_what_its_columns_are_and_where_the_numbers_stand():
    text = printed(200, extractor={"name": "digits_cnn64", "classes": 10})
    assert "\nheld-out: real images that were not trained on; ratio: generated over held-out\n" in text
    assert "\nheld-out 1.94 is as good as real images\n" in text
    expected = "\nexpected: held-out by a formula, for images drawn at random"
    assert f"{expected}; where they differ, trust held-out\n" in text
    few = printed(200, extractor={"name": "digits_cnn64", "dim": 300})
    assert f"{expected} (it reads low of fewer than 600 images); where they differ, trust held-out\n" in few
    assert "\n±: over the seeds of sampling" in text and "\nnearest_*: neither direction is better" in text
    assert "chance" not in text  # of a class accuracy that is not there
    number = Distance(generated=153.4, floor=1.94, noise=173.0)
    report = replace(printed_report(), numbers={"fd_digits_cnn64": number, "class_accuracy": Value(mean=0.1175)})
    report = replace(report, provenance=replace(report.provenance, extractor={"name": "digits_cnn64", "classes": 10}))
    assert "held-out 1.94 is as good as real images, noise 173 is nothing learned\n" in str(report)
    assert "class_accuracy: chance 0.100\n" in str(report) and "┃ noise" in " ".join(str(report).split())
    assert Report.from_json(report.to_json()).distances["fd_digits_cnn64"] == number
