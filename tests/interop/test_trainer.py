"""Fine-tuning by the Trainer of transformers, with the callback that does for routers what ours does."""

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra lm")

from transformers import Trainer, TrainingArguments

from dit_moe.interop import transformers_lm
from dit_moe.interop.transformers_lm import RouterCallback, wrap
from dit_moe.moe import routers_of, update_routers
from tests.interop.models import tiny_lm, tokens

STEPS, ROWS = 3, 8


def batch(step):
    return tokens(STEPS * ROWS)[step * ROWS : (step + 1) * ROWS]


def by_transformers(lm, folder, parts, callbacks):
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=ROWS // parts,
        gradient_accumulation_steps=parts,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        train_sampling_strategy="sequential",
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    rows = [{"input_ids": row, "labels": row} for row in tokens(STEPS * ROWS)]
    Trainer(wrap(lm), args, train_dataset=rows, callbacks=callbacks).train()
    return lm.state_dict()


def by_hand(lm, parts):
    lm.train()
    for step in range(STEPS):
        for x in batch(step).chunk(parts):
            logits, terms = lm(x, return_aux=True)
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
            ((loss + sum(lm.aux_weights[name] * term for name, term in terms.items())) / parts).backward()
        with torch.no_grad():
            for parameter in lm.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
        update_routers(lm)
    return lm.state_dict()


@pytest.mark.parametrize("router, parts", [("heavy", 4), ("layerwise", 4), ("topk", 1), (None, 2)])
def test_transformers_trainer_with_the_callback_trains_as_a_loop_that_updates_the_routers(tmp_path, router, parts):
    lm = tiny_lm(router)
    before = {name: tensor.clone() for name, tensor in lm.state_dict().items()}
    after = by_transformers(lm, tmp_path, parts, [RouterCallback()])
    moved = {name.rpartition(".")[2] for name in after if not torch.equal(after[name], before[name])}
    assert router is None or ("load_E" in moved and (router == "topk" or {"u", "error_sum"} <= moved))
    assert all(each.stats.sums is None for each in routers_of(lm))
    for name, tensor in by_hand(tiny_lm(router), parts).items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_counts_are_summed_over_processes(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        transformers_lm, "reduce", lambda sums, reduction: asked.append((len(sums), reduction)) or 2 * sums
    )
    by_transformers(tiny_lm(), tmp_path, 1, [RouterCallback()])
    assert asked == [(2, "sum")] * STEPS


def test_dropped_experts_are_told_of_once(tmp_path, capsys):
    lm = tiny_lm()
    for router in routers_of(lm):
        router.capacity_factor = 1.0
    by_transformers(lm, tmp_path, 1, [RouterCallback()])
    assert capsys.readouterr().err.count("were dropped in a step, for want of room; raise moe.capacity_factor") == 1
