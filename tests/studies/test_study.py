"""The file of a study: what is read, what is refused, what its runs are."""

import re
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest

from dit_moe import built_in
from dit_moe.config import ConfigError
from dit_moe.studies.plan import plan
from dit_moe.studies.study import experiment_tree, find_study, load_study, require_taken
from dit_moe.tasks.train import resolve_for_dry_run
from tests.data.examples import class_files, encoded, write_tree

CONFIGS = built_in.FOLDER

STUDIES = CONFIGS / "studies"


def write(folder, **changes):
    lines = {
        "title": "A study",
        "config": str(CONFIGS / "digits.yaml"),
        "baseline": "topk",
        "changes": "[train.steps=7]",
        "variants": "[{name: topk, changes: [model.moe.router=topk]}, {name: dtopp, label: DTop-p}]",
    }
    path = folder / "study.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in (lines | changes).items() if value is not None))
    return path


def test_a_run_is_the_studys_config_its_changes_the_variants_and_a_seed_in_this_order(tmp_path):
    path = write(tmp_path, variants="[{name: topk, changes: [model.moe.router=topk, train.steps=9]}]")
    study = load_study(path, ["train.lr=0.5", "seeds=[4]"])
    tree = experiment_tree(study, study.variants[0], 4, tmp_path)
    assert study.seeds == (4,) and study.changes == ("train.steps=7", "train.lr=0.5")
    assert tree["train"]["steps"] == 9 and tree["train"]["lr"] == 0.5 and tree["seed"] == 4
    assert tree["model"]["moe"]["router"] == "topk"
    assert load_study(write(tmp_path, changes="")).changes == ()


@pytest.mark.parametrize(
    ("own", "change", "undone"),
    [
        ("train.steps=9", "train.steps=3", True),
        ("model.moe.router=topk", "model.moe.router.balance_loss=0.5", True),  # another entry drops the option
        ("model.moe.router=topk", "model.moe.router=topp", True),
        ("train.steps=9", "train.steps=9", False),
        ("train.steps=9", "train.lr=0.5", False),
        ("train.steps=9", "seeds=[4]", False),
        ("model.moe.router=topk", "model.moe.router.drn=false", False),  # which top-k does not have
    ],
)
def test_a_change_for_all_variants_is_refused_where_a_variants_own_undo_it(tmp_path, own, change, undone):
    study = load_study(write(tmp_path, variants=f"[{{name: topk, changes: [{own}]}}, {{name: other}}]"), [change])
    said = f"variant topk: {change} is for all variants, and the variant's own `changes` undo it: {own}"
    with pytest.raises(ConfigError, match=re.escape(said)) if undone else nullcontext():
        require_taken(study, [change], tmp_path)


@pytest.mark.parametrize(
    ("own", "undone"),
    [
        ("model.moe.router=topk", True),
        ("model.moe.router.name=topk", False),  # which keeps the options
        ("model.moe.router=topk, model.moe.router.balance_loss=0.1", False),  # its own
    ],
)
@pytest.mark.parametrize("in_config", [True, False])
def test_options_of_all_variants_that_are_lost_where_a_variant_names_another_router_are_refused(
    tmp_path, own, undone, in_config
):
    config, changes = "{base: %s, model: {moe: {router: {balance_loss: 0.5}}}}", "[model.moe.router.balance_loss=0.5]"
    (tmp_path / "own.yaml").write_text(config % (CONFIGS / "digits.yaml"))
    variants = f"[{{name: topk, changes: [{own}]}}, {{name: other}}]"
    path = write(tmp_path, variants=variants, **({"config": "own.yaml"} if in_config else {"changes": changes}))
    said = "variant topk: model.moe.router.balance_loss=0.5 is for all variants, and the variant's own"
    with pytest.raises(ConfigError, match=re.escape(said)) if undone else nullcontext():
        require_taken(load_study(path), [], tmp_path)


def test_a_variant_may_have_a_config_of_its_own_named_relative_to_the_study(tmp_path):
    (tmp_path / "other.yaml").write_text(f"base: {CONFIGS / 'digits_dense.yaml'}\n")
    study = load_study(write(tmp_path, variants="[{name: topk, config: other.yaml}]"))
    assert experiment_tree(study, study.variants[0], 0, tmp_path)["model"]["name"] == "DiT-custom/2"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"variants": "[]"}, "variants=.* is empty"),
        ({"variants": "[{name: topk}, {name: topk}]"}, "two called topk"),
        ({"variants": "[{name: a/b}]"}, r"variants\[0\]\.name=a/b must be letters"),
        ({"variants": "[{name: topk, baseline: topp}]"}, r"variants\[0\]\.baseline=topp is no variant; .*topk"),
        ({"variants": "[{name: topk, changes: [seed=3]}]"}, "sets the seed; list it in `seeds`"),
        ({"baseline": "dense"}, "baseline=dense is no variant"),
        ({"seeds": "[]"}, "seeds=.* is empty"),
        ({"seeds": "[1, 1]"}, "seeds=.* has one twice"),
        ({"seeds": "[-1]"}, "seeds=.* must be whole numbers from 0"),
        ({"timing_steps": "-1"}, "timing_steps=-1 must be at least 0"),
        ({"heldout": "{draws: 0}"}, "heldout.draws=0 must be at least 1"),
        ({"variant": "[]"}, "variant is not a known key; did you mean 'variants'"),
        ({"title": None}, "title is missing"),
    ],
)
def test_mistakes_in_it_are_one_line_that_names_the_key(tmp_path, changes, said):
    with pytest.raises(ConfigError, match=said):
        load_study(write(tmp_path, **changes))


