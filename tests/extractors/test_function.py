"""Functions of the user's as feature spaces, good and bad ones."""

import hashlib

import pytest
import torch

from dit_moe.config import ConfigError
from dit_moe.extractors import EXTRACTORS
from dit_moe.extractors.function import FunctionConfig

CODE = """
import torch
number = 3
def means(images): return images.float().mean((2, 3))
def fid(images): return images.double().mean((2, 3))
def whole(images): return images.long().sum((2, 3))
def grows(images): return torch.ones(len(images), images.shape[3])
def array(images): return images.float().mean((2, 3)).numpy()
def flat(images): return images.float().mean((1, 2, 3))
def short(images): return images[1:].float().mean((2, 3))
def nan(images): return images.float().mean((2, 3)) / 0
def boom(images): return {}["oops"]
def refuses(images): raise ValueError("not so\\ngrey")
"""
IMAGES = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).reshape(2, 3, 4, 4)


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    path = tmp_path / "own_features.py"
    path.write_text(CODE)
    (tmp_path / "needs_more.py").write_text("import there_is_no_such_module")
    monkeypatch.syspath_prepend(str(tmp_path))
    return path


def build(name, module="own_features", **options):
    return EXTRACTORS.build(FunctionConfig(path=f"{module}:{name}", **options))


def test_features_are_what_the_function_returns(module):
    extractor = build("means")
    extractor.check((3, 4, 4))
    assert (extractor.name, extractor.dim) == ("function_own_features_means", 3)
    assert extractor.sha256 == hashlib.sha256(module.read_bytes()).hexdigest()
    assert torch.equal(extractor(IMAGES).features_BD, IMAGES.float().mean((2, 3)))
    assert extractor.logits(extractor(IMAGES).features_BD) is None


def test_float64_stays_and_whole_numbers_become_float32():
    assert build("fid")(IMAGES).features_BD.dtype == torch.float64
    assert build("whole")(IMAGES).features_BD.dtype == torch.float32


def test_a_function_called_fid_gives_no_fid():
    extractor = build("fid")
    assert extractor.name == "function_own_features_fid" and not extractor.is_fid


def test_the_weights_it_reads_are_part_of_its_identity(tmp_path):
    identities = []
    for content in (b"one", b"two"):
        (tmp_path / "weights").write_bytes(content)
        extractor = build("means", weights=str(tmp_path / "weights"))
        extractor.check((3, 4, 4))
        identities.append(extractor.identity())
    assert identities[0] != identities[1]
    with pytest.raises(ValueError, match=r"none cannot be read .*--weights FILE"):
        build("means", weights=str(tmp_path / "none"))


@pytest.mark.parametrize("name", ["array", "flat", "short", "nan"])
def test_what_is_no_table_of_finite_features_is_refused_when_tried_and_later(name):
    wanted = f"own_features:{name} returned .*; it must return a tensor of finite numbers"
    with pytest.raises(ValueError, match=wanted):
        build(name).check((3, 4, 4))
    with pytest.raises(ValueError, match=wanted):
        build(name)(IMAGES)


@pytest.mark.parametrize(
    "name, line, said", [("boom", 12, "KeyError 'oops'"), ("refuses", 13, "ValueError not so grey")]
)
def test_what_it_raises_when_tried_is_told_in_one_line_with_its_place(name, line, said):
    wanted = (
        f"^--extractor own_features:{name} failed on 2 blank images 1×8×8: {said} .own_features.py:{line}.; mend it$"
    )
    with pytest.raises(ValueError, match=wanted):
        build(name).check((1, 8, 8))


def test_its_identity_is_the_same_before_and_after_it_was_called():
    extractor = build("means")
    before = extractor.identity()
    extractor.check((3, 4, 4))
    assert extractor.identity() == before and before["name"] == "function_own_features_means"


def test_functions_of_one_name_in_two_modules_have_two_names(module, tmp_path):
    (tmp_path / "other_features.py").write_text(CODE)
    assert build("means").name != build("means", module="other_features").name


def test_a_width_that_changes_is_refused():
    extractor = build("grows")
    extractor.check((3, 4, 4))
    with pytest.raises(ValueError, match="returned 8 features, and 4 before"):
        extractor(torch.zeros(2, 3, 4, 8, dtype=torch.uint8))


def test_what_is_not_there_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="no module own_fetures; put its folder on PYTHONPATH"):
        build("means", module="own_fetures")
    with pytest.raises(ValueError, match=r"no module own_features.deeper; put its folder on PYTHONPATH"):
        build("means", module="own_features.deeper")
    missing = (
        r"needs_more:means failed as needs_more was imported: ModuleNotFoundError .*such_module' \(needs_more.py:1\)"
    )
    with pytest.raises(ValueError, match=missing):  # its own mistake
        build("means", module="needs_more")
    (tmp_path / "unfinished.py").write_text("\ndef f(:")
    with pytest.raises(ValueError, match=r"failed as unfinished was imported: SyntaxError .* \(unfinished.py:2\)"):
        build("f", module="unfinished")
    with pytest.raises(ValueError, match=r"own_features.py has no maens; name a function"):
        build("maens")
    with pytest.raises(ValueError, match=r"own_features.py is no function: number; name a function"):
        build("number")
    with pytest.raises(ValueError, match="builtins has no source file"):
        build("len", module="builtins")
    with pytest.raises(ConfigError, match=r"path=features.py must be package.module:function"):
        FunctionConfig(path="features.py")
