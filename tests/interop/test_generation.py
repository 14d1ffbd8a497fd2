"""Text from prompts: its randomness is that of the seed and the prompt's number, and nothing else's."""

import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra lm")

from dit_moe.config import WorkFailed
from dit_moe.interop import generation
from dit_moe.interop.generation import Draw
from dit_moe.interop.transformers_lm import wrap
from tests.interop.models import tiny_lm, tiny_run

PROMPTS = ["", "It was", "Naïve ", "a much longer prompt", "It was"]


@pytest.fixture
def run(tmp_path):
    return tiny_run(tmp_path)


def generate_text(run, prompts, batch_size=16, **options):
    sample = replace(run.experiment.sample, prompts=tuple(prompts), **{"temperature": 1.0, "top_p": None} | options)
    return generation.generate_text(replace(run, experiment=replace(run.experiment, sample=sample)), batch_size)


def test_a_text_depends_on_the_seed_and_its_number_and_on_nothing_else(run):
    state = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    how = {"max_new_tokens": 20, "temperature": 0.9, "top_p": 0.95, "top_k": 100}
    torch.manual_seed(0)
    before = torch.get_rng_state()
    once = generate_text(run, PROMPTS, seed=3, **how)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert generate_text(run, PROMPTS, seed=3, batch_size=1, **how) == once
    assert generate_text(run, PROMPTS[:2], seed=3, **how) == once[:2]
    assert all(a != b for a, b in zip(generate_text(run, PROMPTS, seed=4, **how), once, strict=True))
    assert once[1] != once[4]  # the same prompt twice is written on in two ways
    assert not run.model.training  # and the model is left as it was
    assert all(torch.equal(tensor, state[name]) for name, tensor in run.model.state_dict().items())


def test_without_temperature_it_is_the_most_probable_text_whatever_the_seed(run):
    model, tokenizer = wrap(run.model, run.tokenizer), run.tokenizer
    texts = generate_text(run, PROMPTS, max_new_tokens=30, temperature=0)
    for prompt, text in zip(PROMPTS, texts, strict=True):
        ids = torch.tensor([[tokenizer.eos, *tokenizer.encode(prompt)]])
        written = model.generate(ids, max_new_tokens=30, do_sample=False)[0, ids.shape[1] :].tolist()
        assert text == tokenizer.decode([each for each in written if each != tokenizer.eos])
    assert generate_text(run, PROMPTS, max_new_tokens=30, temperature=0, seed=9) == texts
    assert generate_text(run, PROMPTS, max_new_tokens=30, top_k=1) == texts
    assert generate_text(run, PROMPTS, max_new_tokens=30, top_p=1e-6) == texts


def test_running_out_of_memory_is_explained(run, monkeypatch):
    monkeypatch.setattr(run.model, "forward", lambda *args, **options: torch.empty(2**48))  # 1 PiB
    with pytest.raises(WorkFailed, match=r"out of memory; lower sample\.max_new_tokens"):
        generate_text(run, PROMPTS)


def test_a_text_ends_with_its_document(tmp_path):
    lm = tiny_lm()
    with torch.no_grad():  # the end of text is likely, but not certain
        lm.head.weight[256] = lm.head.weight[:256].mean(0) * 8
    texts = generate_text(tiny_run(tmp_path, lm), PROMPTS * 4, max_new_tokens=60)
    assert not any("<|endoftext|>" in text for text in texts)
    assert len({len(text.encode()) for text in texts}) > 5


def test_draws_follow_the_distribution_and_leave_out_what_is_forbidden():
    prob = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    draw = Draw([torch.Generator().manual_seed(0)])
    drawn = torch.cat([draw(torch.zeros(1, 1), prob.log()[None]).argmax(-1) for _ in range(4000)])
    share = drawn.bincount(minlength=5) / 4000
    assert share[4] == 0
    for found, wanted in zip(share[:4].tolist(), prob[:4].tolist(), strict=True):
        assert abs(found - wanted) < 4 * math.sqrt(wanted * (1 - wanted) / 4000)
