"""What the options of `dit-moe eval` mean, and how those without sense are refused."""

import pytest

from dit_moe import cli
from dit_moe.cli import evaluate
from dit_moe.evaluation.options import EvalOptions, extractor_config, metric_configs
from dit_moe.experiments.run import sampling_changes
from dit_moe.extractors.digits_cnn import DigitsCNNConfig
from dit_moe.extractors.function import FunctionConfig
from dit_moe.extractors.inception import InceptionConfig
from dit_moe.metrics import METRICS


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
        names(text)


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
        ("my.features:f", FunctionConfig(path="my.features:f")),
        ("{name: function, path: 'my.features:f'}", FunctionConfig(path="my.features:f")),
    ],
)
def test_an_extractor_is_a_name_a_section_or_a_function(text, config):
    assert extractor_config(EvalOptions(extractor=text), DigitsCNNConfig()) == config


@pytest.mark.parametrize(
    "text, message",
    [
        ("{name: inception", r"is not valid YAML .*a closing } is missing\? wanted --extractor '\{name: inception"),
        ("{name: '${oc.env:HOME}'}", r"name=\$\{oc\.env:HOME\}: unknown"),
        ("{verify: true}", r"has no name; wanted --extractor '\{name: inception"),
        ("{name: incepton}", r"--extractor \{name: incepton\}: .*did you mean 'inception'"),
        ("{name: inception, verfy: true}", r"verfy is not a known key; did you mean 'verify'"),
        ("", "--extractor  is no extractor"),
        ("incepton", "incepton is no extractor; did you mean 'inception'.*or --extractor package.module:function"),
        ("myext.f", "myext.f is no extractor; if it is a function, write myext:f"),
        ("function", "function: of which.* write --extractor package.module:function"),
        ("my ext:f", "my ext:f is no function of a module; write --extractor package.module:function"),
    ],
)
def test_what_is_no_extractor_is_refused_in_one_line_with_what_is_wanted(text, message):
    with pytest.raises(ValueError, match=message) as error:
        extractor_config(EvalOptions(extractor=text), DigitsCNNConfig())
    assert "\n" not in str(error.value)


def test_function_is_not_among_the_names_that_the_help_lists(capsys):
    with pytest.raises(SystemExit):
        cli.main(["eval", "--help"])
    assert "feature space: digits_cnn64, dinov2, inception, {name: …" in " ".join(capsys.readouterr().out.split())


def test_words_may_come_after_options_and_a_range_may_begin_with_a_minus(monkeypatch):
    seen = []
    monkeypatch.setattr(evaluate, "run", seen.append)
    words = ["eval", "a.npz", "--metrics", "fd", "digits", "--range", "-1,1", "count=3", "{name: x, path: a=b}"]
    assert cli.main(words) == 0
    assert seen[0].words == ["a.npz", "digits", "count=3", "{name: x, path: a=b}"]
    assert seen[0].value_range == "-1,1"


def test_options_that_are_none_are_still_refused(monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "run", lambda args: pytest.fail("ran"))
    with pytest.raises(SystemExit):
        cli.main(["eval", "a.npz", "digits", "--metric-s", "fd"])
    assert "unrecognized arguments: --metric-s fd" in capsys.readouterr().err


def test_overrides_may_name_their_section_and_those_of_eval_are_options():
    assert sampling_changes(["sample.count=20", "seed=1", "first_stage.tiling=true"]) == [
        "count=20",
        "seed=1",
        "first_stage.tiling=true",
    ]
    for change, option in (
        ("eval.seeds=1", "--seeds 1"),
        ("eval.metrics=[fd]", "--metrics"),
        ("eval.images=9", "count=9"),
    ):
        with pytest.raises(ValueError, match=f"is no option of sampling; for dit-moe eval give {option}"):
            sampling_changes([change])
