import torch

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
