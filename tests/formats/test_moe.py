"""Checkpoints of suites with experts through the import."""

import pytest
import torch

from dit_moe.checkpoint import load_into, state_of
from dit_moe.config import build
from dit_moe.diffusion import OBJECTIVES, check_fit
from dit_moe.experiments.image import Experiment
from dit_moe.formats import FORMATS, in_format, recognise
from dit_moe.formats.base import Found
from dit_moe.formats.rules import to_theirs
from dit_moe.models import MODELS, DiT, DiTConfig
from dit_moe.moe import MoEConfig
from dit_moe.moe.routers.promoe import ProMoEConfig
from dit_moe.moe.routers.topk import TopKConfig
from tests.formats.files import HEADS, bare, golden, of_training, weights_of
from tests.formats.peers import PEERS, Peer, forward, random_state

GIVEN = {  # the format, and what weights do not tell
    "DiT-MoE-XL": ("auto", ()),
    "token choice": ("promoe", (HEADS,)),
    "expert choice": ("diffmoe", (HEADS,)),
    "ProMoE": ("auto", (HEADS,)),
    "DSMoE": ("auto", (HEADS, "model.moe.target=2", "model.input_size=8")),
    "DiffMoE": ("diffmoe", (HEADS,)),
}


def imported(path, format_name: str, overrides=()) -> DiT:
    """The network of a file of weights, as sampling has it."""
    weights = recognise(path, format_name, overrides)
    model = MODELS.build(build(Experiment, weights.config()).model).eval()
    load_into(model, weights.weights("ema"), path)
    return model


def saved(tmp_path, state):
    """As ProMoE's training script writes it, its raw weights other than the averaged ones."""
    raw = {key: each + 1 for key, each in state.items()}
    torch.save({"step": 3, "model_state_dict": raw, "ema_model_state_dict": state}, tmp_path / "weights.pt")
    return tmp_path / "weights.pt"


