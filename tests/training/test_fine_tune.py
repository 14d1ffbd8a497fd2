import json
import shutil

import pytest
import torch

from dit_moe import checkpoint
from dit_moe.config import ConfigError
from dit_moe.moe import routers_of
from dit_moe.moe.routing import threshold_u
from dit_moe.training import open_start
from dit_moe.training.run_start import keep_thresholds, load_start
from tests.training.tiny_run import DIGITS, OTHER_CLASSES, log

TABLE = "y_embedder.embedding_table.weight"
WITH_LABELS = pytest.mark.parametrize("family", ["DiT"], indirect=True)


@WITH_LABELS
@pytest.mark.parametrize("classes, kept", [(OTHER_CLASSES, 3), (DIGITS[::-1], 10)], ids=["others", "another order"])
def test_rows_go_by_name_new_classes_stay_fresh_and_the_null_class_is_kept(build, unbroken, tmp_path, classes, kept):
    trainer = build(tmp_path, classes=classes, init_from=str(unbroken))
    fresh = checkpoint.state_of(trainer.model)[TABLE].clone()
    old = checkpoint.open_checkpoint(unbroken).weights("ema")[TABLE]
    said = load_start(trainer.model, trainer.ema.module, trainer.start, classes)
    new = len(classes) - kept
    assert said.endswith(
        f"step_00000020; label table rebuilt: {kept} of {len(classes)} classes kept by number, {new} new"
    )
    for module in (trainer.model, trainer.ema.module):
        table = checkpoint.state_of(module)[TABLE]
        for row, name in enumerate(classes):
            assert torch.equal(table[row], old[int(name)] if name in DIGITS else fresh[row])
        assert torch.equal(table[-1], old[-1])


def test_everything_else_is_the_average_of_the_run_it_comes_from(build, unbroken, tmp_path):
    weights = checkpoint.open_checkpoint(unbroken).weights("ema")
    for classes in (DIGITS, OTHER_CLASSES):
        trainer = build(tmp_path, classes=classes, init_from=str(unbroken))
        said = load_start(trainer.model, trainer.ema.module, trainer.start, classes)
        for module in (trainer.model, trainer.ema.module):
            state = checkpoint.state_of(module)
            differ = {name for name in state if not torch.equal(state[name], weights.get(name))}
            assert differ == ({TABLE} & state.keys() if classes != DIGITS else set())
        assert ("rebuilt" in said) == (classes != DIGITS and TABLE in state)


def test_a_run_starts_from_it_says_so_and_keeps_its_own_length(build, unbroken, tmp_path, capsys):
    build(tmp_path, steps=5, classes=OTHER_CLASSES, init_from=str(unbroken)).train()
    said = capsys.readouterr().err
    tables = TABLE in checkpoint.open_checkpoint(tmp_path).weights("model")
    assert said.count("starts from ") == 1
    assert said.count("label table rebuilt: 3 of 11 classes kept by number, 8 new") == tables
    state = checkpoint.open_checkpoint(tmp_path).state
    assert (state["step"], state["class_names"]) == (5, list(OTHER_CLASSES))
    assert log(tmp_path)[0]["loss"] < log(unbroken)[0]["loss"]


def test_a_resumed_run_ignores_it_and_says_nothing(build, unbroken, tmp_path, capsys):
    gone = shutil.copytree(unbroken, tmp_path / "gone")
    build(tmp_path / "run", steps=5, init_from=str(gone)).train()
    shutil.rmtree(gone)
    capsys.readouterr()
    build(tmp_path / "run", steps=10, init_from=str(gone)).train()
    assert "starts from" not in capsys.readouterr().err
    assert checkpoint.open_checkpoint(tmp_path / "run").step == 10
    with pytest.raises(ConfigError, match=r"^train.init_from=None differs from the run in "):
        build(tmp_path / "run", steps=15).train()


def test_a_missing_start_is_refused(build, tmp_path):
    trainer = build(tmp_path / "run")
    with pytest.raises(ValueError, match=r"nowhere does not exist; name a run folder"):
        build(tmp_path / "run", init_from=str(tmp_path / "nowhere"))
    assert open_start(trainer.config, tmp_path / "run") is None


@pytest.mark.parametrize("classes", [DIGITS, OTHER_CLASSES])
def test_another_architecture_is_refused_with_the_keys_that_do_not_fit(build, unbroken, tmp_path, classes):
    trainer = build(tmp_path, classes=classes, width=48, init_from=str(unbroken))
    wanted = r"step_00000020 holds another architecture \(of another shape: .* \[\d+, .*\] .* and \d\d more\)"
    with pytest.raises(ValueError, match=wanted):
        trainer.train()


@WITH_LABELS
def test_a_start_that_names_no_classes_is_refused(build, unbroken, tmp_path):
    old = shutil.copytree(unbroken, tmp_path / "old")
    path = checkpoint.latest(old) / "state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in state.items() if key != "class_names"}))
    with pytest.raises(ValueError, match="step_00000020 has no class names to find labels by; start from another run"):
        build(tmp_path / "run", init_from=str(old)).train()


@pytest.mark.parametrize(
    ("before", "now", "given", "solves"),
    [(None, None, False, False), (0.6, 0.6, False, False), (0.6, None, False, True), (None, 0.6, True, False)],
    ids=["same routers", "same routers with p0", "others that leave it open", "others with p0"],
)
def test_thresholds_come_along_where_the_routers_are_the_same(
    build, unbroken, tmp_path, monkeypatch, before, now, given, solves
):
    if before is not None:
        build(tmp_path / "old", steps=3, p0=before).train()
    old = tmp_path / "old" if before is not None else unbroken
    trainer = build(tmp_path / "new", steps=1, p0=now, init_from=str(old))
    solved, begun = [], []
    start = trainer.prefetcher.start

    def spy(*args):
        begun.append(routers_of(trainer.model)[0].controller.u.item())
        start(*args)

    monkeypatch.setattr(trainer.prefetcher, "start", spy)
    monkeypatch.setattr("dit_moe.training.step.calibrate", lambda *args, **kwargs: solved.append(True))
    trainer.train()
    weights = checkpoint.open_checkpoint(old).weights("ema")
    came_along = next(value.item() for name, value in weights.items() if name.endswith("controller.u"))
    assert begun == [pytest.approx(threshold_u(0.6)) if given else came_along]
    assert solved == ([True] if solves else [])


@pytest.mark.parametrize(
    ("option", "value", "come_along"),
    [("implementation", "grouped", True), ("recompute", True, True), ("target", 3, False)],
)
def test_thresholds_come_along_however_the_experts_are_computed(option, value, come_along):
    before, now = ({"model": {"moe": {"experts": 8, "target": 2, **own}}} for own in ({}, {option: value}))
    assert keep_thresholds(torch.nn.Identity(), before, now) == come_along
