"""`dit-moe upcycle`, from run folders to run folders."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from dit_moe import checkpoint, load
from dit_moe.data.digits import Digits
from dit_moe.moe import measure_active, routers_of
from dit_moe.moe.routing import LARGEST_U
from dit_moe.tasks import task_of
from tests.cli.conftest import CONFIG, SMALL, cli

DENSE = ["model.name=DiT-custom/4", "train.lr=0.05"]  # so that four steps show in what the model gives


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dense") / "run"
    assert cli("train", CONFIG, "--run", folder, *SMALL, *DENSE) == 0
    return folder


def upcycled(capsys, source, out, *words) -> dict:
    """What the command prints."""
    capsys.readouterr()
    assert cli("upcycle", source, "--out", out, *words) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "words, most",
    [
        (["--name", "DiT-custom/4-4E2A", "--router", "topk"], 1e-5),
        (["--name", "DiT-custom/4-4E2A", "--router", "topk", "--method", "cluster"], 1e-5),
        (["--name", "DiT-custom/4-8E4A", "--router", "topk", "model.moe.every=2"], 1e-5),
        (
            ["--name", "DiT-custom/4-4E1A", "--router", "topk", "--method", "copy"],
            0.3,
        ),  # with noise, gates do not sum to 1
        (["--name", "DiT-custom/4-4E2A"], 0.3),  # the threshold cuts some groups
        (["--name", "DiT-custom/4-4E2A", "--router", "expert_choice"], 0.9),
    ],
    ids=str,
)
def test_a_model_with_experts_starts_near_the_dense_one_and_the_command_says_how_near(
    dense, tmp_path, capsys, words, most
):
    report = upcycled(capsys, dense, tmp_path / "out", *words)
    assert report["output_difference"] <= most
    assert report["heldout_loss"] == pytest.approx(report["heldout_loss_of_source"], rel=most)
    assert report["active_experts"] == pytest.approx(int(words[1][-2]), rel=0.1)


def test_with_all_experts_active_it_gives_what_the_dense_model_gives(dense, tmp_path, capsys):
    upcycled(capsys, dense, tmp_path / "out", "--name", "DiT-custom/4-4E2A")
    before, after = load(dense), load(tmp_path / "out")
    x, t, y = torch.randn(4, 1, 8, 8), torch.rand(4), torch.arange(4)
    for router in routers_of(after.model):
        router.override = LARGEST_U
    with torch.no_grad(), measure_active(after.model) as active:
        wanted, given = before.model(x, t, y), after.model(x, t, y)
    assert active.mean == 4
    assert (given - wanted).norm() <= 1e-5 * wanted.norm()


def test_a_run_starts_from_it_with_its_thresholds(dense, tmp_path, capsys):
    start = tmp_path / "start"
    upcycled(capsys, dense, start, "--name", "DiT-custom/4-4E2A")
    words = ["--run", tmp_path / "run", "train.steps=2", "train.checkpoint_every=1", "train.keep_checkpoints=2"]
    assert cli("train", start / "config.yaml", f"train.init_from={start}", *words) == 0
    assert "starts from" in capsys.readouterr().err
    assert cli("sample", start, "--out", tmp_path / "samples") == 0


@pytest.mark.parametrize("name", ["DiT-custom/4-8E4A", "DiT-custom/4-8E2A", "DiT-custom/4-2E2A"])
def test_experts_become_more_or_fewer(finished_run, tmp_path, capsys, name):
    report = upcycled(capsys, finished_run, tmp_path / "out", "--name", name)
    assert report["heldout_loss"] == pytest.approx(report["heldout_loss_of_source"], rel=0.1)


def test_the_router_follows_where_as_many_experts_are_parts_of_fewer(finished_run, tmp_path, capsys):
    hidden = load(finished_run).config.model.expert_hidden
    upcycled(capsys, finished_run, tmp_path / "out", f"model.moe.expert_hidden={hidden // 2}")
    old, new = (checkpoint.open_checkpoint(run).weights("ema") for run in (finished_run, tmp_path / "out"))
    for block in range(2):
        rows_ED, experts_EDF = (new[f"blocks.{block}.moe.{part}"] for part in ("router.weight", "experts.w_in"))
        parents = [
            next(i for i, w_in in enumerate(old[f"blocks.{block}.moe.experts.w_in"]) if torch.isin(part, w_in).all())
            for part in experts_EDF
        ]
        assert len(set(parents)) == 2  # the most used of four, in two parts each
        wanted_ED = old[f"blocks.{block}.moe.router.weight"][parents]
        assert torch.equal(rows_ED, wanted_ED)  # which a token's two experts share: its router chose one parent


def test_a_model_keeps_its_experts_where_only_the_data_are_others(finished_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Digits, "class_names", tuple("987654321a"))
    report = upcycled(capsys, finished_run, tmp_path / "out", "data.size=16")
    assert report["output_difference"] == 0  # to the run with other classes and of another size
    old, new = (checkpoint.open_checkpoint(run).weights("ema") for run in (finished_run, tmp_path / "out"))
    table, places = "y_embedder.embedding_table.weight", "pos_embed"
    assert torch.equal(new[table][[*range(9), -1]], old[table][[*range(9, 0, -1), -1]])  # by name, and the null class
    assert not torch.equal(new[table][9], old[table][0])
    assert new[places].shape == (1, 16, 32)
    corners = new[places].unflatten(1, (4, 4))[:, ::3, ::3].flatten(1, 2)
    assert (corners - old[places]).norm() < 0.5 * old[places].norm()
    assert {name for name in old if not torch.equal(old[name], new[name])} == {table, places}


@pytest.mark.parametrize(("change", "kept"), [("train.batch_size=4", True), ("data.size=16", False)])
def test_the_extractor_goes_along_where_the_images_are_those_that_it_learned_from(finished_run, tmp_path, change, kept):
    shutil.copytree(finished_run, tmp_path / "run")
    (tmp_path / "run" / "extractor").mkdir()
    assert cli("upcycle", tmp_path / "run", "--out", tmp_path / "out", change) == 0
    assert (tmp_path / "out" / "extractor").exists() == kept


def test_both_models_are_compared_as_the_changes_say(dense, tmp_path, capsys, monkeypatch):
    task, scored = task_of(dense), []
    whole = task.heldout_loss
    monkeypatch.setattr(task, "heldout_loss", lambda run, how: scored.append(run.experiment) or whole(run, how))
    upcycled(capsys, dense, tmp_path / "out", "--name", "DiT-custom/4-4E2A", "objective.label_dropout=0.3")
    assert [experiment.objective.label_dropout for experiment in scored] == [0.3, 0.3]
    assert [experiment.model.moe is None for experiment in scored] == [False, True]


def test_a_language_model_gets_finer_experts(finished_text, tmp_path, capsys):
    name = load(finished_text / "run").config.model.name.replace("4E2A", "8E4A")
    report = upcycled(capsys, finished_text / "run", tmp_path / "out", "--name", name)
    assert report["heldout_loss"] == pytest.approx(report["heldout_loss_of_source"], rel=0.05)
    assert cli("sample", tmp_path / "out", "max_new_tokens=2") == 0


@pytest.mark.parametrize(
    "words, told",
    [
        (["--name", "DiT-custom/4-4E3A"], "model.moe.expert_hidden=40 does not divide the 128 hidden units"),
        (["--name", "DiT-custom/4-5E2A"], "model.moe.experts=5 is no multiple of the 2 experts that a feed-forward"),
        (["--name", "DiT-custom/4-4E2A", "model.width=64"], "model.width=64 differs from the run's 32; only experts"),
        (["--name", "DiT-custom/4-4E2A", "sample.weights=model"], "sample.weights=model: the run will hold one set"),
        (["--name", "DiT-custom/4-4E2A", "model.moe.bias=false"], "model.moe.bias=False drops the biases"),
        (["--name", "DiT-custom/4-4E2A", "model.moe.activation=swiglu"], "model.moe.activation=swiglu is not that of"),
        (
            ["--name", "DiT-custom/4-4E2A", "--method", "copy", "model.moe.expert_hidden=64"],
            "--method=copy makes experts",
        ),
        (["--noise", "-1"], "--noise=-1 must be a finite number from 0 on"),
        (["--noise", "nan"], "--noise=nan must be a finite number from 0 on"),
    ],
    ids=str,
)
def test_what_cannot_be_exact_is_refused_with_the_reason(dense, tmp_path, capsys, words, told):
    capsys.readouterr()
    assert cli("upcycle", dense, "--out", tmp_path / "out", *words) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_experts_do_not_become_a_dense_feed_forward(finished_run, tmp_path, capsys):
    capsys.readouterr()
    assert cli("upcycle", finished_run, "model.moe.every=2", "--out", tmp_path / "out") == 2
    assert "model.moe.every=2 leaves block 1 without experts" in capsys.readouterr().err
