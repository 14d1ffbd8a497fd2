"""A run becomes a folder that other programs open."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra lm")

from transformers import AutoModelForCausalLM, AutoTokenizer, OlmoeForCausalLM

from dit_moe import config
from dit_moe.interop.export import export_run
from dit_moe.interop.pipeline import wrap
from tests.analysis.runs import image_run
from tests.interop.models import tiny_lm, tiny_run, tokens
from tests.scripts import in_use


def test_an_exported_run_opens_with_its_weights_tokenizer_and_origin(tmp_path):
    run = tiny_run(tmp_path)
    facts = export_run(run, tmp_path / "out")
    model, tokenizer = (auto.from_pretrained(tmp_path / "out") for auto in (AutoModelForCausalLM, AutoTokenizer))
    assert torch.equal(model(tokens()).logits, run.model(tokens()))
    text = "Naïve <|endoftext|> naïve"
    assert tokenizer(text, split_special_tokens=True).input_ids == run.tokenizer.encode(text)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == run.tokenizer.eos
    assert tokenizer.model_max_length == run.model.config.max_length
    written = json.loads((tmp_path / "out" / "dit_moe.json").read_text())
    assert written == json.loads(json.dumps(facts))
    assert (written["step"], written["weights"], written["weights_sha256"]) == (7, "ema", run.sha256)
    assert written["experiment"] == json.loads(json.dumps(config.dump(run.experiment)))


def test_a_program_that_knows_only_the_folder_opens_it_with_trust(tmp_path):
    run, images = tiny_run(tmp_path), image_run()
    export_run(run, tmp_path / "lm")
    wrap(images).save_pretrained(tmp_path / "pipeline")
    code = (
        "import sys, numpy as np, torch; from diffusers import DiffusionPipeline\n"
        "pipe = DiffusionPipeline.from_pretrained(sys.argv[2], trust_remote_code=True)\n"
        "print(np.stack(pipe([7, 2], seed=0).images).tolist())\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "print(model(torch.tensor([[1, 2, 3]])).logits.double().sum().item())"
    )
    env = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-c", code, tmp_path / "lm", tmp_path / "pipeline"]
    made = subprocess.run(words, capture_output=True, text=True, env=env)
    assert made.returncode == 0, made.stderr
    pixels, logits = made.stdout.splitlines()
    assert json.loads(pixels) == images.generator().generate(torch.tensor([7, 2])).images[:, 0].tolist()
    assert float(logits) == pytest.approx(run.model(torch.tensor([[1, 2, 3]])).double().sum().item())


def test_a_topk_run_is_exported_as_an_olmoe_that_needs_none_of_our_code(tmp_path):
    run = tiny_run(tmp_path, tiny_lm("topk"))
    export_run(run, tmp_path / "out", olmoe=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(model, OlmoeForCausalLM) and model.config.eos_token_id == run.tokenizer.eos
    torch.testing.assert_close(model(tokens()).logits, run.model(tokens()), rtol=1e-5, atol=1e-5)
    assert not list((tmp_path / "out").glob("*.py"))
    export_run(run, tmp_path / "native")
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens"):
        expected = getattr(native.generation_config, name)
        assert getattr(model.generation_config, name) == expected is not None
    assert model.config.bos_token_id == native.config.bos_token_id == run.tokenizer.eos


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600)])
def test_the_umask_decides_who_may_read_the_files(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        export_run(tiny_run(tmp_path), tmp_path / "out")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()} == {mode}


def test_an_export_that_is_refused_or_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    run, out = tiny_run(tmp_path), tmp_path / "out"
    with pytest.raises(ValueError, match=r"moe.router.name=dtopp: OLMoE's routers are top-k"):
        export_run(run, out, olmoe=True)
    with in_use(tmp_path, "out"), pytest.raises(ValueError, match="out is in use by another process; wait for it"):
        export_run(run, out)
    monkeypatch.setattr(run.tokenizer, "save", lambda folder: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        export_run(run, out)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_is_not_written_over(tmp_path):
    for folder in ("out", "other.partial"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine").touch()
    with pytest.raises(ValueError, match="out is there already"):
        export_run(tiny_run(tmp_path), tmp_path / "out")
    export_run(tiny_run(tmp_path), tmp_path / "other")
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("mine")) == [
        "other.partial/mine",
        "out/mine",
    ]
