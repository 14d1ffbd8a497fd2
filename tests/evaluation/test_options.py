"""What the options of `dit-moe eval` mean, and how those without sense are refused."""

import pytest

from dit_moe import cli
from dit_moe.cli import evaluate
from dit_moe.config import build, override
from dit_moe.evaluation.options import EvalOptions, extractor_config, metric_configs, read_changes, require_outputs
from dit_moe.experiments.image import EvalConfig
from dit_moe.experiments.run import sampling_changes
from dit_moe.extractors.digits_cnn import DigitsCNNConfig
from dit_moe.extractors.dinov2 import DINOv2Config
from dit_moe.extractors.function import FunctionConfig
from dit_moe.extractors.inception import InceptionConfig
from dit_moe.metrics import METRICS
from dit_moe.metrics.kid import KIDConfig


def names(metrics):
    return [METRICS.name_of(each) for each in metric_configs(EvalOptions(metrics=metrics), InceptionConfig(), None)]


def test_metrics_may_have_spaces_capitals_and_a_comma_too_many():
    assert names(" FID, kid ,") == ["fd", "kid"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "--metrics '' names none; give some of .*kid"),
        (" , ", "--metrics ' , ' names none"),
        ("fd,kit", "'kit' is no metric; did you mean 'kid'"),
    ],
)
def test_no_metrics_or_unknown_ones_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        EvalOptions(metrics=text)  # before an extractor is chosen, which may train one


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("seeds", 0, "--seeds 0 must be at least 1"),
        ("kid_subset_size", 0, "--kid-subset-size 0 must be at least 2"),
        ("size", 0, "--size 0 must be from 1 to 8192 pixels"),
        ("seeds", 10**9, "--seeds 1000000000 must be at least 1 and at most 10000"),
        ("workers", 100_000, "--workers 100000 must be from 0, to read in this process, to 1024"),
        ("channels", 2, "--channels 2"),
        ("value_range", "1", "--range 1 must be two numbers"),
        ("workers", -1, "--workers -1 must be from 0"),
        ("value_range", "1,0", "--range 1,0 is empty or infinite; .*--range=-1,1"),
    ],
)
def test_impossible_numbers_are_refused_naming_the_option(option, value, message):
    with pytest.raises(ValueError, match=message):
        EvalOptions(**{option: value})


@pytest.mark.parametrize(
    "text, config",
    [
        ("inception", InceptionConfig()),
        ("{name: inception, verify: false}", InceptionConfig(verify=False)),
        (" digits_cnn ", DigitsCNNConfig()),
        ("digits_cnn64", DigitsCNNConfig()),
        ("my.features:f", FunctionConfig(path="my.features:f")),
        ("{name: 'my.features:f', weights: w}", FunctionConfig(path="my.features:f", weights="w")),
        ("{name: function, path: 'my.features:f'}", FunctionConfig(path="my.features:f")),
    ],
)
def test_an_extractor_is_a_name_a_section_or_a_function_alike_in_a_config_and_behind_the_option(text, config):
    assert extractor_config(EvalOptions(extractor=text), DINOv2Config()) == config
    changed = override({"extractor": {"name": "dinov2", "weights": "x"}}, [f"extractor={text}"])
    assert build(EvalConfig, changed).extractor == config


@pytest.mark.parametrize(
    "text, message",
    [
        ("{name: inception", r"is not valid YAML .*a closing } is missing\? wanted --extractor '\{name: inception"),
        ("{name: '${oc.env:HOME}'}", r"name=\$\{oc\.env:HOME\}: it is neither a name"),
        ("{verify: true}", r"has no name; wanted --extractor '\{name: inception"),
        ("{name: incepton}", r"--extractor \{name: incepton\}: .*did you mean 'inception'"),
        ("{name: inception, verfy: true}", r"verfy is not a known key; did you mean 'verify'"),
        ("", "--extractor : unknown feature extractor ''"),
        (
            "incepton",
            "--extractor incepton: unknown .*; did you mean 'inception'.*or package.module:function of your own",
        ),
        ("myext.f", "myext.f: it is neither .*; if it is one, write myext:f"),
        ("function", "function: path is missing.*, or package.module:function"),
        ("my ext:f", "my ext:f: it is neither a name nor a function of a module"),
    ],
)
def test_what_is_no_extractor_is_refused_in_one_line_with_what_is_wanted(text, message):
    with pytest.raises(ValueError, match=message) as error:
        extractor_config(EvalOptions(extractor=text), DigitsCNNConfig())
    assert "\n" not in str(error.value)


def test_function_is_not_among_the_names_that_the_help_lists(capsys):
    with pytest.raises(SystemExit):
        cli.main(["eval", "--help"])
    assert "feature space: cifar10_cnn64, digits_cnn64, dinov2, inception, trained_cnn, {name: …" in " ".join(
        capsys.readouterr().out.split()
    )


