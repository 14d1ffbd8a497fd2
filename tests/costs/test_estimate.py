"""What a run is said to cost, against what arithmetic says."""

import argparse
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest

from dit_moe.config import ConfigError
from dit_moe.costs import GIB, add_cost_arguments, describe, estimate, memory, sampling_flops, training_flops
from dit_moe.costs.estimate import forward_flops_at, of_this_machine
from dit_moe.experiments.image import load_experiment
from dit_moe.experiments.text import load_text_experiment
from tests.costs.experiments import LENGTH, VOCAB, image_experiment, image_model, text_experiment


def test_flops_are_those_of_an_image_or_of_a_token_and_recompute_costs_a_third_more():
    image, text = image_experiment(), text_experiment()
    count = "400,000 steps, 102,400,000 images"
    assert f"training          {count}, {training_flops(image) * 256 * 400_000:.4g} FLOPs" in describe(image, "H100")
    recomputed = image_experiment(model=image_model(recompute=True))
    assert training_flops(recomputed) == pytest.approx(training_flops(image) * 4 / 3)
    moe = image_experiment("DiT-B/2-64E8A")
    experts_again = replace(moe, model=replace(moe.model, moe=replace(moe.model.moe, recompute=True)))
    added = forward_flops_at(moe.model, moe.model.moe.target) - forward_flops_at(moe.model, 0)
    assert training_flops(experts_again) == pytest.approx(training_flops(moe) + added)
    footprint, sequence = text.model.footprint(), training_flops(text)
    assert sequence == 3 * footprint.forward_flops
    printed = describe(text, "H100")
    assert f"{footprint.total_params:,} in all, {footprint.active_params:,.0f} active per token" in printed
    each = f"{footprint.forward_flops / LENGTH:.4g} forward, {sequence / LENGTH:.4g} in training"
    assert f"FLOPs per token   {each}; {footprint.forward_flops:.4g} and {sequence:.4g} a sequence of 2,048" in printed
    count = "1,000 steps, 2,048,000 sequences, 4,194,304,000 tokens"
    assert f"training          {count}, {sequence * 2_048_000:.4g} FLOPs" in printed and "image" not in printed


def test_six_flops_for_each_active_parameter_and_token_are_nearly_all():
    """Chinchilla's rule, without the embedding's rows, which are looked up; the rest is attention."""
    found = text_experiment()
    active = found.model.footprint().active_params - VOCAB * 2048
    attention = 3 * 16 * 4 * LENGTH * 2048
    assert training_flops(found) / LENGTH == pytest.approx(6 * active + attention, rel=1e-3)  # norms


def test_time_is_the_training_flops_over_what_the_gpus_do():
    image = image_experiment()
    days = training_flops(image) * 256 * 400_000 / (989e12 * 0.35) / 86_400
    assert f"time              {days:.1f} days" in describe(image, "H100")
    assert f"time              {days * 24 * 0.35 / 0.5 / 16:.1f} hours" in describe(image, "H100", 16, 0.5)
    assert "at 35% of 989 TFLOP/s in bf16 (an assumption, state another with --mfu)" in describe(image, "H100")
    assert "at 40% of 989 TFLOP/s in bf16 (as stated)" in describe(image, "H100", mfu=0.4)
    text = text_experiment(train={"steps": 24_000})
    speed = 64 * 989e12 * 0.4 / training_flops(text)
    rate = f"{24_000 * 2048 / speed / 3600:.1f} hours, {speed * LENGTH:,.0f} tokens/s on 64 × H100 at 40%"
    assert f"time              {rate}" in describe(text, "H100", 64, 0.4)


def test_encoding_on_the_fly_is_said_to_be_left_out_and_nothing_else_is():
    autoencoder, latents = {"name": "autoencoder", "model": "digits"}, {"name": "latents", "path": "nowhere"}
    left_out = "# not in these      the encoder's time and memory"
    assert left_out in describe(image_experiment(first_stage=autoencoder), "H100")
    for sections in ({}, {"first_stage": "identity"}, {"first_stage": autoencoder, "data": latents}):
        assert left_out not in describe(image_experiment(**sections), "H100")