def relative_error(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


def inputs(peer: Peer):
    """Seven images, of which one has no class."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.tensor([0, 1, 2, peer.classes, 3, 4, 5])
    return torch.randn(7, 4, 8, 8, generator=generator), torch.rand(7, generator=generator), labels


@pytest.mark.parametrize("write", [bare, of_training])
def test_dit_moe_s_golden_network_is_recognised_and_gives_its_output_and_routing(tmp_path, write):
    numbers = golden("dit_moe")
    model = imported(write(tmp_path / "0400000.pt", "dit_moe"), "auto", [HEADS])
    with torch.no_grad():
        out = model(*(numbers[key] for key in "xty"))
        routing = model.blocks[0].moe.router(numbers["gate_h"].flatten(0, 1))
    assert relative_error(out, numbers["out"]) <= 1e-5
    gates = torch.zeros(len(numbers["gate_idx"]), 4).scatter(1, numbers["gate_idx"], numbers["gate_weight"])
    ours = torch.zeros_like(gates)
    ours[routing.token_R, routing.expert_R] = routing.weight_R.detach()
    torch.testing.assert_close(ours, gates, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", PEERS)
def test_an_imported_network_agrees_with_an_independent_forward_pass(tmp_path, name):
    peer, (format_name, overrides) = PEERS[name], GIVEN[name]
    state = random_state(peer)
    x, t, y = inputs(peer)
    with torch.no_grad():
        out = imported(saved(tmp_path, state), format_name, overrides)(x, t, y)
    expected = forward(peer, state, x, t, y)
    assert relative_error(out, expected) <= 1e-5
    others = torch.arange(7).roll(1)
    assert relative_error(out[others], expected) > 0.1  # the comparison can tell images apart


@pytest.mark.parametrize("name", ["golden", *PEERS])
def test_round_trips_to_the_suite_s_names_are_exact_and_what_these_do_not_tell_is_said(tmp_path, capsys, name):
    state = weights_of("dit_moe") if name == "golden" else random_state(PEERS[name])
    of_training = "model.moe.router.balance_loss=0.3", "model.moe.capacity_factor=1.5"  # on which no output depends
    golden_network = ("auto", (HEADS, *of_training))
    format_name, overrides = golden_network if name == "golden" else GIVEN[name]
    weights = recognise(saved(tmp_path, state), format_name, overrides)
    back = to_theirs(weights.format.rules(build(Experiment, weights.config()).model), weights.weights("ema"))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)
    assert in_format(weights.state["imported"]["format"], weights, "ema").keys() == state.keys()
    told = " model.input_size=8 model.moe.target=2.0; give that where they are read"
    assert (told in capsys.readouterr().err) == (name == "DSMoE")


def without(part: str):
    return lambda state: {name: each for name, each in state.items() if part not in name}


def with_value(part: str, value: float):
    return lambda state: {name: torch.full_like(each, value) if part in name else each for name, each in state.items()}


def of_seven_classes(state):
    return state | {"y_embedder.embedding_table.weight": state["y_embedder.embedding_table.weight"][:8]}


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("ProMoE", of_seven_classes, "it has 7 classes, and ProMoE's router knows no class as 1000"),
        ("ProMoE", without("experts.3."), "3 prototypes for 3 experts; the last expert must be that of the tokens"),
        ("DSMoE", without("shared_experts."), "no tensor blocks.1.mlp.shared_experts.gate_proj.weight"),
        ("DSMoE", with_value("e_score_correction_bias", 0.5), "e_score_correction_bias holds other numbers than 0,"),
        ("DiffMoE", with_value("ema_decay", 0.9), "ema_decay holds other numbers than 0.95,"),
        ("token choice", without("blocks.3.mlp.experts"), "missing: blocks.3.mlp.experts.0.fc1.weight"),
        ("DiT-MoE-XL", without("blocks.1.moe"), r"the blocks \[0, 2, 3\] have experts, which every and offset cannot"),
    ],
)
def test_what_no_option_makes_exact_is_refused_with_the_reason(tmp_path, name, changed, message):
    format_name, overrides = GIVEN[name]
    with pytest.raises(ValueError, match=message):
        imported(saved(tmp_path, changed(random_state(PEERS[name]))), format_name, overrides)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ProMoE", r"^model\.heads=None must be given"),
        ("DSMoE", r"^model\.heads=None must be given"),
        ("token choice", "fits the formats diffmoe and diffmoe_ddpm and promoe; say which it is"),
        ("DiffMoE", "fits the formats diffmoe and diffmoe_ddpm and promoe; say which it is"),
    ],
)
def test_what_weights_do_not_tell_is_asked_for(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        recognise(saved(tmp_path, random_state(PEERS[name])))


def dit_moe(experts: int, width: int, **options):
    router = TopKConfig(renormalize=False, balance_loss=0.01)
    shapes = {"expert_hidden": 4 * width, "shared_experts": 1, "shared_hidden": 2 * width, "activation": "swiglu"}
    return {"moe": MoEConfig(experts=experts, target=2, router=router, **shapes), **options}


def promoe(width: int):
    shapes = {"expert_hidden": 2 * width, "shared_experts": 1, "shared_hidden": 2 * width, "bias": True}
    return {"moe": MoEConfig(experts=13, target=1, router=ProMoEConfig(), every=2, offset=1, **shapes)}


XL_NORM = {"qk_norm": "layer_norm", "qk_norm_eps": 1e-6}


@pytest.mark.parametrize(
    ("format_name", "size", "options", "total", "active"),
    [
        ("dit_moe", "S", dit_moe(8, 384), 199e6, 72e6),
        ("dit_moe", "S", dit_moe(16, 384), 369e6, 72e6),
        ("dit_moe", "B", dit_moe(8, 768), 796e6, 286e6),
        ("dit_moe", "XL", dit_moe(8, 1152, **XL_NORM), 4.17e9, 1.49e9),
        ("promoe", "B", promoe(768), 300e6, 130e6),
        ("promoe", "L", promoe(1024), 1.06e9, 458e6),
        ("promoe", "XL", promoe(1152), 1.57e9, 675e6),
    ],
)
def test_published_models_are_inferred_with_their_published_numbers_of_parameters(
    format_name, size, options, total, active
):
    data = {"in_channels": 4, "input_size": 32, "num_classes": 1000, "learn_sigma": True}
    config = DiTConfig(name=f"DiT-{size}/2", **options, **data)
    footprint = config.footprint()
    assert (footprint.total_params, footprint.active_params) == pytest.approx((total, active), rel=5e-3)
    format_ = FORMATS.config_class(format_name)()
    with torch.device("meta"):
        own = state_of(MODELS.build(config))
    told = format_.model(Found(to_theirs(format_.rules(config), own)))
    assert build(DiTConfig, told) == config


@pytest.mark.parametrize(
    ("format_name", "arguments", "objective", "noted"),
    [
        ("auto", None, "flow", True),
        ("dit-moe-ddpm", None, "ddpm", False),
        ("auto", {"rf": True}, "flow", False),
        ("auto", {"rf": False}, "ddpm", False),
    ],
)
def test_dit_moe_s_objective_is_that_of_its_arguments_or_of_the_named_format(
    tmp_path, format_name, arguments, objective, noted
):
    path = tmp_path / "weights.pt"
    source = bare(path, "dit_moe") if arguments is None else of_training(path, "dit_moe", **arguments)
    weights = recognise(source, format_name, [HEADS])
    experiment = build(Experiment, weights.config())
    assert OBJECTIVES.name_of(experiment.objective) == objective
    check_fit(experiment.sample.sampler, objective)
    assert (weights.format.note(weights.source.settings, experiment.model) is not None) == noted
