"""What a run is said to cost, against what arithmetic says."""

import argparse
import re

import pytest

from dit_moe.config import ConfigError, build
from dit_moe.costs import GIB, GPUS, activation_bytes, add_cost_arguments, describe, memory, training_flops
from dit_moe.experiments.image import Experiment, load_experiment, resolve_model


def experiment(name: str = "DiT-XL/2", **sections) -> Experiment:
    tree = {
        "model": {"name": name, "in_channels": 4, "input_size": 32, "num_classes": 1000},
        "objective": "ddpm",
        "data": "digits",
        **sections,
    }
    return resolve_model(build(Experiment, tree))


def numbers(text: str, line: str) -> dict[str, float]:
    """The numbers of the line of `text` that begins with `line`, by the word before each."""
    found = next(each for each in text.splitlines() if each.startswith(f"# {line}"))
    return {word: float(number) for word, number in re.findall(r"([A-Za-z]+) ([\d.]+)", found)}


def test_weights_gradients_moments_and_average_are_five_times_the_parameters_in_fp32():
    whole = 4 * experiment().model.footprint().total_params
    held = memory(experiment(), "bf16", gpus=1, rows=8)
    assert held.pop("activations") == activation_bytes(experiment().model, 8, "bf16")
    assert held == {"weights": whole, "gradients": whole, "AdamW": 2 * whole, "EMA": whole}
    assert memory(experiment(), "bf16", gpus=8, rows=8)["weights"] == whole


def test_fsdp2_shares_them_out_unless_micro_batches_add_up_gradients():
    whole = 4 * experiment().model.footprint().total_params
    sharded = experiment(train={"parallel": "fsdp2"})
    held = memory(sharded, "bf16", gpus=8, rows=32)
    for part, times in {"weights": 1, "gradients": 1, "AdamW": 2, "EMA": 1}.items():
        assert held[part] == times * whole / 8
    assert memory(sharded, "bf16", gpus=8, rows=16)["gradients"] == whole
    assert memory(sharded, "bf16", gpus=1, rows=256)["weights"] == whole


def test_hours_are_the_training_flops_over_what_the_gpus_do():
    xl = experiment()
    flops = training_flops(xl) * 256 * 400_000
    assert f"{flops:.4g} FLOPs" in describe(xl)
    days = flops / (989e12 * 0.35) / 86_400
    assert f"time              {days:.1f} days" in describe(xl)
    assert f"time              {days * 24 * 0.35 / 0.5 / 16:.1f} hours" in describe(xl, "H100", 16, 0.5)
    recomputed = experiment(model={**vars_of("DiT-XL/2"), "recompute": True})
    assert training_flops(recomputed) == pytest.approx(training_flops(xl) * 4 / 3)


def vars_of(name: str) -> dict:
    return {"name": name, "in_channels": 4, "input_size": 32, "num_classes": 1000}


def test_encoding_on_the_fly_is_said_to_be_left_out_and_nothing_else_is():
    autoencoder, latents = {"name": "autoencoder", "model": "digits"}, {"name": "latents", "path": "nowhere"}
    left_out = "# not in these      the encoder's time and memory"
    assert left_out in describe(experiment(first_stage=autoencoder))
    for sections in ({}, {"first_stage": "identity"}, {"first_stage": autoencoder, "data": latents}):
        assert left_out not in describe(experiment(**sections))


def test_an_assumed_share_of_the_peak_is_called_one():
    assert "at 35% of 989 TFLOP/s in bf16 (an assumption, state another with --mfu)" in describe(experiment())
    assert "at 40% of 989 TFLOP/s in bf16 (as stated)" in describe(experiment(), mfu=0.4)


def test_a_gpu_without_bf16_trains_in_fp32_at_the_speed_of_fp32():
    assert "of 15.7 TFLOP/s in fp32" in describe(experiment(), "V100")
    assert "of 67 TFLOP/s in fp32" in describe(experiment(train={"mixed_precision": "fp32"}), "H100")
    with pytest.raises(ConfigError, match=r"--gpu=V100 has no bf16; set train\.mixed_precision=fp32"):
        describe(experiment(train={"mixed_precision": "bf16"}), "V100")


