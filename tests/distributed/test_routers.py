"""Every router in two processes: what each of them holds after every step, and what one process would.

Two processes add up in another order than one. The worst difference that this made to a number, beside the largest of
its tensor, was 7e-7.
"""

from pathlib import Path

import pytest
import torch

from tests.distributed.routers_script import cases, config_of, trained
from tests.scripts import start

SCRIPT = Path(__file__).with_name("routers_script.py")
OTHERWISE = {  # what two processes train otherwise than one does, by design
    "diffmoe": "each expert takes the best tokens of the batch, of which a process has half",
    "expert_race": "the pairs of the batch compete, of which a process has half",
    "expert_threshold": "as diffmoe, during its warm-up",
    "promoe": "its contrastive loss compares prototypes with the mean tokens of a process",
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each process found, by case."""
    folder = tmp_path_factory.mktemp("routers")
    done = start(SCRIPT, folder, processes=2)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("case", cases())
def test_both_processes_hold_the_same_weights_and_router_state_after_each_step_bit_for_bit(ranks, case):
    for (_, one), (_, other) in zip(*(rank[case] for rank in ranks), strict=True):
        assert one.keys() == other.keys()
        assert [name for name, tensor in one.items() if not torch.equal(tensor, other[name])] == []


@pytest.mark.parametrize("case", cases())
def test_two_processes_train_as_one_with_the_whole_batch_unless_the_router_looks_at_the_batch(ranks, case, tmp_path):
    alone, together = trained(case, tmp_path), ranks[0][case]
    assert [active for active, _ in together] == [active for active, _ in alone]  # by all routers, so far
    differing = set()
    for (_, one), (_, two) in zip(alone, together, strict=True):
        for name, tensor in one.items():
            scale = tensor.double().abs().max().clamp(min=1e-6)  # what starts at 0 may still be there
            differing |= {name} if ((two[name].double() - tensor.double()).abs() > 1e-5 * scale).any() else set()
    if case in OTHERWISE:
        assert differing, "it trains as one process does: strike it off the list"
    else:
        assert differing == set() and config_of(case).sees != "batch"
