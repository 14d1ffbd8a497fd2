"""`dit-moe routing` tells where a run's experts go, for images and text, and refuses what it cannot tell of."""

import json
import shutil

import numpy as np
import pytest

from dit_moe import plotting
from dit_moe.analysis.page import figures_of
from dit_moe.config import section
from dit_moe.data import DATASETS
from dit_moe.data.image_folder import ImageFolderConfig
from dit_moe.experiments.image import load_experiment, open_split
from dit_moe.experiments.run import open_text_run
from dit_moe.experiments.text import open_heldout
from tests.autoencoders.encoded import encode
from tests.cli.conftest import CONFIG, SMALL, cli
from tests.cli.test_bad_input import refused
from tests.cli.test_perplexity import trained  # noqa: F401 (a fixture)
from tests.folders import contents


@pytest.fixture
def undrawn(monkeypatch):
    """Numbers only: the pictures have tests of their own."""
    monkeypatch.setattr("dit_moe.analysis.report.write_page", lambda stats, folder: [])


def numbers(folder):
    return json.loads((folder / "routing.json").read_text())


def test_a_run_of_images_gets_numbers_pictures_and_a_report_in_its_folder(a_run, capsys, monkeypatch):
    monkeypatch.setattr(plotting, "DPI", 24)
    monkeypatch.setattr("dit_moe.analysis.page.figures_of", lambda stats: figures_of(stats)[:4])
    assert cli("routing", a_run, "--images", 20, "--times", 4) == 0
    found = numbers(a_run / "routing")
    assert found["facts"]["split"] == "heldout" and found["facts"]["images"] == 20 and found["facts"]["step"] == 4
    assert np.shape(found["active_LT"]) == (2, 4) and found["training"]["step_U"] == [1, 2, 3, 4]
    assert np.shape(found["training"]["p_LU"]) == np.shape(found["training"]["theta_LU"]) == (2, 4)
    assert (a_run / "routing" / "report.html").stat().st_size > 10_000
    assert len(list((a_run / "routing").glob("*.png"))) == 4
    assert set(found["pictures"]) == {file.name for file in (a_run / "routing").glob("*.png")}
    printed = capsys.readouterr()
    assert "balance of load" in printed.err and "report.html" in printed.err and not printed.out


def test_text_is_counted_as_perplexity_counts_it(trained, tmp_path, undrawn):  # noqa: F811
    assert cli("routing", trained / "run", "--out", tmp_path / "out", "eval.stride=8") == 0
    found = numbers(tmp_path / "out")
    assert found["kind"] == "text" and found["facts"]["split"] == "heldout" and found["facts"]["documents"] == 4
    assert cli("perplexity", trained / "run", "stride=8", "--out", tmp_path / "perplexity.json") == 0
    scored = json.loads((tmp_path / "perplexity.json").read_text())
    assert found["active"] == pytest.approx(scored["active_experts"], abs=2e-3)
    assert found["facts"]["tokens counted"] == scored["tokens"]


def test_documents_are_spread_over_the_text_unless_the_first_are_asked_for(trained, tmp_path, undrawn):  # noqa: F811
    run = open_text_run(trained / "run")
    sizes = [len(ids) for ids, _ in open_heldout(run.experiment, run.tokenizer, run.trained_on).documents()]
    half = (sum(sizes) + len(sizes)) // 2
    assert cli("routing", trained / "run", "--tokens", half, "--out", tmp_path / "spread") == 0
    assert numbers(tmp_path / "spread")["facts"]["tokens counted"] == sizes[0] + sizes[2]
    assert cli("routing", trained / "run", "eval.max_documents=2", "--out", tmp_path / "first") == 0
    assert numbers(tmp_path / "first")["facts"]["tokens counted"] == sizes[0] + sizes[1]


def test_options_of_images_are_refused_for_text(trained, capsys):  # noqa: F811
    refused(capsys, 2, "is a model of text; leave it out", "routing", trained / "run", "--times", 3)
    refused(capsys, 2, "tokens have no split 'test'", "routing", trained / "run", "--split", "test")


def test_weights_and_compute_are_those_of_the_section_sample(a_run, undrawn):
    found = []
    for words in (["weights=model", "target=1"], ["sample.p=1"]):
        assert cli("routing", a_run, "--images", 10, "--times", 2, *words) == 0
        found.append(numbers(a_run / "routing"))
    one, all_ = found
    assert one["facts"]["weights sha256"] != all_["facts"]["weights sha256"] and one["facts"]["weights"] == "model"
    assert one["active_L"] == [1, 1] and one["target"] == {"mean": 1, "held": True}
    assert all_["active_L"] == [4, 4] and all_["target"] == {"mean": 2, "held": False}


