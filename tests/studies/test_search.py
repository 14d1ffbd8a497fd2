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
DENSE = ", {name: dense, changes: [model.name=DiT-custom/2, model.moe=null], max_seeds: 1}"
LAYERWISE = ", {name: layerwise, changes: [model.moe.router.layerwise=true], options_of: dtopp, max_seeds: 1}]"


@pytest.fixture
def path(tmp_path):
    path = write_small_study(tmp_path)
    path.write_text(
        path.read_text()
        .replace("seeds: [0]", "seeds: [1, 2]")
        .replace("label: DTop-p}]", "label: DTop-p}" + DENSE + LAYERWISE)
        + f"search: {{seed: 0, steps: 3, {ROUNDS}}}\n"
    )
    return path


BALANCE = "model.moe.router.balance_loss=1e-2"


def search_with(path, loss):
    """The search of a study whose runs have the loss that `loss` says of a variant and its options; and its rounds.

    A round is given by the options that each of its runs tries.
    """
    study = with_found_configs(load_study(path), path.parent)
    search, rounds = Search(study, path.parent), []
    while (round_ := search.next_study()) is not None:
        assert round_.seeds == (0,) and round_.changes[-1] == "train.steps=3" and round_.metric is None
        options, losses = {}, {}
        for run in round_.variants:
            variant = study.variant(run.name.partition("+")[0])
            options[run.name] = run.changes[len(variant.changes) :]
            losses[run.name] = loss(variant.name, options[run.name])
        rounds.append((search.name, options))
        search.take(losses)
    return search.result(), rounds


def test_each_variant_keeps_the_best_alternative_of_one_option_and_goes_on_with_it(path):
    better = {("topk", ("train.lr=8e-3",)): 0.9, ("topk", ("train.lr=1e-3",)): DIVERGED, ("dtopp", (BALANCE,)): 0.8}
    found, rounds = search_with(path, lambda *run: better.get(run, 1.0))
    assert {name: each["chosen"] for name, each in found.items()} == {
        "topk": ["train.lr=8e-3"],
        "dtopp": [BALANCE],
        "dense": [],
    }
    assert [each["loss"] for each in found["topk"]["tried"]] == [1.0, None, 0.9, 1.0]
    assert rounds == [
        ("as_it_is", {"topk": (), "dtopp": (), "dense": ()}),
        (
            "1-train.lr",
            {"topk+lr-1e-3": ("train.lr=1e-3",), "topk+lr-8e-3": ("train.lr=8e-3",)},
        ),  # the baseline's come first
        ("2-model.moe.router.balance_loss", {"topk+balance_loss-1e-2+lr-8e-3": ("train.lr=8e-3", BALANCE)}),
        ("as_topk", {"dtopp+lr-8e-3": ("train.lr=8e-3",), "dense+lr-8e-3": ("train.lr=8e-3",)}),
        (
            "1-train.lr",
            {"dtopp+lr-1e-3": ("train.lr=1e-3",), "dense+lr-1e-3": ("train.lr=1e-3",)},
        ),  # 8e-3 was tried by then
        ("2-model.moe.router.balance_loss", {"dtopp+balance_loss-1e-2": (BALANCE,)}),  # the dense one has no router
    ]


def test_options_that_help_only_together_are_found_if_the_baseline_has_them(path):
    def loss(variant, options):
        return 1 + (0.1 if variant == "dtopp" and len(options) == 1 else -0.1) * len(options)

    found, rounds = search_with(path, loss)
    assert found["dtopp"]["start"] == found["dtopp"]["chosen"] == found["topk"]["chosen"] == ["train.lr=1e-3", BALANCE]
    # From there, each option's other values.
    assert [[*options.values()] for _, options in rounds[4:]] == [[(BALANCE, "train.lr=8e-3"), ("train.lr=8e-3",)]]


def test_variants_that_set_an_option_or_cannot_take_it_or_have_it_so_are_left_as_they_are(path):
    rounds = "[model.moe.router.bias_rate=1e-3], [model.moe.router.dynamic_loss=0.0]"
    text = path.read_text().replace("[train.lr=1e-3, train.lr=8e-3]", rounds)
    remoe = "{name: remoe, changes: [model.moe.router=remoe, model.moe.router.balance_loss=0]}, {name: dense"
    path.write_text(text.replace("{name: dense", remoe))
    _, rounds = search_with(path, lambda *run: 1.0)
    # Top-k has no entropy loss as it is; it chose nothing that the others could begin with.
    topk, dtopp = (
        (["topk+bias_rate-1e-3"], ["topk+balance_loss-1e-2"]),
        (["dtopp+bias_rate-1e-3"], ["dtopp+dynamic_loss-0.0"]),
    )
    assert [[*options] for _, options in rounds[1:]] == [*topk, *dtopp, ["dtopp+balance_loss-1e-2"]]


