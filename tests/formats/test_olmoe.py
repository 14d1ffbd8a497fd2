"""A folder of an OLMoE through the import: a run of text."""

import pytest
import torch

from dit_moe.experiments.run import open_text_run
from dit_moe.text.tokenizer import TokenizerConfig, open_tokenizer
from tests.cli.conftest import cli
from tests.interop.test_olmoe import olmoe, relative


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """An OLMoE of transformers, and the folder that it is saved in with a tokenizer."""
    model, folder = olmoe(vocab_size=320), tmp_path_factory.mktemp("olmoe") / "model"
    open_tokenizer(TokenizerConfig()).save(folder)
    model.save_pretrained(folder)
    return model, folder


def test_the_imported_run_gives_transformers_logits_and_so_does_the_folder_in_its_place(saved, tmp_path):
    model, folder = saved
    assert cli("import", folder, "--out", tmp_path / "run") == 0
    tokens = torch.randint(0, 257, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(tokens).logits
        for opened in (tmp_path / "run", folder):
            run = open_text_run(opened)
            assert relative(run.model(tokens), expected) <= 1e-5  # worst seen 3e-7
            assert run.tokenizer.eos == 256


def test_a_folder_without_a_tokenizer_is_refused(saved, tmp_path, capsys):
    saved[0].save_pretrained(tmp_path / "model")
    assert cli("import", tmp_path / "model", "--out", tmp_path / "run") == 2
    assert "there is no tokenizer.json beside it" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
