"""DiTs of diffusers through the import."""

import diffusers
import pytest
import torch

from dit_moe.diffusion.schedules import linear_betas
from dit_moe.experiments.run import open_image_run
from dit_moe.formats import recognise
from dit_moe.formats.diffusers import DiffusersFormat
from dit_moe.formats.rules import to_theirs
from tests.autoencoders.small import make
from tests.cli.conftest import cli
from tests.formats.files import BUNDLED

SHAPE = {"num_attention_heads": 3, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8, "num_layers": 2}
SHAPE |= {"sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 7}
LINEAR = ("epsilon", "linear")


def random_transformer(**changes) -> diffusers.DiTTransformer2DModel:
    """With the same embedding of time and label in every block, as after the conversion of a DiT."""
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(**SHAPE | changes).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    first, second = (block.norm1.emb for block in model.transformer_blocks)
    second.load_state_dict(first.state_dict())
    return model


@pytest.fixture(scope="module")
def transformer(tmp_path_factory):
    """A transformer of diffusers, and the folder that it is saved in."""
    model, folder = random_transformer(), tmp_path_factory.mktemp("diffusers") / "dit"
    model.save_pretrained(folder)
    return model, folder


def test_the_imported_run_gives_diffusers_output(transformer, tmp_path):
    model, folder = transformer
    assert cli("import", folder, "--out", tmp_path / "run", *BUNDLED) == 0
    run = open_image_run(tmp_path / "run")
    x, y = torch.randn(5, 4, 8, 8), torch.tensor([0, 3, 6, 7, 1])
    t = torch.tensor([0, 1, 250, 731, 999])
    with torch.no_grad():
        expected, found = model(x, t, y).sample, run.model(x, t, y)
    assert (found - expected).abs().max() / expected.abs().max() <= 1e-5  # measured 0


def test_round_trips_to_diffusers_names_are_exact(transformer):
    model, folder = transformer
    weights = recognise(folder)
    built = DiffusersFormat().rules(weights.model)
    back, theirs = to_theirs(built, weights.weights("ema")), model.state_dict()
    assert back.keys() == theirs.keys() and all(torch.equal(back[key], theirs[key]) for key in theirs)


def test_a_pipeline_s_folder_brings_its_transformer_and_its_autoencoder(transformer, tmp_path):
    model, _ = transformer
    make(tmp_path / "pipeline" / "vae")
    model.save_pretrained(tmp_path / "pipeline" / "transformer", max_shard_size="200KB")  # several files, and an index
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    weights = recognise(tmp_path / "pipeline")
    assert len(weights.source.files) > 1
    assert weights.config()["first_stage"]["subfolder"] == "vae"
    assert weights.config()["model"]["heads"] == 3


@pytest.mark.parametrize(
    ("scheduler", "wanted"),
    [
        (diffusers.DDIMScheduler(), ("epsilon", "linear", 1000)),
        (diffusers.DDPMScheduler(500, 2e-4, 0.04, prediction_type="v_prediction"), ("v", "linear", 500)),
        (diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2"), ("epsilon", "cosine", 1000)),
        (diffusers.DDIMScheduler(trained_betas=linear_betas(100).tolist(), num_train_timesteps=100), (*LINEAR, 100)),
        (diffusers.DDIMScheduler(beta_schedule="scaled_linear"), "beta_schedule=scaled_linear"),
        (diffusers.DDIMScheduler(beta_end=0.012), "beta_end=0.012"),
        (diffusers.FlowMatchEulerDiscreteScheduler(), "is of a flow"),
    ],
)
def test_a_pipeline_was_trained_as_its_scheduler_says(transformer, tmp_path, scheduler, wanted):
    model, _ = transformer
    model.save_pretrained(tmp_path / "transformer")
    scheduler.save_pretrained(tmp_path / "scheduler")
    (tmp_path / "model_index.json").write_text("{}")
    if isinstance(wanted, str):
        with pytest.raises(ValueError, match=wanted):
            recognise(tmp_path, "diffusers")
    else:
        objective = recognise(tmp_path).config()["objective"]
        assert tuple(objective[key] for key in ("prediction", "schedule", "timesteps")) == wanted


def test_embeddings_that_differ_between_blocks_are_refused(tmp_path, capsys):
    model = random_transformer()
    torch.nn.init.zeros_(model.transformer_blocks[1].norm1.emb.timestep_embedder.linear_1.bias)
    model.save_pretrained(tmp_path / "dit")
    assert cli("import", tmp_path / "dit", "--out", tmp_path / "run") == 2
    assert "linear_1.bias differs between blocks" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_positions_that_diffusers_would_compute_otherwise_are_not_dropped(transformer):
    weights = recognise(transformer[1])
    own = weights.weights("ema")
    own["pos_embed"] = 1.5 * own["pos_embed"]  # as after an interpolation to another size
    with pytest.raises(ValueError, match=r"pos_embed differs by .* from the one that is computed there"):
        to_theirs(DiffusersFormat().rules(weights.model), own)