def test_words_may_come_after_options_and_a_range_may_begin_with_a_minus(monkeypatch):
    seen = []
    monkeypatch.setattr(evaluate, "run", seen.append)
    words = ["eval", "a.npz", "--metrics", "fd", "digits", "--range", "-1,1", "count=3", "{name: x, path: a=b}"]
    assert cli.main(words) == 0
    assert seen[0].words == ["a.npz", "digits", "count=3", "{name: x, path: a=b}"]
    assert seen[0].value_range == "-1,1"


def test_overrides_may_name_their_section_and_those_of_eval_are_options():
    assert sampling_changes(["sample.count=20", "seed=1", "first_stage.tiling=true"]) == [
        "count=20",
        "seed=1",
        "first_stage.tiling=true",
    ]
    with pytest.raises(ValueError, match=r"^eval.seeds=1 is no option of sampling; dit-moe train, quickstart and eval"):
        sampling_changes(["eval.seeds=1"])


def test_changes_to_the_section_eval_say_what_the_options_say():
    changes = ["seed=2", "eval.seeds=1", "eval.metrics=[fd, kid]", "eval.images=9", "eval.extractor=digits_cnn"]
    names, left, options = read_changes(["run"], [*changes, "eval.reference=a.npz"], EvalOptions())
    assert (names, left) == (["run", "a.npz"], ["seed=2", "count=9"])
    assert options == EvalOptions(seeds=1, metrics="fd,kid", extractor="digits_cnn")
    _, _, options = read_changes(["run"], ["eval.metrics=[fid, {name: kid, subset_size: 50}]"], EvalOptions())
    assert metric_configs(options, InceptionConfig(), None) == [METRICS.config_class("fd")(), KIDConfig(subset_size=50)]
    with pytest.raises(ValueError, match=r"^eval.metrics.*siz"):
        read_changes(["run"], ["eval.metrics=[{name: kid, siz: 50}]"], EvalOptions())
    for change in ("eval.reference=null", "eval.extractor=null", "eval.seedz=null"):
        with pytest.raises(ValueError, match=f"^{change} has no option that says it; give the value that is wanted"):
            read_changes(["run"], [change], EvalOptions())
    for change in ("eval.seeds=x", "eval.light_every=3"):
        with pytest.raises(ValueError, match=f"^{change} is no option of an evaluation"):
            read_changes(["run"], [change], EvalOptions())
    with pytest.raises(ValueError, match=r"^eval.seeds=1 and --seeds 2: give one of them"):
        read_changes(["run"], ["eval.seeds=1"], EvalOptions(seeds=2))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["eval", "a.npz", "digits", "--metric-s", "fd"], "--metric-s fd"),
        (["eval", "runs/x", "--seed", "3"], "--seed 3; write seed=3"),
        (["sample", "runs/x", "--count", "4"], "--count 4; write count=4"),
        (["sample", "runs/x", "-n", "4"], "-n 4; write count=4"),
        (["sample", "runs/x", "--labels=cat"], "--labels=cat; write labels=cat"),
        (["sample", "runs/x", "--steps", "50"], "--steps 50; write sampler.steps=50"),
        (["train", "digits", "--steps", "50"], "--steps 50; write train.steps=50"),
        (["train", "digits", "--train.lr", "1"], "--train.lr 1; write train.lr=1"),
        (["train", "digits", "--batch-size", "8"], "write encode.batch_size=8 or train.batch_size=8 or sample.b"),
        (["routing", "runs/x", "--batch-size", "8"], "--batch-size 8; write batch_size=8"),
        (["compare", "digits", "--extractor", "dinov2"], "--extractor dinov2; write eval.extractor=dinov2"),
        (["perplexity", "runs/x", "--target", "3"], "--target 3; write target=3"),
    ],
)
def test_an_option_that_is_none_is_refused_and_a_key_of_the_config_is_told_as_one(capsys, words, told):
    with pytest.raises(SystemExit):
        cli.main(words)
    said = capsys.readouterr().err
    assert "error: unrecognized arguments: " in said and told in said


def test_an_interrupted_evaluation_goes_on_with_the_features_it_left_and_no_others(tmp_path):
    options = EvalOptions(out=tmp_path / "metrics.json")
    for name in ("reference", "heldout", "noise", "reconstruction", "samples_0"):
        (tmp_path / "metrics.features" / name).mkdir(parents=True)
        require_outputs(options, [])
    (tmp_path / "metrics.features" / "photos").mkdir()
    with pytest.raises(ValueError, match="holds photos, which is no folder of features; name another folder"):
        require_outputs(options, [])