@pytest.fixture
def scores(monkeypatch):
    """Those of runs by folder; a job makes one without training. DTop-p diverges with the lower learning rate."""
    scores = {}

    def run_jobs(jobs, share):
        for job in jobs:
            loss = 2 - len(scores) / 100
            scores[job.output.parent] = {"loss": loss, "step": 3, "flops": 1e6, "made": provenance("fp32")}
            scores[job.output.parent] |= dict.fromkeys(("metric", "active", "active_layers"))
            if "/1-train.lr/dtopp+balance_loss-1e-2+lr-1e-3/" in str(job.output):
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
    assert "Missing: DTop-p with seed 1, 2; dense with seed 1; layerwise with seed 1." in table
    assert some.missing_commands() == []
    with pytest.raises(ConfigError, match=r"search is not done in .* for dtopp"):
        folder.run_only("dtopp/1")
    topk = scores.copy()

    table, failed = folder.run_missing(1)
    assert not failed and len(scores) == 6 + 4 + 4 + 1  # two have one seed, and the last one no search
    assert topk.items() <= scores.items()  # what was done is kept
    found = json.loads((folder.out / "search.json").read_text())["variants"]
    assert found["dtopp"]["tried"][2] == {"changes": [BALANCE, "train.lr=1e-3"], "loss": None}
    assert found["dense"]["chosen"] == ["train.lr=1e-3"] and "layerwise" not in found
    assert found["dtopp"]["chosen"] == ["train.lr=8e-3", BALANCE] == found["dtopp"]["start"]
    searched = folder.searched()
    runs = plan(searched.study, path.parent, folder.out)
    assert [run.name for run in runs] == ["topk/1", "dtopp/1", "dense/1", "layerwise/1", "topk/2", "dtopp/2"]
    for run in (runs[1], runs[3]):
        assert run.experiment.train.lr == 8e-3 and run.experiment.model.moe.router.balance_loss == 1e-2
    assert "Chosen for each variant by itself, by its held-out loss after 3 steps with seed 0" in table
    assert f"DTop-p train.lr=8e-3, {BALANCE}" in table
    assert "Without a search of their own take what was chosen for DTop-p: layerwise." in table

    del scores[runs[0].folder]
    assert [line.split("--only ")[1] for line in folder.missing_commands()] == ["topk/1"]
    (folder.out / "search.json").unlink()  # the rounds are not trained again
    before = len(scores)
    folder.run_missing(1)
    assert len(scores) == before + 1
    assert StudyFolder.open(str(folder.out), [], None).report() == folder.report() != ""  # with the search's note
    kept = json.loads((folder.out / "search.json").read_text())
    kept["variants"]["topk"]["chosen"] = []  # another choice for the baseline: what began with it is to be done again
    (folder.out / "search.json").write_text(json.dumps(kept))
    with pytest.raises(ConfigError, match=r"is not done in .* for dtopp, dense, layerwise"):
        folder.searched(["topk", "dtopp", "dense", "layerwise"])
    with pytest.raises(ConfigError, match="search is not done"):  # of another study
        StudyFolder.open(str(path), ["metric=null", "search.steps=2"], folder.out).searched()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("search.seed=1", "search.seed=1 is one of `seeds`"),
        ("search.rounds=[[train.lr=1e-3, train.warmup_steps=3]]", r"search.rounds\[0\] must be alternatives"),
        ("search.rounds=[[train.lr]]", r"search.rounds\[0\] must be alternatives"),
        ("search.steps=0", "search.steps=0 must be at least 1"),
        ("variants=[{name: topk, options_of: b}, {name: b}]", "baseline=topk has `options_of`"),
        ("variants=[{name: topk}, {name: b, options_of: c}]", r"variants\[1\].options_of=c is no variant"),
        (
            "variants=[{name: topk}, {name: b, options_of: c}, {name: c, options_of: topk}]",
            r"variants\[1\].options_of=c has no search of its own",
        ),
    ],
)
def test_a_search_that_makes_no_sense_is_refused(path, override, said):
    with pytest.raises(ConfigError, match=said):
        load_study(path, [override])
