"""The ImageNet configs: every model with every router and objective, at equal active compute; the published recipe."""

import math
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from dit_moe import config
from dit_moe.costs import GIB, MFU, describe, evaluations, memory, peak, sampling_flops, training_flops
from dit_moe.costs.memory import peak_active
from dit_moe.experiments.image import Experiment, load_experiment, resolve_without_data
from dit_moe.formats.base import Found
from dit_moe.formats.lightningdit import LightningDiTFormat
from dit_moe.sampling.generator import SampleConfig
from dit_moe.sampling.recipes import SAMPLING
from tests.cli.conftest import cli
from tests.formats.lightningdit import Shape, on_meta, tensor_shapes

CONFIGS = Path(__file__).parent.parent / "configs"
GUIDE = (CONFIGS.parent / "docs" / "imagenet.md").read_text()
FILES = [path for size in (256, 512) for path in sorted((CONFIGS / f"imagenet{size}").glob("DiT-*.yaml"))]
LIGHTNING = CONFIGS / "imagenet256" / "LightningDiT-XL-1.yaml"
ROUTERS, OBJECTIVES = ("topk", "topp", "dtopp"), ("ddpm", "flow")
DENSE = ("DiT-S-2", "DiT-B-2", "DiT-L-2", "DiT-XL-2")


@cache
def resolved(path: Path, *overrides: str) -> Experiment:
    return resolve_without_data(load_experiment(path, overrides))


def experiment(path: Path, router: str, objective: str) -> Experiment:
    routed = [f"model.moe.router={router}"] if "A.yaml" in path.name else []
    return resolved(path, *routed, f"objective={objective}")


def dense_of(path: Path) -> Path:
    return path.with_name(re.sub(r"-\d+E\d+A", "", path.name))


def test_there_are_four_sizes_dense_and_with_three_sets_of_experts_at_two_resolutions():
    names = {path.stem for path in FILES}
    wanted = {f"DiT-{size}-2{moe}" for size in ("S", "B", "L", "XL") for moe in ("", "-8E2A", "-16E2A", "-64E8A")}
    assert names == wanted and len(FILES) == 32


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_router_and_objective_fits_and_has_the_active_compute_of_the_dense_model(path):
    for objective in OBJECTIVES:
        active = []
        dense = experiment(dense_of(path), "", objective).model.footprint()
        for router in ROUTERS if "A.yaml" in path.name else ("",):
            found = experiment(path, router, objective)
            model, footprint = found.model, found.model.footprint()
            assert model.name == path.stem.replace("-2", "/2", 1)
            assert (model.in_channels, model.num_classes) == (4, 1000)
            assert model.input_size == (32 if "256" in path.parent.name else 64)
            assert model.learn_sigma is (objective == "ddpm")
            assert evaluations(found) == 250
            # The router's matrix is the difference, at most 64 rows of 6·H·D; experts have no biases.
            assert footprint.active_params == pytest.approx(dense.active_params, rel=0.01)
            assert footprint.forward_flops == pytest.approx(dense.forward_flops, rel=0.02)
            if router:
                own = type(model.moe.router)()  # named like the entry, with its own defaults
                assert model.moe.router == own.resolved(model.moe.experts, model.moe.target)
            active.append(footprint.active_params)
        assert max(active) - min(active) <= 28  # θ of each layer


@pytest.mark.parametrize("size", [256, 512])
def test_the_recipe_is_the_published_one(size):
    found = load_experiment(CONFIGS / f"imagenet{size}" / "DiT-XL-2.yaml")
    train = found.train
    assert (train.lr, train.betas, train.weight_decay, train.batch_size) == (1e-4, (0.9, 0.999), 0, 256)
    assert (train.warmup_steps, train.schedule, train.ema_decay, train.grad_clip) == (0, "constant", 0.9999, None)
    assert train.steps == 400_000 and found.encode.flips and found.encode.images.size == size
    assert found.data.path == f"data/imagenet{size}" and found.first_stage.model == "stabilityai/sd-vae-ft-ema"
    flow = load_experiment(CONFIGS / f"imagenet{size}" / "DiT-XL-2.yaml", ["objective=flow"]).objective
    assert (flow.path, flow.time, flow.time_shift, flow.cosine_weight) == ("linear", "uniform", 1, 0)


def test_the_config_of_lightningdit_has_the_tensors_and_the_objective_of_its_published_weights():
    shape = Shape(width=1152, depth=28, heads=16, patch=1, size=16, channels=32, classes=1000)
    found = resolved(LIGHTNING)
    made = config.build(Experiment, LightningDiTFormat().experiment(Found(on_meta(shape))))
    assert (found.model, found.objective) == (made.model, made.objective)
    assert found.model.footprint().total_params == sum(map(math.prod, tensor_shapes(shape).values()))
    assert found.sample.sampler == config.build(SampleConfig, SAMPLING["lightningdit-cfg10"].sample).sampler
    assert found.train.steps * found.train.batch_size / 1_281_167 == pytest.approx(64, rel=0.01)  # epochs