def test_a_gpu_without_bf16_trains_in_fp32_at_the_speed_of_fp32():
    assert "of 15.7 TFLOP/s in fp32" in describe(image_experiment(), "V100")
    assert "of 67 TFLOP/s in fp32" in describe(image_experiment(train={"mixed_precision": "fp32"}), "H100")
    with pytest.raises(ConfigError, match=r"--gpu=V100 has no bf16; set train\.mixed_precision=fp32"):
        describe(image_experiment(train={"mixed_precision": "bf16"}), "V100")


def test_on_this_cpu_a_few_passes_are_timed_and_what_takes_too_long_for_that_is_left_out(monkeypatch):
    large = describe(image_experiment(), "cpu")
    assert "# time              not known: one image or sequence of so large a model" in large
    assert "\n# sampling" not in large and "# memory            " in large
    small = {"depth": 1, "width": 32, "heads": 2}
    image = image_experiment(model=image_model("DiT-custom/8-4E2A", **small))
    text = text_experiment("LM-custom-4E2A", small | {"vocab_size": 64}, data={"path": "nowhere", "length": 16})
    for each in (image, text):
        assert re.search(r"# time              \d.* a?.*on this CPU with .* in fp32", describe(each, "cpu"))
    monkeypatch.setattr(estimate, "flops_per_second", lambda *args: 1e3 * training_flops(image))
    assert "# time              28.4 hours, 1,000 images/s on this CPU" in describe(image, "cpu")
    seconds = sampling_flops(image) * image.sample.count / (1e3 * training_flops(image))
    assert f"# sampling          {seconds:.1f} seconds" in describe(image, "cpu") and seconds > 0.1
    with pytest.raises(ConfigError, match=r"^--gpu=cpu is this machine, and is timed; drop --gpus and --mfu"):
        describe(image, "cpu", mfu=0.5)


def image_at(name):
    return lambda model, train: image_experiment(model=image_model(name, **model), train=train)


def text_at(model, train):
    return text_experiment(model=model, train={"micro_batch": 32, **train})


@pytest.mark.parametrize(
    ("made", "gpu", "gpus"),
    [
        (image_at("DiT-XL/2"), "RTX4090", 1),
        (image_at("DiT-XL/2-64E8A"), "RTX4090", 8),
        (image_at("DiT-L/2-16E2A"), "RTX4090", 4),
        (text_at, "H100", 64),
    ],
    ids=["dense", "64 experts", "16 experts", "text"],
)
def test_what_does_not_fit_is_said_with_settings_that_make_it_fit(made, gpu, gpus):
    text = describe(made({}, {}), gpu, gpus)
    assert "# warning: more than 90% of that memory" in text
    for option in text.split("What would fit: ")[1].splitlines()[0].split("; or "):
        sections = {"model": {}, "train": {}, "model.moe": {}}
        for change in option.split():
            section, key, value = re.fullmatch(r"([\w.]+)\.(\w+)=(\w+)", change).groups()
            sections[section][key] = {"true": True}.get(value, int(value) if value.isdigit() else value)
        of_experts = sections.pop("model.moe")
        changed = made(**sections)
        if of_experts:
            changed = replace(changed, model=replace(changed.model, moe=replace(changed.model.moe, **of_experts)))
        assert "warning" not in describe(changed, gpu, gpus), option


def test_what_fits_draws_no_warning_what_never_fits_says_so_and_a_target_of_one_expert_has_a_note():
    assert "warning" not in describe(image_experiment("DiT-S/2"), "H100")
    assert "# note" not in describe(image_experiment("DiT-B/2-8E2A"), "H100")
    assert "# note: model.moe.target=1: the threshold falls" in describe(image_experiment("DiT-B/2-8E1A"), "H100")
    never = describe(image_experiment("DiT-H/2-64E8A"), "V100")
    assert "no setting helps; use more GPUs with train.parallel=fsdp2" in never


