import dataclasses

import pytest

from dit_moe import config
from dit_moe.config import ConfigError
from dit_moe.training import TrainConfig
from dit_moe.training.config import FREE, RECORDED
from dit_moe.training.run_start import require_same_run


def test_the_smallest_run_is_allowed():
    TrainConfig(steps=1, batch_size=1, micro_batch=1, checkpoint_every=1, keep_checkpoints=1, log_every=1)


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("steps", 0, "steps=0 must be at least 1"),
        ("batch_size", -1, "batch_size=-1 must be at least 1"),
        ("micro_batch", 0, "micro_batch=0 must be at least 1, or null"),
        ("init_from", "", "init_from= is empty; name a run, or null for none"),
        ("lr", 0.0, "lr=0.0 must be above 0"),
        ("betas", [0.9], r"betas=\(0.9,\) must be two numbers in \[0, 1\)"),
        ("betas", [0.9, 1.0], r"betas=\(0.9, 1.0\) must be two numbers"),
        ("warmup_steps", -1, "warmup_steps=-1 must be at least 0"),
        ("min_lr_ratio", 1.5, r"min_lr_ratio=1.5 must lie in \[0, 1\]"),
        ("ema_decay", 1.0, r"ema_decay=1.0 must lie in \[0, 1\)"),
        ("grad_clip", 0.0, "grad_clip=0.0 must be above 0, or null for none"),
        ("schedule", "linear", "schedule=linear is not one of constant, cosine"),
        ("mixed_precision", "fp16", "mixed_precision=fp16 is not one of auto, fp32, bf16"),
        ("parallel", "fsdp", "parallel=fsdp is not one of ddp, fsdp2"),
        ("trackers", ["comet"], r"trackers\[0\]=comet is not one of tensorboard, wandb, trackio"),
        ("learning_rate", 1.0, "learning_rate is not a known key"),
    ],
)
def test_bad_values_name_the_path_the_value_and_what_is_wanted(field, value, wanted):
    with pytest.raises(ConfigError, match=rf"^train\.{wanted}"):
        config.build(TrainConfig, {field: value}, "train")


def test_free_fields_exist_and_a_resume_may_change_just_them_and_sampling(tmp_path):
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    resolved = {"batch_size", "mixed_precision", "init_from"}
    assert {"steps", "micro_batch", "workers", "parallel"} <= set(FREE) <= names - resolved - set(RECORDED)
    assert set(RECORDED) == {"lr", "warmup_steps", "grad_clip"}
    old = {"train": dict.fromkeys(names, 1), "sample": {"steps": 1}, "eval": {"n": 1}, "model": {"moe": None}}
    new = {"train": dict.fromkeys(names, 1) | dict.fromkeys(FREE, 2), "sample": {"steps": 9}, "eval": {}}
    assert require_same_run(old, new | {"model": {"moe": None, "recompute": True}, "tokenize": {}}, tmp_path) == {}
    with pytest.raises(ConfigError, match=r"^model.moe={'experts': 4} differs from the run in .*, which has None; "):
        require_same_run(old, new | {"model": {"moe": {"experts": 4}}}, tmp_path)
    routers = [{"model": {"router": {"name": name, **own}}} for name, own in (("dtopp", {"drn": 1}), ("topk", {}))]
    with pytest.raises(ConfigError, match=r"^model.router.name=topk differs from .*, which has dtopp; take that"):
        require_same_run(*routers, tmp_path)
    for name in names - set(FREE):
        changed = old | {"train": old["train"] | {name: 2}}
        if name in RECORDED:
            assert require_same_run(old, changed, tmp_path) == {f"train.{name}": (1, 2)}
            continue
        with pytest.raises(ConfigError, match=rf"^train\.{name}=2 differs") as caught:
            require_same_run(old, changed, tmp_path)
        offered = f"begin a run from its averaged weights with train.init_from={tmp_path} --run {tmp_path}-2"
        assert str(caught.value).endswith(offered) == (name != "init_from")


SECTIONS = {
    "data": {
        "name": "image_folder",
        "path": "a",
        "heldout": "b",
        "flip": True,
        "fingerprint": "1",
        "skip_broken": None,  # as of runs from before there was this option
        "allow_empty": None,
    },
    "first_stage": {"model": "a", "subfolder": "b", "tiling": False, "slicing": False, "scale": 2.0, "sha256": "1"},
    "encode": {"images": {"path": "a"}},
}


def change(section, key, value="another"):
    return SECTIONS | {section: SECTIONS[section] | {key: value}}


@pytest.mark.parametrize(
    "key", ["path", "heldout", "skip_broken", "allow_empty", "model", "subfolder", "tiling", "slicing"]
)
def test_where_data_and_autoencoder_lie_may_change_once_they_are_identified(tmp_path, key):
    section, identity = ("data", "fingerprint") if key in SECTIONS["data"] else ("first_stage", "sha256")
    require_same_run(SECTIONS, change(section, key), tmp_path)
    unknown = change(section, identity, None)
    with pytest.raises(ConfigError, match=rf"^{section}\.{key}=another differs from the run in "):
        require_same_run(unknown, unknown | {section: unknown[section] | {key: "another"}}, tmp_path)


@pytest.mark.parametrize(("section", "key"), [("data", "fingerprint"), ("first_stage", "sha256")])
def test_other_data_and_another_autoencoder_are_another_run_wherever_they_lie(tmp_path, section, key):
    moved = change(section, "path" if section == "data" else "model")
    for new in (change(section, key), moved | {section: moved[section] | {key: None}}):
        with pytest.raises(
            ConfigError, match=rf"^{section}\.{key}=.* is of other content than the run in .*; restore it"
        ):
            require_same_run(SECTIONS, new, tmp_path)


@pytest.mark.parametrize(("section", "key"), [("data", "flip"), ("data", "name"), ("first_stage", "scale")])
def test_what_identification_does_not_cover_may_not_change(tmp_path, section, key):
    with pytest.raises(ConfigError, match=rf"^{section}\.{key}=another differs"):
        require_same_run(SECTIONS, change(section, key), tmp_path)


def test_what_was_encoded_from_where_may_change(tmp_path):
    require_same_run(SECTIONS, change("encode", "images"), tmp_path)
