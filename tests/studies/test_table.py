"""The table of a study."""

import csv
import io

import pytest

from dit_moe.studies.table import to_csv, to_markdown
from tests.studies.examples import results


def tables(markdown: str) -> list[list[dict[str, str]]]:
    """The tables in a text, each as rows."""
    found, lines = [], [line for line in markdown.splitlines() if line.startswith("|")]
    for line in lines:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] == "variant":
            titles = cells
            found.append([])
        elif not cells[0].startswith("--"):
            found[-1].append(dict(zip(titles, cells, strict=True)))
    return found


def test_each_objective_has_a_table_of_its_own_and_a_heading_if_there_are_several():
    flow, ddpm = tables(to_markdown(results()))
    assert (len(flow), [row["variant"] for row in ddpm]) == (11, ["top-k", "DTop-p"])
    text = to_markdown(results(["topk", "dtopp"]))
    assert len(tables(text)) == 1 and "##" not in text and text.startswith("# Routers on handwritten digits\n")


def test_losses_show_two_digits_of_their_smallest_spread():
    made = results(["topk", "dtopp"])
    for variant, losses in zip(made.variants, ([0.5, 0.51, 0.52], [0.4, 0.4012, 0.4024]), strict=True):
        for run, loss in zip(variant.runs, losses, strict=True):
            run.loss = loss
    [[topk, dtopp]] = tables(to_markdown(made))
    assert topk["held-out loss"] == "0.5100 ± 0.0100"
    assert dtopp["held-out loss"] == "0.4012 ± 0.0012"
    assert topk["difference to top-k [95 % CI]"] == "–"
    assert dtopp["%"] == "−21.33"


@pytest.mark.parametrize(
    ("differences", "shown"),
    [
        # mean ± 4.303 · std / √3, whatever the spread over seeds
        ([-0.1, -0.1088, -0.1176], "**−0.109** [−0.131, −0.087]"),
        ([-0.00001, -0.00002, -0.00003], "−0.000020 [−0.000045, +0.000005]"),
        ([-0.00002], "−0.000020"),
        ([0.0, 0.0, 0.0], "0 [0, 0]"),
    ],
)
def test_differences_show_two_digits_of_their_own_interval(differences, shown):
    made = results(["topk", "dtopp"], seeds=len(differences))
    topk, dtopp = (variant.runs for variant in made.variants)
    for i, difference in enumerate(differences):
        topk[i].loss = 0.5 + i / 100
        dtopp[i].loss = topk[i].loss + difference
    [[_, row]] = tables(to_markdown(made))
    assert row["difference to top-k [95 % CI]"] == shown


def test_only_differences_whose_interval_excludes_0_are_bold_and_rows_of_several_baselines_name_theirs():
    flow, ddpm = tables(to_markdown(results()))
    shown = {row["variant"]: row["difference to its baseline [95 % CI]"] for row in flow}
    assert shown["DTop-p"].startswith("**−")
    assert shown["dense"].startswith("**+")
    assert ddpm[1]["difference to top-k [95 % CI]"].startswith("−0.0003")
    assert [row["baseline"] for row in flow][1::8] == ["itself", "itself"]
    assert flow[-1]["baseline"] == "top-k 16E4A"
    assert "baseline" not in ddpm[0]


def test_measured_experts_and_flops_stand_beside_the_target():
    [[dense, topk, topp]] = tables(to_markdown(results(["dense", "topk", "topp-0.9"])))
    assert (topk["experts"], topk["active, held-out"], topk["MFLOPs per image"]) == ("2 of 8", "2.000", "11.40")
    assert dense["active, held-out"] == dense["experts"] == "–"
    assert 2.7 < float(topp["active, training"].split(" ± ")[0]) < 3.1
    assert topp["time per step"] == "1.07×"


def test_notes_say_who_keeps_the_target_and_who_drifts():
    made = results()
    for run, mean in zip(made.variants[6].runs, (1.9, 2.0, 2.1), strict=True):
        run.training_active["mean"] = mean
    text = to_markdown(made)
    note = next(line for line in text.splitlines() if "Controlled routers" in line)
    assert "within 5 % of their target" in note and "with every seed (DTop-p layer-wise is the furthest)" in note
    drift = next(line for line in text.splitlines() if "nothing controls them" in line)
    assert "top-p 0.5 −50 %" in drift and "DTop-p without PI" in drift and "top-k" not in drift


