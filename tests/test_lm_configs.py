"""The configs of the paper's language models: every router at equal active compute, the recipe, and what it costs."""

import re
from pathlib import Path

import pytest
import yaml

from dit_moe.costs import GIB, ROOM, memory
from dit_moe.experiments.text import TextExperiment, load_text_experiment, resolve_text_without_data
from tests.cli.conftest import cli

FOLDER = Path(__file__).parent.parent / "configs" / "lm"
FILES = sorted(FOLDER.glob("LM-*.yaml"))
EACH = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
ROUTERS = {
    "topk": {"drn": False},
    "topp0.35": {"p": 0.35, "drn": False, "dynamic_loss": 1e-3},
    "topp0.40": {"p": 0.40, "drn": False, "dynamic_loss": 1e-3},
    "dtopp": {"layerwise": False, "drn": True, "dynamic_loss": 1e-3, "z_loss": 0.0},
    "dtopp-layerwise": {"layerwise": True, "drn": True, "dynamic_loss": 1e-3, "z_loss": 0.0},
}


def experiment(path: Path) -> TextExperiment:
    return resolve_text_without_data(load_text_experiment(path))


def router_of(path: Path) -> str:
    """The last part of the file's name; none for a dense model."""
    return path.stem.partition("A-")[2]


def test_the_paper_s_runs_are_there():
    wanted = {f"LM-1.3B-64E8A-{router}" for router in ROUTERS}
    wanted |= {f"LM-1.3B-{experts}-{router}" for experts in ("32E4A", "128E16A") for router in ("topk", "dtopp")}
    wanted |= {f"LM-{size}-64E8A-{router}" for size in ("0.4B", "2.4B") for router in ("topk", "dtopp")}
    assert {path.stem for path in FILES} == wanted | {f"LM-{size}" for size in ("0.4B", "1.3B", "2.4B")}


@EACH
def test_a_file_differs_from_the_base_in_its_model_alone_which_is_the_one_that_it_is_called_by(path):
    found, base = load_text_experiment(path), load_text_experiment(FOLDER / "base.yaml")
    assert set(yaml.safe_load(path.read_text())) == {"base", "model"}
    for section in ("data", "train", "tokenize", "objective"):
        assert getattr(found, section) == getattr(base, section)
    model, router = resolve_text_without_data(found).model, router_of(path)
    assert re.sub(r"-[\d.]+B(?=-\d+E)", "", model.name) == path.stem.removesuffix(f"-{router}")
    if router:
        options = {"balance_loss": 1e-4, **ROUTERS[router]}
        assert {name: getattr(model.moe.router, name) for name in options} == options
        assert model.moe.activation == "swiglu" and model.moe.is_moe(0) and model.moe.is_moe(1)
        dense = experiment(FOLDER / f"{path.stem.split('B')[0]}B.yaml").model.footprint()
        assert model.footprint().active_params == pytest.approx(dense.active_params, rel=5e-3)
        assert model.footprint().forward_flops == pytest.approx(dense.forward_flops, rel=5e-3)


def test_the_data_is_100_billion_tokens_of_dclm_by_gpt_neox_s_tokenizer():
    base = experiment(FOLDER / "base.yaml")
    assert base.train.steps * base.train.batch_size * base.data.length == pytest.approx(100e9, rel=1e-4)
    assert base.data.length == base.model.max_length == 2048 and base.model.vocab_size == 50304
    corpus = base.tokenize.corpus
    assert (corpus.id, corpus.field, corpus.streaming) == ("mlfoundations/dclm-baseline-1.0", "text", True)
    assert base.tokenize.tokenizer.name == "EleutherAI/gpt-neox-20b"


def test_the_recipe_is_olmoe_s():
    train = load_text_experiment(FOLDER / "base.yaml").train
    assert (train.lr, train.betas, train.eps, train.weight_decay) == (4e-4, (0.9, 0.95), 1e-8, 0.1)
    assert (train.schedule, train.warmup_steps, train.min_lr_ratio, train.grad_clip) == ("cosine", 2000, 0.1, 1.0)
    assert train.batch_size * 2048 == pytest.approx(4e6, rel=0.05)
    lines = (FOLDER / "base.yaml").read_text().splitlines()
    taken = ["lr", "betas", "eps", "weight_decay", "warmup_steps", "min_lr_ratio", "grad_clip"]
    starts = (*(f"{name}:" for name in taken), "batch_size: 2048")
    assert all("# OLMoE" in line for line in lines if line.strip().startswith(starts))


@EACH
def test_the_first_line_of_a_config_says_what_it_costs_and_it_fits_64_gpus_of_80_gib(path):
    found = experiment(path)
    footprint = found.model.footprint()
    line = path.read_text().splitlines()[0]
    shown = [float(number) * {"M": 1e6, "B": 1e9}[unit] for number, unit in re.findall(r"([\d.]+) ([MB])\b", line)]
    assert shown == pytest.approx([footprint.total_params, footprint.active_params][: len(shown)], rel=0.005)
    assert len(shown) == (2 if router_of(path) else 1)
    assert f"{footprint.forward_flops / 2048 / 1e9:.2f} GFLOPs a token" in line
    assert sum(memory(found, "bf16", 64, found.train.micro_batch).values()) < ROOM * 80 * GIB


def test_a_dry_run_needs_no_tokens(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli("train", FOLDER / "LM-1.3B-64E8A-dtopp.yaml", "--dry-run", "--gpus", "64") == 0
    out = capsys.readouterr().out
    assert "# parameters        6,919,161,872 in all" in out and "tokens/s on 64 × H100" in out
    assert "100,000,595,968 tokens" in out and list(tmp_path.iterdir()) == []
