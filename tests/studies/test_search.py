"""The search of a study: one option after the other, for each variant by itself."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dit_moe.config import ConfigError
from dit_moe.studies import compare, results
from dit_moe.studies.compare import StudyFolder
from dit_moe.studies.plan import plan
from dit_moe.studies.score import provenance
from dit_moe.studies.search import DIVERGED, Search
from dit_moe.studies.study import load_study, with_found_configs
from dit_moe.training.interrupt import TrainingError
from dit_moe.training.trainer import DATA_ARE_FINITE
from tests.studies.examples import write_small_study

ROUNDS = "rounds: [[train.lr=1e-3, train.lr=8e-3], [model.moe.router.balance_loss=1e-2]]"
DENSE = ", {name: dense, changes: [model.name=DiT-custom/2, model.moe=null], max_seeds: 1}]"


@pytest.fixture
def path(tmp_path):
    path = write_small_study(tmp_path)
    path.write_text(
        path.read_text().replace("seeds: [0]", "seeds: [1, 2]").replace("label: DTop-p}]", "label: DTop-p}" + DENSE)
        + f"search: {{seed: 0, steps: 3, {ROUNDS}}}\n"
    )
    return path


def search_with(path, losses):
    """The search of a study in which a run has the loss that `losses` says of its changes, else 1."""
    study = with_found_configs(load_study(path), path.parent)
    search, rounds = Search(study, path.parent), []
    while (round_ := search.next_study()) is not None:
        rounds.append((search.name, round_))
        found = {}
        for variant in round_.variants:
            last = variant.changes[-1] if variant.changes else ""
            found[variant.name] = losses.get((variant.name.rpartition("-")[0] or variant.name, last), 1.0)
        search.take(found)
    return search, rounds


def test_each_variant_keeps_the_best_alternative_of_one_option_and_goes_on_with_it(path):
    losses = {("topk", "train.lr=8e-3"): 0.9, ("dtopp", "model.moe.router.balance_loss=1e-2"): 0.8}
    losses |= {("topk", "train.lr=1e-3"): DIVERGED}
    search, rounds = search_with(path, losses)
    assert [name for name, _ in rounds] == ["as_it_is", "1-train.lr", "2-model.moe.router.balance_loss"]
    found = search.result()
    assert {name: each["chosen"] for name, each in found.items()} == {
        "topk": ["train.lr=8e-3"],
        "dtopp": ["model.moe.router.balance_loss=1e-2"],
        "dense": [],
    }
    assert [each["loss"] for each in found["topk"]["tried"]] == [1.0, None, 0.9, 1.0]
    last = {variant.name: variant.changes[-2:] for variant in rounds[-1][1].variants}
    assert last == {  # the dense one has no router
        "topk-0": ("train.lr=8e-3", "model.moe.router.balance_loss=1e-2"),
        "dtopp-0": ("model.moe.router.balance_loss=1e-2",),
    }
    for _, study in rounds:
        assert study.seeds == (0,) and study.changes[-1] == "train.steps=3" and study.metric is None


def test_variants_that_set_an_option_or_cannot_take_it_or_have_it_so_are_left_as_they_are(path):
    rounds = "[model.moe.router.bias_rate=1e-3], [model.moe.router.dynamic_loss=0.0]"
    text = path.read_text().replace("[train.lr=1e-3, train.lr=8e-3]", rounds)
    remoe = "{name: remoe, changes: [model.moe.router=remoe, model.moe.router.balance_loss=0]}, {name: dense"
    path.write_text(text.replace("{name: dense", remoe))
    _, rounds = search_with(path, {})
    tried = [[variant.name for variant in study.variants] for _, study in rounds[1:]]
    # Top-k has no entropy loss as it is.
    assert tried == [["topk-0", "dtopp-0"], ["dtopp-0"], ["topk-0", "dtopp-0"]]


@pytest.fixture
def scores(monkeypatch):
    """Those of runs by folder; a job makes one without training. DTop-p diverges with the higher learning rate."""
    scores = {}

    def run_jobs(jobs, share):
        for job in jobs:
            loss = 2 - len(scores) / 100
            scores[job.output.parent] = {"loss": loss, "step": 3, "flops": 1e6, "made": provenance("fp32")}
            scores[job.output.parent] |= dict.fromkeys(("metric", "active", "active_layers"))
            if "/1-train.lr/dtopp-1/" in str(job.output):
                del scores[job.output.parent]
                job.returncode = 1
                job.output.parent.mkdir(parents=True)  # so a second time would fail
                _, _, _, _, study, _, out, _, name = job.command
                with pytest.raises(TrainingError, match=DATA_ARE_FINITE):
                    StudyFolder.open(study, [], Path(out)).run_only(name)
        return [job for job in jobs if job.returncode]

    def diverge(study, run):
        raise TrainingError(f"step 2: loss=nan; {DATA_ARE_FINITE}, so lower train.lr")

    monkeypatch.setattr(compare, "run_jobs", run_jobs)
    monkeypatch.setattr(compare, "train_and_score", diverge)
    for module in (compare, results):
        monkeypatch.setattr(module, "read_score", lambda study, run: scores.get(run.folder))
    monkeypatch.setattr(compare, "save_figures", lambda results, folder: None)
    return scores


def test_a_study_searches_first_goes_on_where_it_stopped_and_trains_with_what_it_chose(path, tmp_path, scores):
    folder = StudyFolder.open(str(path), ["metric=null", "timing_steps=0"], tmp_path / "out")
    with pytest.raises(ConfigError, match="search is not done"):
        folder.run_only("topk/1")
    assert [line.split("--only ")[1] for line in folder.missing_commands()] == ["topk/0", "dtopp/0", "dense/0"]

    some = replace(folder, wanted=["topk"])
    assert [line.split("--only ")[1] for line in some.missing_commands()] == ["topk/0"]
    table, failed = some.run_missing(1)
    assert not failed and len(scores) == 1 + 2 + 1 + 2
    assert "Missing: DTop-p with seed 1, 2; dense with seed 1." in table
    assert some.missing_commands() == []
    with pytest.raises(ConfigError, match=r"search is not done in .* for dtopp"):
        folder.run_only("dtopp/1")
    topk = scores.copy()

    table, failed = folder.run_missing(1)
    assert not failed and len(scores) == 3 + 5 + 2 + 5  # the dense variant has one seed and no router
    assert topk.items() <= scores.items()  # what was done is kept
    found = json.loads((folder.out / "search.json").read_text())["variants"]
    assert found["dtopp"]["tried"][2] == {"changes": ["train.lr=8e-3"], "loss": None}
    assert found["dense"]["chosen"] == ["train.lr=8e-3"]
    assert found["dtopp"]["chosen"] == ["train.lr=1e-3", "model.moe.router.balance_loss=1e-2"]
    searched = folder.searched()
    runs = plan(searched.study, path.parent, folder.out)
    assert [run.name for run in runs] == ["topk/1", "dtopp/1", "dense/1", "topk/2", "dtopp/2"]
    assert runs[1].experiment.train.lr == 1e-3 and runs[1].experiment.model.moe.router.balance_loss == 1e-2
    assert "Chosen for each variant by itself, by its held-out loss after 3 steps with seed 0" in table
    assert "DTop-p train.lr=1e-3, model.moe.router.balance_loss=1e-2" in table

    del scores[runs[0].folder]
    assert [line.split("--only ")[1] for line in folder.missing_commands()] == ["topk/1"]
    (folder.out / "search.json").unlink()  # the rounds are not trained again
    before = len(scores)
    folder.run_missing(1)
    assert len(scores) == before + 1
    assert StudyFolder.open(str(folder.out), [], None).report() == folder.report() != ""  # with the search's note
    with pytest.raises(ConfigError, match="search is not done"):  # of another study
        StudyFolder.open(str(path), ["metric=null", "search.steps=2"], folder.out).searched()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("search.seed=1", "search.seed=1 is one of `seeds`"),
        ("search.rounds=[[train.lr=1e-3, train.warmup_steps=3]]", r"search.rounds\[0\] must be alternatives"),
        ("search.rounds=[[train.lr]]", r"search.rounds\[0\] must be alternatives"),
        ("search.steps=0", "search.steps=0 must be at least 1"),
    ],
)
def test_a_search_that_makes_no_sense_is_refused(path, override, said):
    with pytest.raises(ConfigError, match=said):
        load_study(path, [override])