def test_memory_is_estimated_at_the_peak_that_a_controlled_router_may_have_too():
    name = "DiT-B/2-64E8A"
    found = image_experiment(name, train={"mixed_precision": "fp32"})
    held, most = (memory(found, "fp32", 1, found.train.batch_size, active) for active in (None, 12.0))
    assert most["activations"] > held["activations"] and most == held | {"activations": most["activations"]}
    assert f"{sum(most.values()) / GIB:.1f} GiB at 12 active experts where the target is 8" in describe(found, "B200")
    uncontrolled = image_experiment(model=image_model(name, moe={"router": "topk"}))
    assert "active experts where" not in describe(uncontrolled, "B200")
    limited = image_experiment(model=image_model(name, moe={"router": {"name": "dtopp", "max_experts": 9}}))
    assert "at 9 active experts where the target is 8" in describe(limited, "B200")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("H1000",), r"--gpu=H1000 is not in the table; did you mean 'H100'\?"),
        (("H100", 0), r"--gpus=0 must be at least 1"),
        (("H100", 3), r"train\.batch_size=256 cannot be shared equally by 3 GPUs"),
        (("H100", 1, 1.5), r"--mfu=1.5 must be above 0 and at most 1"),
        (("H100", 1, 0.0), r"--mfu=0.0 must be above 0"),
    ],
)
def test_impossible_options_are_refused_by_name(options, message):
    with pytest.raises(ConfigError, match=message):
        describe(image_experiment(), *options)


def test_the_options_of_the_command_are_what_describe_takes():
    parser = argparse.ArgumentParser()
    add_cost_arguments(parser)
    assert vars(parser.parse_args([])) == {"gpu": None, "gpus": 1, "mfu": None}
    given = vars(parser.parse_args(["--gpu", "A100", "--gpus", "8", "--mfu", "0.4"]))
    assert given == {"gpu": "A100", "gpus": 8, "mfu": 0.4} and "# time" in describe(image_experiment(), **given)


@pytest.mark.parametrize(
    ("described", "load"),
    [(image_experiment("DiT-B/2-8E2A"), load_experiment), (text_experiment("LM-tiny"), load_text_experiment)],
    ids=["image", "text"],
)
def test_every_line_about_cost_is_a_comment_below_a_config_that_reads_back(described, load, tmp_path):
    text = describe(described, "H100")
    (tmp_path / "printed.yaml").write_text(text)
    assert load(tmp_path / "printed.yaml") == described
    costs = text[text.index("# parameters") :].splitlines()
    assert all(line.startswith("# ") for line in costs)
    held = next(line for line in costs if line.startswith("# memory per GPU"))
    parts = {word: float(size) for word, size in re.findall(r"([A-Za-z]+) ([\d.]+)", held)}
    assert sum(parts[word] for word in ("weights", "gradients", "AdamW", "EMA", "activations")) > 0


@pytest.mark.parametrize(
    ("device", "gpu"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "H100"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "H100"),
        ("NVIDIA T4", "H100"),
        (None, "cpu"),
    ],
)
def test_an_estimate_is_for_this_machine_unless_another_is_named(monkeypatch, device, gpu):
    monkeypatch.setattr("torch.cuda.is_available", lambda: device is not None)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: device)
    assert of_this_machine() == gpu
    assert of_this_machine(gpus=8) == of_this_machine(mfu=0.4) == gpu.replace("cpu", "H100")


def test_the_memory_of_this_machine_s_gpu_is_its_own_and_not_that_of_its_namesake(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA A100-SXM4-40GB")
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda: SimpleNamespace(total_memory=40 * GIB))
    assert "(A100: 40)" in describe(image_experiment()) and "(A100: 80)" in describe(image_experiment(), "A100")
