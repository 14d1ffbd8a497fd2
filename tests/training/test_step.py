import pytest
import torch

from dit_moe.diffusion import OBJECTIVES
from dit_moe.models import MODELS, DiTConfig
from dit_moe.moe import MoEConfig, routers_of
from dit_moe.moe.routers.expert_race import ExpertRaceConfig
from dit_moe.randomness import BatchRandom
from dit_moe.training.step import training_loss


def network(x, *, return_aux):
    assert return_aux
    return 2 * x, {"balance": x.sum(), "z": x.square().sum()}


def test_aux_terms_are_averaged_over_calls_weighted_into_the_total_and_reported_unweighted():
    x = torch.tensor([1.0, 3.0], requires_grad=True)

    def objective(predict, batch, random):
        outputs = [predict(batch["x"][i : i + 1]) for i in range(2)]
        return {"loss": torch.cat(outputs).sum(), "other": torch.tensor(7.0)}

    total, terms = training_loss(network, objective, {"x": x}, BatchRandom(0, total=2), {"balance": 0.5, "z": 0.0})
    values = {name: term.item() for name, term in terms.items()}
    assert values == {"loss": 8.0, "other": 7.0, "aux_balance": 2.0, "aux_z": 5.0, "total_loss": 9.0}
    assert not any(term.requires_grad for term in terms.values())
    total.backward()
    assert x.grad.tolist() == [2.25, 2.25]


def test_a_dense_network_adds_nothing():
    def objective(predict, batch, random):
        return {"loss": predict(batch["x"]).sum()}

    x = torch.ones(3)
    _, terms = training_loss(lambda x, return_aux: (x, {}), objective, {"x": x}, BatchRandom(0, total=3), {})
    assert {name: term.item() for name, term in terms.items()} == {"loss": 3.0, "total_loss": 3.0}


@pytest.mark.parametrize("name", OBJECTIVES.names())
def test_routers_that_learn_from_the_target_of_the_objective_are_given_it_patch_by_patch(name):
    objective = OBJECTIVES.build(OBJECTIVES.config_class(name)(), num_classes=3)
    shape = {"width": 32, "depth": 2, "heads": 2, "in_channels": 2, "input_size": 4, "num_classes": 3}
    moe = MoEConfig(router=ExpertRaceConfig())
    model = MODELS.build(DiTConfig(name="DiT-custom/2-4E2A", moe=moe, learn_sigma=objective.learns_sigma, **shape))
    targets = []

    class Wrapped:  # as data parallelism wraps networks
        module = model

        def __call__(self, *args, target, **kwargs):
            targets.append(target)
            return model(*args, target=target, **kwargs)

    for router in routers_of(model):
        torch.nn.init.zeros_(router.head)
    batch = {"latents": torch.randn(5, 2, 4, 4), "labels": torch.zeros(5, dtype=torch.int64)}
    _, terms = training_loss(Wrapped(), objective, batch, BatchRandom(0, total=5), model.aux_weights)
    torch.testing.assert_close(terms["aux_target"], targets[0].square().mean())
    patches_BSF = model.patchify(targets[0])
    torch.testing.assert_close(patches_BSF[3, 1].view(2, 2, 2), targets[0][3, :, :2, 2:].permute(1, 2, 0))
    assert model.wants_target and not model.eval().wants_target