@pytest.mark.parametrize("path", [*FILES, LIGHTNING], ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_what_the_first_line_of_a_config_says_is_true(path):
    routed = ["model.moe.router=dtopp"] if "A.yaml" in path.name else []
    footprint = resolved(path, *routed).model.footprint()
    line = path.read_text().splitlines()[0]
    shown = [float(number) * {"M": 1e6, "B": 1e9}[unit] for number, unit in re.findall(r"([\d.]+) ([MB])\b", line)]
    found = [footprint.total_params, footprint.active_params][: len(shown)]
    assert shown == pytest.approx(found, rel=0.02)
    assert f"{footprint.forward_flops / 1e9:.0f} GFLOPs" in line


def gib(found: Experiment) -> float:
    """On each of eight GPUs: what has to fit, that at the peak of early training, where there is one."""
    return sum(memory(found, "bf16", 8, 32, peak_active(found.model)).values()) / GIB


def most_images(printed: str) -> int:
    """That one GPU takes at a time: all of the batch, or as many as the warning says."""
    if "# warning" not in printed:
        return 256
    found = re.search(r"What would fit: train\.micro_batch=(\d+)(;|\n)", printed)
    assert found is not None
    return int(found[1])


def row_of_the_guide(name: str) -> str:
    """A model's row in the table of docs/imagenet.md."""

    def of_size(size: int, *overrides: str) -> Experiment:
        return resolved(CONFIGS / f"imagenet{size}" / f"{name}.yaml", *overrides)

    footprint, cells = of_size(256).model.footprint(), []
    counts = [footprint.total_params, footprint.active_params][: 2 if "A" in name else 1]
    shown = ", ".join(f"{n / 1e9:.2g} B" if n >= 1e9 else f"{n / 1e6:.0f} M" for n in counts)
    for size in (256, 512):
        both = [[], ["model.recompute=true"]]
        for parallel in ("ddp", "fsdp2"):
            shared = f"train.parallel={parallel}"
            cells.append(" · ".join(f"{gib(of_size(size, shared, *more)):.0f}" for more in both))
        cells.append(" · ".join(str(most_images(describe(of_size(size, *more), "H100") + "\n")) for more in both))
    saved = f"{16 * footprint.total_params / 1e9:.1f} GB"  # weights, average and two moments in fp32
    return f"| {' | '.join([name.removeprefix('DiT-').replace('-2', '/2', 1), shown, saved, *cells])} |"


@pytest.mark.parametrize("name", sorted({path.stem for path in FILES}))
def test_the_guide_s_table_of_memory_is_what_the_dry_run_says(name):
    assert row_of_the_guide(name) in GUIDE


def test_sampling_is_priced_with_the_experts_that_it_asks_for():
    path = CONFIGS / "imagenet256" / "DiT-S-2-8E2A.yaml"
    changes = ([], ["sample.target=2"], ["sample.target=4"])
    trained, same, more = (sampling_flops(resolved(path, *change)) for change in changes)
    assert same == trained < more < 2 * trained


def hours_of_the_guide(name: str) -> str:
    """A dense model's row in the table of FLOPs and time, each cell at 256 and at 512."""
    both = [resolved(CONFIGS / f"imagenet{size}" / f"{name}.yaml") for size in (256, 512)]
    forward = " · ".join(f"{found.model.footprint().forward_flops / 1e9:.0f}" for found in both)
    speed = peak("H100", "bf16") * MFU  # FLOP/s
    training = [found.train.steps * found.train.batch_size * training_flops(found) / speed for found in both]
    sampling = [50_000 * sampling_flops(found) / speed for found in both]
    cells = [training, [seconds / 8 for seconds in training], sampling]
    shape = name.removeprefix("DiT-").replace("-2", "/2")
    return f"| {' | '.join([shape, forward, *map(lengths, cells)])} |"


def lengths(both: list[float]) -> str:
    """Two times in seconds, in days from two days on: two digits, at most one of them behind the point."""
    (first, unit), (second, other) = (
        (seconds / 86_400, "days") if seconds >= 2 * 86_400 else (seconds / 3600, "hours") for seconds in both
    )
    shown, also = (f"{number:.0f}" if number >= 9.95 else f"{number:.1f}" for number in (first, second))
    return f"{shown} · {also} {unit}" if unit == other else f"{shown} {unit} · {also} {other}"


@pytest.mark.parametrize("name", DENSE)
def test_the_guide_s_table_of_hours_is_what_the_dry_run_says(name):
    assert hours_of_the_guide(name) in GUIDE


def test_every_dry_run_of_the_guide_runs(monkeypatch, capsys):
    monkeypatch.chdir(CONFIGS.parent)
    lines = [line for line in GUIDE.splitlines() if line.startswith("dit-moe train ") and "--dry-run" in line]
    assert len(lines) >= 2
    for line in lines:
        assert cli(*shlex.split(line, comments=True)[1:]) == 0, line
        assert "# time " in capsys.readouterr().out