def test_a_run_without_its_log_is_named_and_the_others_tell_of_training():
    made = results(["topk", "dtopp"])
    run = made.variants[1].runs[0]
    run.training_active = None
    run.curves = {"step": [], "loss": [], "active": None, "active_std": None, "p": None}
    text = to_markdown(made)
    assert "**No log.jsonl**, and so nothing of the training, in runs/compare-digits/dtopp-s0." in text
    assert "Controlled routers are within" in text


def test_runs_made_alike_are_told_once_and_timing_has_its_own_machine():
    notes = to_markdown(results(["topk", "dtopp"]))
    assert "1× is 139 ms of top-k, with nothing beside it on AMD EPYC 9R14, 2 cores, 2 threads, fp32." in notes
    assert "Scored on AMD EPYC 9R14, 2 cores, 1 thread, fp32." in notes
    assert "Scored with dit_moe 0.1.0, torch 2.14.1." in notes


def test_runs_made_elsewhere_or_of_another_length_are_pointed_out_and_pairs_that_are_fewer_than_seeds():
    made = results(["topk", "dtopp"])
    run = made.variants[0].runs[0]
    run.made = run.made | {"machine": {"cpu": "AMD EPYC 9R14", "cores": 16, "gpu": "H100"}, "precision": "bf16"}
    run.step = 500
    del made.variants[0].runs[2]
    text = to_markdown(made)
    assert "Scored on **not all alike**: 1 run with H100, AMD EPYC 9R14, 16 cores, 1 thread, bf16; 4 runs" in text
    assert "Scored with dit_moe" in text and "500 to 600 steps, **not all as long**" in text
    assert tables(text)[0][1]["difference to top-k [95 % CI]"].endswith("(2 pairs)")


def test_what_is_missing_is_said_first_and_its_rows_stay():
    made = results(finished=False, missing=[["dtopp", 1], ["dtopp", 2], ["dtopp-ddpm", 0]])
    made.variants[5].runs = made.variants[5].runs[:1]
    made.variants[12].runs = []
    text = to_markdown(made)
    notes = [line for line in text.splitlines() if line.startswith("- ")]
    assert notes[0].startswith("- **Not finished.** Missing: DTop-p with seed 1, 2; DTop-p (ddpm) with seed 0.")
    flow, ddpm = tables(text)
    assert flow[5]["seeds"] == "1" and "[" not in flow[5]["difference to its baseline [95 % CI]"]
    assert ddpm[1]["held-out loss"] == ddpm[1]["MFLOPs per image"] == "–"


def test_a_study_that_has_not_begun_has_a_table_of_dashes():
    made = results(["topk", "dtopp"], finished=False, missing=[["topk", 0], ["dtopp", 0]])
    for variant in made.variants:
        variant.runs, variant.seconds_per_step = [], None
    text = to_markdown(made)
    assert "No run is there yet." in text
    assert [row["seeds"] for row in tables(text)[0]] == ["0", "0"]


def test_there_is_no_column_of_experts_of_dense_models_and_none_of_a_metric_without_one():
    [[dense]] = tables(to_markdown(results(["dense"])))
    assert not any(word in title for title in dense for word in ("experts", "active", "difference"))
    metric = {"name": "nearest_pixels", "label": "nearest pixels", "better": None}
    [[topk, _]] = tables(to_markdown(results(["topk", "dtopp"], metric=metric)))
    assert "nearest pixels" in topk  # without an arrow
    made = results(["topk", "dtopp"], unit="token", metric=None, loss={"label": "held-out loss", "unit": "nats/token"})
    made.settings["heldout"] = None
    [[topk, _]] = tables(to_markdown(made))
    assert "MFLOPs per token" in topk and "held-out loss (nats/token)" in topk  # of a language model
    assert not any("Fréchet" in title for title in topk)


def test_csv_has_every_variant_unrounded():
    made = results()
    rows = {row["name"]: row for row in csv.DictReader(io.StringIO(to_csv(made)))}
    assert list(rows) == [variant.name for variant in made.variants]
    dtopp, dense = rows["dtopp"], rows["dense"]
    losses = [run.loss for run in made.variants[5].runs]
    assert float(dtopp["loss"]) == pytest.approx(sum(losses) / 3, rel=1e-15)
    assert float(dtopp["difference_low"]) < float(dtopp["difference"]) < float(dtopp["difference_high"]) < 0
    assert (dtopp["seeds"], dtopp["difference_pairs"], dtopp["controlled"]) == ("0 1 2", "3", "True")
    assert "fd_digits_cnn64.ratio" in dtopp and dense["active"] == dense["target"] == ""