@pytest.mark.parametrize(("name", "gpus"), [("DiT-XL/2", 1), ("DiT-XL/2-64E8A", 8), ("DiT-L/2-16E2A", 4)])
def test_what_does_not_fit_is_said_with_settings_that_make_it_fit(name, gpus):
    text = describe(experiment(name), "RTX4090", gpus)
    assert "# warning: more than 90% of that memory" in text
    advice = text.split("What would fit: ")[1].splitlines()[0]
    for option in advice.split("; or "):
        sections: dict[str, dict] = {"model": vars_of(name), "train": {}}
        for change in option.split():
            section, key, value = re.fullmatch(r"(\w+)\.(\w+)=(\w+)", change).groups()
            sections[section][key] = {"true": True}.get(value, int(value) if value.isdigit() else value)
        assert "warning" not in describe(experiment(**sections), "RTX4090", gpus), option


def test_what_fits_draws_no_warning_and_what_never_fits_is_told_so():
    assert "warning" not in describe(experiment("DiT-S/2"))
    assert "no setting helps; use more GPUs with train.parallel=fsdp2" in describe(experiment("DiT-H/2-64E8A"), "V100")


def test_memory_is_reckoned_at_the_peak_that_a_steered_router_may_have_too():
    found = experiment("DiT-B/2-64E8A", train={"mixed_precision": "fp32"})
    rows = found.train.batch_size
    held, most = (memory(found, "fp32", 1, rows, active) for active in (None, 12.0))
    assert most["activations"] > held["activations"] and most == held | {"activations": most["activations"]}
    text = describe(found, "B200")
    assert f"{sum(most.values()) / GIB:.1f} GiB at 12 active experts where the target is 8" in text
    assert "active experts where" not in describe(
        experiment(model=vars_of("DiT-B/2-64E8A") | {"moe": {"router": "topk"}})
    )
    limited = experiment(model=vars_of("DiT-B/2-64E8A") | {"moe": {"router": {"name": "dtopp", "max_experts": 9}}})
    assert "at 9 active experts where the target is 8" in describe(limited)


def test_a_target_of_one_expert_is_commented_for_steered_routers_alone():
    assert "# note: model.moe.target=1: the threshold falls" in describe(experiment("DiT-B/2-8E1A"))
    assert "# note" not in describe(experiment("DiT-B/2-8E2A"))


def test_an_equal_share_of_the_batch_is_needed():
    with pytest.raises(ConfigError, match=r"train\.batch_size=256 cannot be shared equally by 3 GPUs"):
        describe(experiment(), gpus=3)


def test_impossible_options_are_refused_by_name():
    for options, message in (
        (("H1000",), r"--gpu=H1000 is not in the table; did you mean 'H100'\?"),
        (("H100", 0), r"--gpus=0 must be at least 1"),
        (("H100", 1, 1.5), r"--mfu=1.5 must be above 0 and at most 1"),
        (("H100", 1, 0.0), r"--mfu=0.0 must be above 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            describe(experiment(), *options)


def test_the_options_of_the_command_are_what_describe_takes():
    parser = argparse.ArgumentParser()
    add_cost_arguments(parser)
    assert vars(parser.parse_args([])) == {"gpu": "H100", "gpus": 1, "mfu": None}
    assert vars(parser.parse_args(["--gpu", "A100", "--gpus", "8", "--mfu", "0.4"])) == {
        "gpu": "A100",
        "gpus": 8,
        "mfu": 0.4,
    }


def test_every_line_about_cost_is_a_comment_below_a_config_that_reads_back(tmp_path):
    described = experiment("DiT-B/2-8E2A")
    text = describe(described)
    path = tmp_path / "printed.yaml"
    path.write_text(text)
    assert load_experiment(path) == described
    costs = text[text.index("# parameters") :].splitlines()
    assert all(line.startswith("# ") for line in costs)
    assert sum(numbers(text, "memory per GPU")[word] for word in ("weights", "gradients", "AdamW", "EMA")) > 0
    assert set(GPUS) >= {"V100", "A100", "L40S", "H100", "H200", "B200", "RTX4090", "RTX3090"}
    assert all(gpu.memory * GIB > 2**34 for gpu in GPUS.values())