@pytest.mark.parametrize(
    ("variants", "said"),
    [
        ("[{name: topk, config: gone.yaml}]", "variant topk: .*gone.yaml does not exist"),
        ("[{name: topk, changes: [model.moe.router=topq]}]", "variant topk: model.moe.router.name=topq"),
        ("[{name: topk, changes: [train.step=3]}]", "variant topk: train.step is not a known key"),
        (
            "[{name: topk}, {name: d, changes: [objective.time=uniform]}]",
            "variant d: objective.time=uniform, but its baseline topk has logit_normal",
        ),
        ("[{name: topk}, {name: d, changes: [data.size=16]}]", "variant d: data.size=16, but its baseline topk has 8"),
    ],
)
def test_mistakes_in_a_variant_are_found_before_any_work_and_name_it(tmp_path, variants, said):
    study = load_study(write(tmp_path, variants=variants))
    with pytest.raises(ConfigError, match=said):
        plan(study, tmp_path, tmp_path / "out")


def test_variants_may_differ_in_what_their_scores_do_not_depend_on(tmp_path):
    changes = "[objective.label_dropout=0.2, train.lr=0.1, eval.seeds=1, sample.weights=model]"
    study = load_study(write(tmp_path, variants=f"[{{name: topk}}, {{name: other, changes: {changes}}}]"))
    assert len(plan(study, tmp_path, tmp_path / "out")) == 6
    judged = replace(study, metric="fd_digits_cnn64.ratio")
    with pytest.raises(ConfigError, match=r"variant other: eval\.seeds=1, but its baseline topk has 3"):
        plan(judged, tmp_path, tmp_path / "out")


def test_a_study_inherits_from_no_other_as_files_would_be_looked_for_beside_the_wrong_one(tmp_path):
    path = write(tmp_path)
    outer = tmp_path / "outer.yaml"
    outer.write_text(f"base: {path.name}\n")
    with pytest.raises(ConfigError, match=r"outer.yaml: base is for configs, and this is a study"):
        load_study(outer)


def test_an_unknown_study_is_told_apart_from_the_built_in_ones():
    with pytest.raises(ConfigError, match="name a file or a built-in study: did you mean 'digits'"):
        find_study("digit")
    assert find_study("digits") == STUDIES / "digits.yaml"


def ten_classes():
    """As CIFAR-10 has, and images of its size."""
    pixels = np.random.default_rng(0).integers(0, 256, (10, 20, 32, 32, 3), np.uint8)
    return {f"{label}/{i:02d}.png": encoded(pixels[label, i]) for label in range(10) for i in range(20)}


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_built_in_studies_have_variants_that_can_be_built_at_equal_active_compute(path, tmp_path):
    of_folder = {"my_images": class_files(20), "cifar10": ten_classes()}.get(path.stem, {})
    images = write_tree(tmp_path / "images", of_folder)
    study = load_study(path, [f"data.path={images}"] if of_folder else [])
    runs = plan(study, path.parent, tmp_path, resolved=resolve_for_dry_run)
    assert len(runs) == sum(len(study.seeds_of(variant)) for variant in study.variants)
    by_name = {run.variant.name: run.experiment.model.footprint() for run in runs}
    for variant in study.variants:
        own, other = by_name[variant.name], by_name[study.baseline_of(variant)]
        # Some routers are networks of their own, which the table's FLOPs show.
        most = 0.1 if variant.name in ("diffmoe", "expert_race") else 0.02
        assert own.forward_flops == pytest.approx(other.forward_flops, rel=most), variant.name


def test_runs_are_planned_seed_by_seed_so_that_every_variant_is_there_once_first(tmp_path):
    study = load_study(write(tmp_path, seeds="[3, 5]"))
    runs = plan(study, tmp_path, tmp_path / "out")
    assert [run.name for run in runs] == ["topk/3", "dtopp/3", "topk/5", "dtopp/5"]
    assert [run.experiment.seed for run in runs] == [3, 3, 5, 5]
    assert runs[2].folder == tmp_path / "out" / "topk" / "seed-5"
    assert [run.name for run in plan(study, tmp_path, tmp_path / "out", only="dtopp/5")] == ["dtopp/5"]
    for wrong in ("dtopp", "dtopp/4", "topp/5"):
        with pytest.raises(ConfigError, match=re.escape(wrong.partition("/")[0])):
            plan(study, tmp_path, tmp_path / "out", only=wrong)