def test_an_older_checkpoint_and_a_copy_of_one_are_reported_with_the_log_there_is_on_the_data_named(
    a_run, tmp_path, undrawn
):
    older = a_run / "checkpoints" / "step_00000002"
    assert cli("routing", older, "--images", 10, "--times", 2, "--split", "train") == 0
    train = numbers(a_run / "routing")
    assert train["training"]["step_U"] == [1, 2] and train["facts"]["split"] == "train"
    lone = tmp_path / "elsewhere" / "lone"
    shutil.copytree(older, lone)
    assert cli("routing", lone, "--images", 10, "--times", 2, "data.size=8") == 0
    heldout = numbers(lone.parent / "routing")
    assert heldout["training"] is None and heldout["active_LS"] != train["active_LS"]


def test_latents_without_held_out_ones_are_those_of_training_and_stated_ones_that_are_gone_are_an_error(tmp_path):
    encode(tmp_path / "latents")
    latents = f"name: latents, path: {tmp_path / 'latents'}"
    data, gone = (load_experiment(CONFIG, [f"data={{{latents}{more}}}"]).data for more in ("", ", heldout: gone"))
    dataset, split = open_split(data, None)
    assert len(dataset) == 100 and split == "train (nothing was held out)"  # and mirrored
    with pytest.raises(ValueError, match=r"data\.heldout=None names no held-out latents"):
        open_split(data, "heldout")
    with pytest.raises(ValueError, match="gone"):
        open_split(gone, None)


def test_a_held_out_split_that_is_only_a_default_says_why_it_is_not_there(monkeypatch):
    def refuses(description, split):
        if split == "heldout":
            raise ValueError("data.heldout=validation is no split of them")
        return "the data"

    monkeypatch.setattr("dit_moe.experiments.image.open_data", refuses)
    for description in ("", ", heldout: validation"):
        experiment = load_experiment(CONFIG, [f"data={{name: huggingface, id: some{description}}}"])
        dataset, split = open_split(experiment.data, None)
        assert dataset == "the data" and split.startswith("train (held-out") and "is no split of them" in split
    with pytest.raises(ValueError, match="no split of them"):
        open_split(load_experiment(CONFIG, ["data={name: huggingface, id: some, heldout: test}"]).data, None)


def test_only_data_that_are_not_there_make_room_for_samples_of_the_run(a_run, tmp_path, undrawn, monkeypatch, capsys):
    def opened(run, split, path=tmp_path / "gone"):
        with section("data"):
            return DATASETS.build(ImageFolderConfig(path=str(path)), "train"), "train"

    monkeypatch.setattr("dit_moe.tasks.images.open_split", opened)
    assert cli("routing", a_run, "--images", 4, "--times", 2, "--out", tmp_path / "out") == 0
    assert "(of the run itself, as its data are not there)" in numbers(tmp_path / "out")["facts"]["split"]
    monkeypatch.setattr("dit_moe.tasks.images.open_split", lambda run, split: opened(run, split, tmp_path / "out"))
    refused(capsys, 2, "has no images", "routing", a_run, "--out", tmp_path / "other")


def test_every_dataset_says_whether_it_may_lack_held_out_data():
    for name in DATASETS.names():
        fields = DATASETS.config_class(name).__dataclass_fields__
        assert "heldout" in fields or name == "digits", "a dataset without the field must have the split"


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    "words, message",
    [
        (["--images", "0"], "--images=0 must be at least 1"),
        (["--times", "0"], "--times=0 must be at least 1"),
        (["--tokens", "5"], "is a model of images; leave it out"),
        (["--split", "test"], "the digits have no split 'test'"),
        (["targets=3"], "sample.targets is not a known key"),
        (["data.sizes=3"], "data.sizes is not a known key"),
    ],
)
def test_bad_input_is_one_message_and_nothing_is_written(finished_run, capsys, words, message):
    before = contents(finished_run)
    refused(capsys, 2, message, "routing", finished_run, *words)
    assert contents(finished_run) == before


def test_a_damaged_log_is_told_before_anything_is_counted(a_run, capsys, monkeypatch):
    monkeypatch.setattr("dit_moe.analysis.report._count", lambda *given: pytest.fail("was counted"))
    with (a_run / "log.jsonl").open("a") as log:
        log.write("{")
    refused(capsys, 2, "log.jsonl: line 5 is truncated", "routing", a_run)


def test_a_dense_run_is_refused(tmp_path, capsys):
    folder = tmp_path / "dense"
    assert cli("train", CONFIG, "--run", folder, *SMALL, "model.name=DiT-custom/4", "model.moe=null") == 0
    refused(capsys, 2, "is of the dense model DiT-custom/4, in which nothing is routed", "routing", folder)
    assert not (folder / "routing").exists()
